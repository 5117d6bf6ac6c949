"""Runs ONNX files on an NVIDIA GPU with ONNX Runtime's CUDA provider or its TensorRT provider.

A batch is one copy to the device, the network, and one copy back. With the CUDA provider all three run
on one stream. The second batch of a shape is captured as a CUDA graph and later ones replay it, which
saves about a thousand kernel launches: da3-large at 504 x 504 takes 8.6 ms instead of 10.4 on an H200.

ONNX Runtime ties a captured graph to the thread that ran it and frees it only with its session. So each
backend has its own thread, and captures at most :data:`MAX_SHAPES` shapes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from packaging.version import Version

from da3_runtime.backends.base import MAX_SHAPES, Backend
from da3_runtime.backends.gpu.capture_gate import GATE
from da3_runtime.backends.gpu.cuda import Stream, cuda_missing, failure
from da3_runtime.backends.gpu.rtx_kernel_cache import cache_path
from da3_runtime.backends.gpu.staging import Layout, Staging, lay_out, tensors_of
from da3_runtime.backends.onnxruntime import OnnxRuntimeBackend, OpenSession
from da3_runtime.errors import BackendUnavailableError, InferenceError, OutOfMemoryError
from da3_runtime.network_io import IMAGES, Conditions, RawOutputs, inputs_of, shapes_of
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.manifest import GraphEntry, Kind
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.extras import missing_package
from da3_runtime.variants import Graph

logger = logging.getLogger(__name__)

# In earlier releases a replayed graph reads the addresses of a Concat's inputs from memory that later
# runs overwrite: wrong depth without an error (onnxruntime pull request 32121: in 1.31.1, not in 1.26).
GRAPHS_FROM = Version("1.31")
_CANNOT_CAPTURE = "graph capture"  # part of the error for a graph with nodes that run on the CPU
_NO_GRAPH = -1  # gpu_graph_id: run without capturing
_MAX_SHAPES_SEEN = 64  # how many shapes without a graph are remembered, so that their return is noticed


def captures_graphs() -> bool:
    """Whether the installed ONNX Runtime replays CUDA graphs correctly."""
    import onnxruntime

    return Version(onnxruntime.__version__) >= GRAPHS_FROM


@dataclass
class _Bound:
    """A batch shape ready to run: its memory, bound to the session, and its CUDA graph."""

    staging: Staging
    layout: Layout
    binding: Any
    graph_id: int = _NO_GRAPH
    is_captured: bool = False


class OnnxRuntimeCuda(OnnxRuntimeBackend):
    """Runs FP16 on an NVIDIA GPU with the CUDA provider.

    Attributes
    ----------
    shares_stream : bool
        Whether the provider runs on the backend's stream, and can capture CUDA graphs.
    device : str
        Device of the memory bound to inputs and outputs.
    cuda_options : dict[str, str]
        Options of the CUDA provider.
    """

    name = "onnxruntime-cuda"
    kind = Kind.ONNX_FP16  # of engines without ONNX_FP16_ORT, which earlier releases built
    gains_from_batches = True
    providers: ClassVar[tuple[str, ...]] = ("CUDAExecutionProvider",)
    extra = "gpu"
    shares_stream: ClassVar[bool] = True
    device: ClassVar[str] = "cuda"
    cuda_options: ClassVar[dict[str, str]] = {
        # Grow by the requested size, not to the next power of two: other models share the GPU.
        "arena_extend_strategy": "kSameAsRequested",
        # The default tries every convolution algorithm for each new shape: 0.7 s on an H200 instead
        # of 0.2 s, and the result is not faster (da3-large: 9.2 ms instead of 8.6).
        "cudnn_conv_algo_search": "HEURISTIC",
        # Sum in FP32 in SkipLayerNormalization, in two passes. Releases before mid-2026 sum in FP16
        # otherwise, later ones in FP32 in one pass (onnxruntime pull request 28682). Never timed.
        "enable_skip_layer_norm_strict_mode": "1",
        # Whether convolutions run with their channels last, which may save layout changes. Never run.
        "prefer_nhwc": "0",
    }

    def __init__(
        self, open_session: OpenSession, entry: GraphEntry, precision: str, trained: bool
    ) -> None:
        super().__init__(open_session, entry, precision, trained)
        self._open_session = open_session
        self._inputs, self._outputs = entry.inputs, entry.outputs
        self._names = tuple(spec.name for spec in entry.outputs)
        self._staging = Staging()
        # Shapes that ran without a graph, oldest first, and shapes with a graph or about to be captured.
        self._seen: dict[tuple[int, ...], None] = {}
        self._recurring: dict[tuple[int, ...], _Bound] = {}
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
        # Without a GPU the library need not be imported, and its failure to import is no news.
        return (
            missing_package("onnxruntime", cls.extra) or cuda_missing(cls.extra) or super().unavailable()
        )

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Backend:
        import onnxruntime

        if hasattr(onnxruntime, "preload_dlls"):
            # Loads CUDA's libraries if they are installed as Python packages.
            with contextlib.redirect_stdout(io.StringIO()):
                onnxruntime.preload_dlls()
        kind = cls.kind_in(folder, graph, settings)
        try:
            return cls.load_kind(kind, folder, graph, settings)
        except BackendUnavailableError as error:
            if kind is cls.kind:
                raise
            # A release of ONNX Runtime may lack one of the fused operators.
            logger.warning("%s: %s; loading %s instead", cls.name, error, cls.kind)
            return cls.load_kind(cls.kind, folder, graph, settings)

    @classmethod
    def kind_in(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Kind:
        entry = folder.manifest.graphs.get(graph.key) if folder.manifest else None
        has_fused = cls.runs_artefact and entry is not None and entry.of_kind(Kind.ONNX_FP16_ORT)
        return Kind.ONNX_FP16_ORT if has_fused else cls.kind

    @classmethod
    def _options(
        cls, provider: str, folder: EngineFolder, entry: GraphEntry, settings: EngineSettings
    ) -> dict[str, Any]:
        return dict(cls.cuda_options)

    def run(self, images: NDArray[np.uint8], conditions: Conditions | None = None) -> RawOutputs:
        inputs = inputs_of((spec.name for spec in self._inputs), images, conditions)
        try:
            values = self._thread.submit(self._run_on_thread, inputs)
        except RuntimeError as error:
            raise InferenceError("The engine has been unloaded.") from error
        return RawOutputs.of(self._names, values.result())

    def free(self) -> None:
        self._thread.submit(self._free).result()

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # already closed
            self._thread.submit(self._close).result()
        self._thread.shutdown()

    # Everything below runs on the backend's thread.

    def _run_on_thread(self, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run a batch, and turn any exception into the error to report."""
        assert self._stream is not None
        try:
            return self._run(self._stream, inputs)
        except Exception as error:
            chain = _chain(error)
            causes = " ".join(map(str, chain[1:]))
            logger.warning("%s: %s %s", self.name, error, causes)
            reported = failure(self.name, inputs[IMAGES].shape, error, causes)
            # Frames in a traceback refer to the session, which would keep its GPU memory.
            for each in chain:
                traceback.clear_frames(each.__traceback__)
            # A lost GPU frees nothing, and trying to may end the process.
            if isinstance(reported, OutOfMemoryError):
                self._free()
            raise reported from error

    def _run(self, stream: Stream, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        if self._session is None:
            self._open(stream)
        bound = self._bound(inputs[IMAGES].shape)
        bound.staging.put(bound.layout, inputs.values())
        bound.staging.upload(stream, bound.layout)
        self._launch(stream, bound)
        bound.staging.download(stream, bound.layout)
        stream.wait()
        return bound.staging.take(bound.layout.outputs)

    def _open(self, stream: Stream) -> None:
        """Open the session; without CUDA graphs if some node of the network runs on the CPU."""
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
        """A shape's memory and binding: its own from the second batch on, for the graph."""
        bound = self._recurring.get(shape)
        if bound is not None:
            return bound
        layout = lay_out(*(tensors_of(specs, shape) for specs in (self._inputs, self._outputs)))
        recurs = shape in self._seen
        self._seen.pop(shape, None)
        if self._captures and recurs and len(self._recurring) < MAX_SHAPES:
            bound = _Bound(Staging(), layout, None, graph_id=len(self._recurring))
            self._recurring[shape] = bound
        else:
            self._seen[shape] = None
            if len(self._seen) > _MAX_SHAPES_SEEN:
                self._seen.pop(next(iter(self._seen)))
            bound = _Bound(self._staging, layout, None)
        bound.staging.reserve(layout)
        bound.binding = self._bind(bound.staging, layout)
        return bound

    def _bind(self, staging: Staging, layout: Layout) -> Any:
        """Bind the session's inputs and outputs to a batch's device memory."""
        binding = self._session.io_binding()
        for spec, tensor in zip(self._inputs, layout.inputs, strict=True):
            address = staging.device_in.address + tensor.offset
            binding.bind_input(spec.name, self.device, 0, tensor.dtype.type, tensor.shape, address)
        for name, tensor in zip(self._names, layout.outputs, strict=True):
            address = staging.device_out.address + tensor.offset
            binding.bind_output(name, self.device, 0, tensor.dtype.type, tensor.shape, address)
        return binding

    def _launch(self, stream: Stream, bound: _Bound) -> None:
        """Run the network after the work on the stream; on a shared stream it is only queued."""
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
        """Release everything but the stream. Captured graphs are freed only with their session."""
        if self._stream is not None:
            self._stream.drain()
        self._session = None
        for bound in self._recurring.values():
            bound.binding = None
            bound.staging.free()
        self._recurring.clear()
        self._seen.clear()
        self._staging.free()


def _chain(error: BaseException) -> list[BaseException]:
    """An exception and its causes, outermost first."""
    found = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


class OnnxRuntimeTensorRT(OnnxRuntimeCuda):
    """Runs FP16 with ONNX Runtime's TensorRT provider, which takes minutes to build a plan at load.

    It is tried only if ``BACKEND`` names it, and needs an ONNX Runtime built for the installed TensorRT.
    The plan is stored in the folder of the runtime caches.
    """

    name = "onnxruntime-tensorrt"
    providers = ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    automatic = False
    shares_stream = False
    runs_artefact = False

    def largest_batch(self, views: int, height: int, width: int) -> int:
        return int(views == 1)  # the provider builds one profile, for single photos

    @classmethod
    def _options(
        cls, provider: str, folder: EngineFolder, entry: GraphEntry, settings: EngineSettings
    ) -> dict[str, Any]:
        if provider != cls.providers[0]:
            return super()._options(provider, folder, entry, settings)
        assert folder.manifest is not None
        single = folder.manifest.profiles[0]
        sizes = {"min": single.minimum, "opt": single.optimum, "max": single.maximum}
        shapes = {
            f"trt_profile_{name}_shapes": ",".join(
                f"{spec.name}:{'x'.join(map(str, shape))}"
                for spec, shape in zip(entry.inputs, shapes_of(entry.inputs, size), strict=True)
            )
            for name, size in sizes.items()
        }
        cache = cache_path(folder, settings, "onnxruntime-tensorrt").parent
        return shapes | {
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(cache),
        }
