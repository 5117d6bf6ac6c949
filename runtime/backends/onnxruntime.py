"""ONNX Runtime on CUDA and on the CPU."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import Backend, EngineFolder, RawOutputs
from runtime.errors import BackendUnavailableError, InferenceError
from runtime.manifest import Kind
from runtime.settings import Settings
from runtime.variants import Graph


class OnnxRuntimeBackend(Backend):
    """An ONNX Runtime session over one of the folder's ONNX files.

    Attributes
    ----------
    kind : Kind
        The artefact it loads.
    provider : str
        The execution provider it must get.
    """

    kind: ClassVar[Kind]
    provider: ClassVar[str]

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

        if cls.provider not in onnxruntime.get_available_providers():
            return f"this onnxruntime has no {cls.provider}"
        return None

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: Settings) -> Backend:
        path = folder.artefact(graph, cls.kind)
        assert folder.manifest is not None
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(path, options, providers=[cls.provider])
        except Exception as error:
            # ONNX Runtime's exceptions share no public base class.
            raise BackendUnavailableError(f"ONNX Runtime cannot load {path.name}.") from error
        if session.get_providers()[0] != cls.provider:
            raise BackendUnavailableError(f"{cls.provider} cannot be started on this machine.")
        artefact = folder.manifest.graphs[graph.key].artefacts[cls.kind]
        return cls(session, graph.outputs, artefact.precision, folder.manifest.trained)

    def run(self, images: NDArray[np.uint8]) -> RawOutputs:
        try:
            values = self._session.run(self._outputs, {"images": images})
            return RawOutputs.of(self._outputs, values)
        except Exception as error:
            raise InferenceError(
                f"{self.name} failed on a batch of shape {list(images.shape)}."
            ) from error


class OnnxRuntimeCuda(OnnxRuntimeBackend):
    """FP16 on an NVIDIA GPU."""

    name = "onnxruntime-cuda"
    kind = Kind.ONNX_FP16
    provider = "CUDAExecutionProvider"


class OnnxRuntimeCpu(OnnxRuntimeBackend):
    """FP32 on the CPU, which has no FP16 arithmetic to gain from."""

    name = "onnxruntime-cpu"
    kind = Kind.ONNX_FP32
    provider = "CPUExecutionProvider"
