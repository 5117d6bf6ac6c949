"""ONNX Runtime on an NVIDIA GPU: its CUDA provider, and its TensorRT provider.

For every batch there is one copy to the device, the network, and one copy back. With the CUDA provider
they follow one another on one stream, and a shape that comes again is captured as a CUDA graph, which
saves the launching of its thousand kernels: da3-large at 504 x 504 takes 8.6 ms instead of 10.4 on an
H200.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import traceback
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import INPUT, MAX_SHAPES, Backend, EngineFolder, RawOutputs
from runtime.backends.cuda import Stream, failure, has_bindings, has_cuda_driver
from runtime.backends.onnxruntime import OnnxRuntimeBackend, OpenSession
from runtime.backends.runtime_cache import cache_path
from runtime.backends.staging import Layout, Staging, lay_out
from runtime.errors import BackendUnavailableError, InferenceError
from runtime.manifest import Kind, TensorSpec
from runtime.settings import Settings
from runtime.variants import PATCH, Graph

logger = logging.getLogger(__name__)

RAYS_PER_PATCH = 8  # along each side
_NO_GRAPH = -1  # gpu_graph_id: run without capturing
_KNOWN_SHAPES = 64  # of those that came once as many are remembered


def shapes_of(outputs: Sequence[TensorSpec], images: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of a graph's outputs for an input of shape [B, H, W, 3]."""
    batch, height, width, _ = images
    sizes = {
        "batch": batch,
        "height": height,
        "width": width,
        "ray_height": RAYS_PER_PATCH * height // PATCH,
        "ray_width": RAYS_PER_PATCH * width // PATCH,
    }
    return [
        tuple(sizes[side] if isinstance(side, str) else side for side in spec.shape) for spec in outputs
    ]


class _Bound(NamedTuple):
    """A batch shape that is ready to run: its memory, bound to the session, and its graph's id."""

    staging: Staging
    layout: Layout
    binding: Any
    graph_id: int


class OnnxRuntimeCuda(OnnxRuntimeBackend):
    """FP16 on an NVIDIA GPU.

    Attributes
    ----------
    shares_stream : bool
        Whether the provider runs on the backend's stream, and captures CUDA graphs.
    device : str
        Where the inputs and outputs that are bound lie.
    """

    name = "onnxruntime-cuda"
    kind = Kind.ONNX_FP16
    gains_from_batches = True
    providers: ClassVar[tuple[str, ...]] = ("CUDAExecutionProvider",)
    shares_stream: ClassVar[bool] = True
    device: ClassVar[str] = "cuda"

    def __init__(
        self, open_session: OpenSession, outputs: list[TensorSpec], precision: str, trained: bool
    ) -> None:
        super().__init__(open_session, outputs, precision, trained)
        self._open_session = open_session
        self._outputs = outputs
        self._names = tuple(spec.name for spec in outputs)
        self._lock = threading.Lock()
        self._staging = Staging()
        # Shapes that came once, and those that came again with their captured graphs.
        self._met: dict[tuple[int, ...], None] = {}
        self._captured: dict[tuple[int, ...], _Bound] = {}
        self._captures = self.shares_stream
        self._session: Any = None
        self._stream: Stream | None = Stream()
        try:
            self._session = self._open(self._stream)
        except BaseException:
            self.close()
            raise

    @classmethod
    def unavailable(cls) -> str | None:
        reason = super().unavailable()
        if reason is None and not has_bindings():
            reason = "cuda-bindings is not installed"
        if reason is None and not has_cuda_driver():
            reason = "there is no NVIDIA driver"
        return reason

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
        return {
            # Grow by what is asked for, not to the next power of two: others share the GPU.
            "arena_extend_strategy": "kSameAsRequested",
            # Its default tries every algorithm of every convolution for each new shape: 0.7 s on an H200
            # instead of 0.2 s, and nothing faster comes of it (da3-large: 9.2 ms, not 8.6).
            "cudnn_conv_algo_search": "HEURISTIC",
        }

    def run(self, images: NDArray[np.uint8]) -> RawOutputs:
        with self._lock:
            if self._stream is None:
                raise InferenceError("The engine has been unloaded.")
            try:
                values = self._run(self._stream, images)
            except Exception as error:
                # A frame of it would keep the session, and the session what it took of the GPU.
                traceback.clear_frames(error.__traceback__)
                self._free()
                said = str(error.__cause__ or "")
                logger.warning("%s: %s %s", self.name, error, said)
                raise failure(self.name, images.shape, error, said) from error
        return RawOutputs.of(self._names, values)

    def _run(self, stream: Stream, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        if self._session is None:
            self._session = self._open(stream)
        bound = self._bound(images.shape)
        bound.staging.put(images)
        self._queue(stream, bound)
        stream.wait()
        return bound.staging.take(bound.layout.outputs)

    def _open(self, stream: Stream) -> Any:
        """A session; without CUDA graphs where a node of its graph runs on the CPU."""
        if not self.shares_stream:
            return self._open_session({})
        shared = {"user_compute_stream": str(stream.handle)}
        if self._captures:
            try:
                return self._open_session(shared | {"enable_cuda_graph": "1"})
            except BackendUnavailableError as error:
                logger.info("%s: no CUDA graphs: %s", self.name, error.__cause__ or error)
                self._captures = False
        return self._open_session(shared)

    def _bound(self, shape: tuple[int, ...]) -> _Bound:
        """A shape's memory and binding: its own, to be captured, from the second time on."""
        bound = self._captured.get(shape)
        if bound is not None:
            return bound
        layout = lay_out(shape, shapes_of(self._outputs, shape))
        if self._captures and shape in self._met and len(self._captured) < MAX_SHAPES:
            staging = Staging()
            staging.reserve(layout)
            bound = _Bound(staging, layout, self._bind(staging, layout, shape), len(self._captured))
            self._captured[shape] = bound
            return bound
        self._met.pop(shape, None)
        self._met[shape] = None
        if len(self._met) > _KNOWN_SHAPES:
            self._met.pop(next(iter(self._met)))
        self._staging.reserve(layout)
        return _Bound(self._staging, layout, self._bind(self._staging, layout, shape), _NO_GRAPH)

    def _bind(self, staging: Staging, layout: Layout, shape: tuple[int, ...]) -> Any:
        """A session's binding of its input and outputs to a batch's memory."""
        binding = self._session.io_binding()
        binding.bind_input(INPUT, self.device, 0, np.uint8, shape, staging.device_in.address)
        for name, output in zip(self._names, layout.outputs, strict=True):
            address = staging.device_out.address + output.offset
            binding.bind_output(name, self.device, 0, np.float32, output.shape, address)
        return binding

    def _queue(self, stream: Stream, bound: _Bound) -> None:
        """Queue the copies, and the network between them."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        bound.staging.upload(stream, bound.layout)
        if self.shares_stream:
            options.add_run_config_entry("gpu_graph_id", str(bound.graph_id))
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        else:
            stream.wait()
        self._session.run_with_iobinding(bound.binding, options)
        bound.staging.download(stream, bound.layout)

    def free(self) -> None:
        with self._lock:
            self._free()

    def close(self) -> None:
        with self._lock:
            self._free()
            if self._stream is not None:
                self._stream.close()
                self._stream = None

    def _free(self) -> None:
        """Give back everything but the stream: captured graphs go with their session only."""
        if self._stream is not None:
            self._stream.drain()
        for bound in self._captured.values():
            bound.staging.free()
        self._captured.clear()
        self._met.clear()
        self._session = None
        self._staging.free()


class OnnxRuntimeTensorRT(OnnxRuntimeCuda):
    """The same through ONNX Runtime's TensorRT provider, which builds a plan for minutes when it loads.

    Only tried when ``BACKEND`` names it, and only with an ONNX Runtime and a TensorRT that were made for
    each other. Its plan is kept where runtime caches are.
    """

    name = "onnxruntime-tensorrt"
    providers = ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    automatic = False
    shares_stream = False

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
