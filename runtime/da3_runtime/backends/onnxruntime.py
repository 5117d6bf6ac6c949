"""Runs ONNX files with ONNX Runtime: the base class of its backends, and the CPU backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from da3_runtime.backends.base import Backend
from da3_runtime.errors import BackendUnavailableError, InferenceError
from da3_runtime.network_io import INPUT, RawOutputs, TensorSpec
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.manifest import Kind
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.extras import missing_package
from da3_runtime.variants import Graph

# Opens a session; the argument is options to add to those of its first provider.
OpenSession = Callable[[dict[str, Any]], Any]
_LOG_FATAL_ONLY = 4  # log_severity_level: errors are raised as exceptions anyway


class OnnxRuntimeBackend(Backend):
    """An ONNX Runtime session over one of the folder's ONNX files.

    Parameters
    ----------
    open_session : OpenSession
        Function that opens the session.
    outputs : list[TensorSpec]
        The graph's outputs.

    Attributes
    ----------
    kind : Kind
        Kind of the artefact to load.
    providers : tuple[str, ...]
        Execution providers; the session is refused if the first one does not start.
    extra : str
        Extra of ``da3-runtime`` that installs ONNX Runtime with the provider.
    runs_artefact : bool
        Whether the artefact itself runs, not a plan that the provider makes of it.
    """

    kind: ClassVar[Kind]
    providers: ClassVar[tuple[str, ...]]
    extra: ClassVar[str]
    runs_artefact: ClassVar[bool] = True

    def __init__(
        self, open_session: OpenSession, outputs: list[TensorSpec], precision: str, trained: bool
    ) -> None:
        self.precision = precision
        self.trained = trained

    @classmethod
    def unavailable(cls) -> str | None:
        reason = missing_package("onnxruntime", cls.extra)
        if reason is not None:
            return reason
        import onnxruntime

        if cls.providers[0] not in onnxruntime.get_available_providers():
            return f"the installed onnxruntime lacks {cls.providers[0]}"
        return None

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Backend:
        path = folder.artefact(graph, cls.kind)
        assert folder.manifest is not None
        entry = folder.manifest.graphs[graph.key]
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        options.log_severity_level = _LOG_FATAL_ONLY
        first, *others = ((name, cls._options(name, folder, settings)) for name in cls.providers)

        def open_session(more: dict[str, Any]) -> Any:
            providers = [(first[0], first[1] | more), *others]
            try:
                # ONNX Runtime's own fallback prints, opens the session on the CPU and hides the error.
                session = onnxruntime.InferenceSession(
                    path, options, providers=providers, enable_fallback=0
                )
            except Exception as error:
                # ONNX Runtime's exceptions share no public base class.
                raise BackendUnavailableError(f"ONNX Runtime cannot load {path.name}.") from error
            if session.get_providers()[0] != cls.providers[0]:
                raise BackendUnavailableError(f"{cls.providers[0]} does not start on this machine.")
            return session

        artefact = entry.artefacts[cls.kind]
        backend = cls(open_session, entry.outputs, artefact.precision, folder.manifest.trained)
        if cls.runs_artefact:
            backend.parity = artefact.parity
        return backend

    @classmethod
    def _options(cls, provider: str, folder: EngineFolder, settings: EngineSettings) -> dict[str, Any]:
        """Options of one of :attr:`providers`."""
        return {}


class OnnxRuntimeCpu(OnnxRuntimeBackend):
    """Runs FP32 on the CPU: half precision would gain nothing, as CPUs lack FP16 arithmetic."""

    name = "onnxruntime-cpu"
    on_cpu = True
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
