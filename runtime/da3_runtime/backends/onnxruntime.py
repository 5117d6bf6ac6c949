"""ONNX Runtime: what its backends share, and the one for the CPU."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from da3_runtime.backends.base import Backend
from da3_runtime.errors import BackendUnavailableError, InferenceError
from da3_runtime.network_io import INPUT, RawOutputs, TensorSpec
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.manifest import Kind
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.extras import not_installed
from da3_runtime.variants import Graph

# Opens a session, with options for its first provider added to its own.
OpenSession = Callable[[dict[str, Any]], Any]
_ERRORS_ARE_RAISED = 4  # log_severity_level: what is fatal only


class OnnxRuntimeBackend(Backend):
    """An ONNX Runtime session over one of the folder's ONNX files.

    Parameters
    ----------
    open_session : OpenSession
        Opens the session.
    outputs : list[TensorSpec]
        The graph's outputs.

    Attributes
    ----------
    kind : Kind
        The artefact it loads.
    providers : tuple[str, ...]
        Execution providers, the one it must get first.
    extra : str
        The extra of da3-runtime that installs an ONNX Runtime with these providers.
    """

    kind: ClassVar[Kind]
    providers: ClassVar[tuple[str, ...]]
    extra: ClassVar[str] = "gpu"

    def __init__(
        self, open_session: OpenSession, outputs: list[TensorSpec], precision: str, trained: bool
    ) -> None:
        self.precision = precision
        self.trained = trained

    @classmethod
    def unavailable(cls) -> str | None:
        if find_spec("onnxruntime") is None:
            return not_installed("onnxruntime", cls.extra)
        import onnxruntime

        if cls.providers[0] not in onnxruntime.get_available_providers():
            return f"this onnxruntime has no {cls.providers[0]}"
        return None

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Backend:
        path = folder.artefact(graph, cls.kind)
        assert folder.manifest is not None
        entry = folder.manifest.graphs[graph.key]
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        options.log_severity_level = _ERRORS_ARE_RAISED
        first, *others = ((name, cls._options(name, folder, settings)) for name in cls.providers)

        def open_session(more: dict[str, Any]) -> Any:
            providers = [(first[0], first[1] | more), *others]
            try:
                # Its own fallback prints, opens it again on the CPU, and keeps what failed to itself.
                session = onnxruntime.InferenceSession(
                    path, options, providers=providers, enable_fallback=0
                )
            except Exception as error:
                # ONNX Runtime's exceptions share no public base class.
                raise BackendUnavailableError(f"ONNX Runtime cannot load {path.name}.") from error
            if session.get_providers()[0] != cls.providers[0]:
                raise BackendUnavailableError(f"{cls.providers[0]} cannot be started on this machine.")
            return session

        precision = entry.artefacts[cls.kind].precision
        return cls(open_session, entry.outputs, precision, folder.manifest.trained)

    @classmethod
    def _options(cls, provider: str, folder: EngineFolder, settings: EngineSettings) -> dict[str, Any]:
        """Options of one of its providers."""
        return {}


class OnnxRuntimeCpu(OnnxRuntimeBackend):
    """FP32 on the CPU, which has no FP16 arithmetic to gain from."""

    name = "onnxruntime-cpu"
    kind = Kind.ONNX_FP32
    providers = ("CPUExecutionProvider",)
    extra = "cpu"

    def __init__(
        self, open_session: OpenSession, outputs: list[TensorSpec], precision: str, trained: bool
    ) -> None:
        super().__init__(open_session, outputs, precision, trained)
        self._session: Any = open_session({})
        self._outputs = tuple(spec.name for spec in outputs)

    def run(self, images: NDArray[np.uint8]) -> RawOutputs:
        try:
            values = self._session.run(self._outputs, {INPUT: images})
        except Exception as error:
            raise InferenceError(
                f"{self.name} failed on a batch of shape {list(images.shape)}."
            ) from error
        return RawOutputs.of(self._outputs, values)

    def close(self) -> None:
        self._session = None
