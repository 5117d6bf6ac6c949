"""Runs ONNX files with ONNX Runtime: the base class of its backends, and the CPU backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from da3_runtime.backends.base import Backend, tokens_of
from da3_runtime.errors import BackendUnavailableError, InferenceError
from da3_runtime.network.sizes import SIZES
from da3_runtime.network_io import Conditions, RawOutputs, inputs_of
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.manifest import GraphEntry, Kind
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.extras import missing_package
from da3_runtime.util.setting_group import AUTO
from da3_runtime.variants import Graph, Series

# Opens a session; the argument is options to add to those of its first provider.
OpenSession = Callable[[dict[str, Any]], Any]
# Memory of the attention scores of one scene: da3-nano runs 11 views of 504 x 504, da3-giant 5.
_MOST_SCORE_BYTES = 4 * 2**30
_LOG_FATAL_ONLY = 4  # log_severity_level: errors are raised as exceptions anyway


class OnnxRuntimeBackend(Backend):
    """An ONNX Runtime session over one of the folder's ONNX files.

    Parameters
    ----------
    open_session : OpenSession
        Function that opens the session.
    entry : GraphEntry
        The graph's inputs and outputs.

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
        self, open_session: OpenSession, entry: GraphEntry, precision: str, trained: bool
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
        return cls.load_kind(cls.kind_in(folder, graph, settings), folder, graph, settings)

    @classmethod
    def load_kind(
        cls, kind: Kind, folder: EngineFolder, graph: Graph, settings: EngineSettings
    ) -> Backend:
        """Load the graph's artefact of a kind; raises as :meth:`load`."""
        path = folder.artefact(graph, kind)
        assert folder.manifest is not None
        entry = folder.manifest.graphs[graph.key]
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        options.log_severity_level = _LOG_FATAL_ONLY
        # Threads that wait in a loop take the cores on which other photos are decoded and encoded.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if cls.on_cpu:
            # Weights stay in the mapped file, not in copies packed for products. That halves the time of
            # a load (da3-small) and takes as long to run: products of photos have many rows.
            options.add_session_config_entry("session.disable_prepacking", "1")
        first, *others = ((name, cls._options(name, folder, entry, settings)) for name in cls.providers)

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

        artefact = entry.artefacts[kind]
        backend = cls(open_session, entry, artefact.precision, folder.manifest.trained)
        backend.artefact = artefact
        if cls.runs_artefact:
            backend.parity = artefact.parity
        return backend

    @classmethod
    def kind_in(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Kind:
        """Kind of the artefact to load from ``folder``."""
        return cls.kind

    @classmethod
    def _options(
        cls, provider: str, folder: EngineFolder, entry: GraphEntry, settings: EngineSettings
    ) -> dict[str, Any]:
        """Options of one of :attr:`providers`."""
        return {}


class OnnxRuntimeCpu(OnnxRuntimeBackend):
    """Runs FP32 on the CPU: FP16 would gain nothing, as there are no CPU kernels for it.

    With ``PRECISION=int8`` it runs the artefact whose matrix products are in INT8.
    """

    name = "onnxruntime-cpu"
    on_cpu = True
    kind = Kind.ONNX_FP32
    precisions = (AUTO, "int8")
    providers = ("CPUExecutionProvider",)
    extra = "cpu"
    _heads = 1

    @classmethod
    def kind_in(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Kind:
        return Kind.ONNX_INT8 if settings.precision == "int8" else cls.kind

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Backend:
        backend = super().load(folder, graph, settings)
        assert isinstance(backend, OnnxRuntimeCpu)
        if graph.series is Series.ANYVIEW:
            backend._heads = SIZES[graph.config].heads
        return backend

    def __init__(
        self, open_session: OpenSession, entry: GraphEntry, precision: str, trained: bool
    ) -> None:
        super().__init__(open_session, entry, precision, trained)
        self._session: Any = open_session({})
        self._inputs = tuple(spec.name for spec in entry.inputs)
        self._outputs = tuple(spec.name for spec in entry.outputs)

    def run(self, images: NDArray[np.uint8], conditions: Conditions | None = None) -> RawOutputs:
        try:
            values = self._session.run(self._outputs, inputs_of(self._inputs, images, conditions))
        except Exception as error:
            raise InferenceError(
                f"{self.name} failed on a batch of shape {list(images.shape)}."
            ) from error
        return RawOutputs.of(self._outputs, values)

    def largest_batch(self, views: int, height: int, width: int) -> int:
        # Its attention stores the scores of all pairs of tokens, FP32, for one scene after the other.
        scores = 4 * self._heads * (views * tokens_of(height, width)) ** 2
        return super().largest_batch(views, height, width) if scores <= _MOST_SCORE_BYTES else 0

    def close(self) -> None:
        self._session = None
