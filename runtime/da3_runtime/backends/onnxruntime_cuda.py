"""ONNX Runtime on an NVIDIA GPU: its CUDA provider, and its TensorRT provider.

For every batch there is one copy to the device, the network, and one copy back. With the CUDA provider
they follow one another on one stream, and a shape that comes again is captured as a CUDA graph, which
saves the launching of its thousand kernels: da3-large at 504 x 504 takes 8.6 ms instead of 10.4 on an
H200.

ONNX Runtime keeps a captured graph with the thread that ran it and gives it back with its session only.
So a backend has a thread of its own, and captures no more than :data:`MAX_SHAPES` shapes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from packaging.version import Version

from da3_runtime.backends.base import MAX_SHAPES, Backend
from da3_runtime.backends.gpu.capture_gate import GATE
from da3_runtime.backends.gpu.cuda import Stream, failure, missing
from da3_runtime.backends.gpu.rtx_kernel_cache import cache_path
from da3_runtime.backends.gpu.staging import Layout, Staging, lay_out
from da3_runtime.backends.onnxruntime import OnnxRuntimeBackend, OpenSession
from da3_runtime.errors import BackendUnavailableError, InferenceError, OutOfMemoryError
from da3_runtime.network_io import INPUT, RawOutputs, TensorSpec
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.manifest import Kind
from da3_runtime.store.settings import EngineSettings
from da3_runtime.variants import PATCH, Graph

logger = logging.getLogger(__name__)

RAYS_PER_PATCH = 8  # along each side
# Before, a graph read the addresses of a Concat's inputs from memory that later runs were given: wrong
# depth, in silence (onnxruntime's pull request 32121; 1.31.1 has it, 1.26 has not).
GRAPHS_FROM = Version("1.31")
_CANNOT_CAPTURE = "graph capture"  # in what is said of a graph some of whose nodes run on the CPU
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


def captures_graphs() -> bool:
    """Whether the installed ONNX Runtime replays CUDA graphs as it captured them."""
    import onnxruntime

    return Version(onnxruntime.__version__) >= GRAPHS_FROM


@dataclass
class _Bound:
    """A batch shape that is ready to run: its memory, bound to the session, and its graph."""

    staging: Staging
    layout: Layout
    binding: Any
    graph_id: int = _NO_GRAPH
    is_captured: bool = False


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
        self._staging = Staging()
        # Shapes that came once, and those that came again.
        self._met: dict[tuple[int, ...], None] = {}
        self._kept: dict[tuple[int, ...], _Bound] = {}
        self._captures = self.shares_stream and captures_graphs()
        self._session: Any = None
        self._stream: Stream | None = Stream()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        try:
            self._thread.submit(self._open, self._stream).result()
        except BaseException:
            self.close()
            raise

    @classmethod
    def unavailable(cls) -> str | None:
        return super().unavailable() or missing()

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Backend:
        import onnxruntime

        if hasattr(onnxruntime, "preload_dlls"):
            # CUDA's libraries where they were installed as Python packages.
            with contextlib.redirect_stdout(io.StringIO()):
                onnxruntime.preload_dlls()
        return super().load(folder, graph, settings)

    @classmethod
    def _options(cls, provider: str, folder: EngineFolder, settings: EngineSettings) -> dict[str, Any]:
        return {
            # Grow by what is asked for, not to the next power of two: others share the GPU.
            "arena_extend_strategy": "kSameAsRequested",
            # Its default tries every algorithm of every convolution for each new shape: 0.7 s on an H200
            # instead of 0.2 s, and nothing faster comes of it (da3-large: 9.2 ms, not 8.6).
            "cudnn_conv_algo_search": "HEURISTIC",
        }

    def run(self, images: NDArray[np.uint8]) -> RawOutputs:
        try:
            answer = self._thread.submit(self._answer, images)
        except RuntimeError as error:
            raise InferenceError("The engine has been unloaded.") from error
        return RawOutputs.of(self._names, answer.result())

    def free(self) -> None:
        self._thread.submit(self._free).result()

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # closed before
            self._thread.submit(self._close).result()
        self._thread.shutdown()

    def _answer(self, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """What :meth:`run` gives; everything from here on happens on the backend's thread."""
        assert self._stream is not None
        try:
            return self._run(self._stream, images)
        except Exception as error:
            chain = _chain(error)
            said = " ".join(map(str, chain[1:]))
            logger.warning("%s: %s %s", self.name, error, said)
            raised = failure(self.name, images.shape, error, said)
            # A frame of it would keep the session, and the session what it took of the GPU.
            for each in chain:
                traceback.clear_frames(each.__traceback__)
            # Of a lost GPU nothing can be given back, and trying to may end the process.
            if isinstance(raised, OutOfMemoryError):
                self._free()
            raise raised from error

    def _run(self, stream: Stream, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        if self._session is None:
            self._open(stream)
        bound = self._bound(images.shape)
        bound.staging.put(images)
        bound.staging.upload(stream, bound.layout)
        self._launch(stream, bound)
        bound.staging.download(stream, bound.layout)
        stream.wait()
        return bound.staging.take(bound.layout.outputs)

    def _open(self, stream: Stream) -> None:
        """Open the session; without CUDA graphs where a node of its graph runs on the CPU."""
        shared = {"user_compute_stream": str(stream.handle)} if self.shares_stream else {}
        if self._captures:
            try:
                self._session = self._open_session(shared | {"enable_cuda_graph": "1"})
            except BackendUnavailableError as error:
                if _CANNOT_CAPTURE not in str(error.__cause__):
                    raise
                logger.info("%s: no CUDA graphs: %s", self.name, error.__cause__)
                self._captures = False
            else:
                return
        self._session = self._open_session(shared)

    def _bound(self, shape: tuple[int, ...]) -> _Bound:
        """A shape's memory and binding: its own, to be captured, from the second time on."""
        bound = self._kept.get(shape)
        if bound is not None:
            return bound
        layout = lay_out(shape, shapes_of(self._outputs, shape))
        recurs = shape in self._met
        self._met.pop(shape, None)
        if self._captures and recurs and len(self._kept) < MAX_SHAPES:
            bound = _Bound(Staging(), layout, None, graph_id=len(self._kept))
            self._kept[shape] = bound
        else:
            self._met[shape] = None
            if len(self._met) > _KNOWN_SHAPES:
                self._met.pop(next(iter(self._met)))
            bound = _Bound(self._staging, layout, None)
        bound.staging.reserve(layout)
        bound.binding = self._bind(bound.staging, layout, shape)
        return bound

    def _bind(self, staging: Staging, layout: Layout, shape: tuple[int, ...]) -> Any:
        """A session's binding of its input and outputs to a batch's memory."""
        binding = self._session.io_binding()
        binding.bind_input(INPUT, self.device, 0, np.uint8, shape, staging.device_in.address)
        for name, output in zip(self._names, layout.outputs, strict=True):
            address = staging.device_out.address + output.offset
            binding.bind_output(name, self.device, 0, np.float32, output.shape, address)
        return binding

    def _launch(self, stream: Stream, bound: _Bound) -> None:
        """Have the network run after what is queued: queued itself where the stream is shared."""
        if not self.shares_stream:
            stream.wait()
            self._session.run_with_iobinding(bound.binding)
        elif bound.graph_id == _NO_GRAPH or bound.is_captured:
            self._queue(bound, bound.graph_id)
        else:
            with GATE.capture() as may_capture:
                self._queue(bound, bound.graph_id if may_capture else _NO_GRAPH)
            bound.is_captured = may_capture

    def _queue(self, bound: _Bound, graph_id: int) -> None:
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._session.run_with_iobinding(bound.binding, options)

    def _close(self) -> None:
        self._free()
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _free(self) -> None:
        """Give back everything but the stream: captured graphs go with their session only."""
        if self._stream is not None:
            self._stream.drain()
        self._session = None
        for bound in self._kept.values():
            bound.binding = None
            bound.staging.free()
        self._kept.clear()
        self._met.clear()
        self._staging.free()


def _chain(error: BaseException) -> list[BaseException]:
    """An exception, and those that it came of."""
    found = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        following = following.__cause__ or following.__context__
    return found


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
    def _options(cls, provider: str, folder: EngineFolder, settings: EngineSettings) -> dict[str, Any]:
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
