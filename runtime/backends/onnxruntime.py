"""ONNX Runtime on CUDA, on CUDA through its TensorRT provider, and on the CPU."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import INPUT, MAX_SHAPES, Backend, EngineFolder, RawOutputs
from runtime.backends.cuda import failure, has_cuda_driver
from runtime.backends.runtime_cache import cache_path
from runtime.errors import BackendUnavailableError, InferenceError
from runtime.manifest import Kind
from runtime.settings import Settings
from runtime.variants import Graph

logger = logging.getLogger(__name__)


class OnnxRuntimeBackend(Backend):
    """An ONNX Runtime session over one of the folder's ONNX files.

    Attributes
    ----------
    kind : Kind
        The artefact it loads.
    providers : tuple[str, ...]
        Execution providers, the one it must get first.
    """

    kind: ClassVar[Kind]
    providers: ClassVar[tuple[str, ...]]

    def __init__(self, session: Any, outputs: tuple[str, ...], precision: str, trained: bool) -> None:
        self._session = session
        self._outputs = outputs
        self.precision = precision
        self.trained = trained

    @classmethod
    def unavailable(cls) -> str | None:
        if find_spec("onnxruntime") is None:
            return "onnxruntime is not installed"
        import onnxruntime

        if cls.providers[0] not in onnxruntime.get_available_providers():
            return f"this onnxruntime has no {cls.providers[0]}"
        return None

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: Settings) -> Backend:
        path = folder.artefact(graph, cls.kind)
        assert folder.manifest is not None
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        options.log_severity_level = 3
        providers = [(name, cls._options(name, folder, settings)) for name in cls.providers]
        try:
            session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:
            # ONNX Runtime's exceptions share no public base class.
            raise BackendUnavailableError(f"ONNX Runtime cannot load {path.name}.") from error
        if session.get_providers()[0] != cls.providers[0]:
            raise BackendUnavailableError(f"{cls.providers[0]} cannot be started on this machine.")
        artefact = folder.manifest.graphs[graph.key].artefacts[cls.kind]
        return cls(session, graph.outputs, artefact.precision, folder.manifest.trained)

    @classmethod
    def _options(cls, provider: str, folder: EngineFolder, settings: Settings) -> dict[str, Any]:
        """Options of one of its providers."""
        return {}

    def close(self) -> None:
        self._session = None


class OnnxRuntimeCpu(OnnxRuntimeBackend):
    """FP32 on the CPU, which has no FP16 arithmetic to gain from."""

    name = "onnxruntime-cpu"
    kind = Kind.ONNX_FP32
    providers = ("CPUExecutionProvider",)

    def run(self, images: NDArray[np.uint8]) -> RawOutputs:
        try:
            values = self._session.run(self._outputs, {INPUT: images})
        except Exception as error:
            raise InferenceError(
                f"{self.name} failed on a batch of shape {list(images.shape)}."
            ) from error
        return RawOutputs.of(self._outputs, values)


class OnnxRuntimeCuda(OnnxRuntimeBackend):
    """FP16 on an NVIDIA GPU, with the inputs and outputs bound: one copy in, one copy per output back.

    Attributes
    ----------
    device : str
        Where a bound input lies.
    """

    name = "onnxruntime-cuda"
    kind = Kind.ONNX_FP16
    gains_from_batches = True
    providers: ClassVar[tuple[str, ...]] = ("CUDAExecutionProvider",)
    device: ClassVar[str] = "cuda"

    def __init__(self, session: Any, outputs: tuple[str, ...], precision: str, trained: bool) -> None:
        super().__init__(session, outputs, precision, trained)
        self._lock = threading.Lock()
        # By shape, least recently used first: the binding and its input in device memory.
        self._bindings: dict[tuple[int, ...], tuple[Any, Any]] = {}

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: Settings) -> Backend:
        import onnxruntime

        if hasattr(onnxruntime, "preload_dlls") and has_cuda_driver():
            # CUDA's libraries where they were installed as Python packages.
            with contextlib.redirect_stdout(io.StringIO()):
                onnxruntime.preload_dlls()
        return super().load(folder, graph, settings)

    @classmethod
    def _options(cls, provider: str, folder: EngineFolder, settings: Settings) -> dict[str, Any]:
        # Grow by what is asked for, not to the next power of two: others share the GPU.
        return {"arena_extend_strategy": "kSameAsRequested"}

    def run(self, images: NDArray[np.uint8]) -> RawOutputs:
        with self._lock:
            try:
                binding, place = self._bound(images.shape)
                place.update_inplace(images)
                self._session.run_with_iobinding(binding)
                values = binding.copy_outputs_to_cpu()
            except Exception as error:
                self._bindings.clear()
                logger.warning("%s: %s", self.name, error)
                raise failure(self.name, images.shape, error) from error
        return RawOutputs.of(self._outputs, values)

    def _bound(self, shape: tuple[int, ...]) -> tuple[Any, Any]:
        import onnxruntime

        bound = self._bindings.pop(shape, None)
        if bound is None:
            if len(self._bindings) >= MAX_SHAPES:
                self._bindings.pop(next(iter(self._bindings)))
            place = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.uint8, self.device)
            binding = self._session.io_binding()
            binding.bind_ortvalue_input(INPUT, place)
            for name in self._outputs:
                binding.bind_output(name)
            bound = binding, place
        self._bindings[shape] = bound
        return bound

    def free(self) -> None:
        with self._lock:
            self._bindings.clear()

    def close(self) -> None:
        self.free()
        super().close()


class OnnxRuntimeTensorRT(OnnxRuntimeCuda):
    """The same through ONNX Runtime's TensorRT provider, which builds a plan for minutes when it loads.

    Only tried when ``BACKEND`` names it, and only with an ONNX Runtime and a TensorRT that were made for
    each other. Its plan is kept where runtime caches are.
    """

    name = "onnxruntime-tensorrt"
    providers = ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    automatic = False

    def largest_batch(self, height: int, width: int) -> int:
        return 1  # of the one profile it builds

    @classmethod
    def _options(cls, provider: str, folder: EngineFolder, settings: Settings) -> dict[str, Any]:
        if provider != cls.providers[0]:
            return super()._options(provider, folder, settings)
        assert folder.manifest is not None
        single = folder.manifest.profiles[0]
        sizes = {"min": single.minimum, "opt": single.optimum, "max": single.maximum}
        shapes = {
            f"trt_profile_{name}_shapes": f"{INPUT}:{'x'.join(map(str, size))}"
            for name, size in sizes.items()
        }
        cache = cache_path(folder, settings, "onnxruntime-tensorrt").parent
        return shapes | {
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(cache),
        }
