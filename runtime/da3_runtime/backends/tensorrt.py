"""Loads and runs TensorRT and TensorRT-RTX plans through the libraries' Python bindings."""

from __future__ import annotations

import importlib
import logging
import mmap
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from packaging.version import Version

from da3_runtime.backends.base import Backend
from da3_runtime.backends.gpu.cuda import compute_capability, cuda_missing, device_name, failure
from da3_runtime.backends.gpu.plan_runner import PlanRunner
from da3_runtime.backends.gpu.rtx_kernel_cache import RuntimeCache, cache_path
from da3_runtime.errors import BackendUnavailableError, InferenceError
from da3_runtime.network_io import Conditions, RawOutputs, inputs_of
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.manifest import Artefact, GraphEntry, Kind
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.extras import is_installed, missing_package
from da3_runtime.variants import Graph

logger = logging.getLogger(__name__)

# The package `tensorrt_lean` only wraps these bindings, and only NVIDIA's own index has it.
LEAN = "tensorrt_lean_bindings"
# The specialized kernels are saved after this many runs of a shape: after the first run the cache holds
# the kernels that the run needed; some runs later also those that the library compiles in the
# background.
_SAVE_AFTER = (1, 8)


def error_log(library: Any) -> tuple[Any, list[str]]:
    """A logger for a TensorRT library that prints nothing, and the list to which it adds each error."""
    messages: list[str] = []

    class Log(library.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            # CUDA error 35, no driver: without a driver every call reports it and continues.
            harmless = "cudaError 35" in message
            if severity <= library.ILogger.Severity.ERROR and not harmless:
                messages.append(message.strip().splitlines()[0])

    return Log(), messages


class PlanBackend(Backend):
    """A serialised plan of one of the two TensorRT libraries.

    Attributes
    ----------
    kind : Kind
        Kind of the artefact to load.
    modules : tuple[str, ...]
        Python modules that can run it, best first.
    extra : str
        Extra of ``da3-runtime`` that installs one of the modules.
    """

    kind: ClassVar[Kind]
    modules: ClassVar[tuple[str, ...]]
    extra: ClassVar[str]
    gains_from_batches = True

    def __init__(
        self,
        runner: PlanRunner,
        cache: RuntimeCache | None,
        messages: list[str],
        entry: GraphEntry,
        precision: str,
        trained: bool,
    ) -> None:
        self._runner = runner
        self._cache = cache
        self._messages = messages
        self._inputs = [spec.name for spec in entry.inputs]
        self._outputs = [spec.name for spec in entry.outputs]
        self.precision = precision
        self.trained = trained
        self._runs: Counter[tuple[int, ...]] = Counter()

    @classmethod
    def unavailable(cls) -> str | None:
        if cls._module() is None:
            return missing_package(cls.modules[0], cls.extra)
        return cuda_missing(cls.extra)

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Backend:
        artefacts = folder.artefacts(graph, cls.kind)
        assert folder.manifest is not None
        entry = folder.manifest.graphs[graph.key]
        library = importlib.import_module(cls._module() or cls.modules[0])
        artefact = runnable(artefacts, compute_capability(), library.__name__, library.__version__)
        path = folder.verified(artefact)
        made_for = (artefact.digest, library.__version__, device_name())
        log, messages = error_log(library)
        try:
            engine = _deserialize(library, library.Runtime(log), path)
            _check_tensors(library, engine, graph, entry)
            new_context, cache = cls._contexts(
                library, engine, cache_path(folder, settings, path.name, *made_for)
            )
            runner = PlanRunner(engine, entry.inputs, entry.outputs, new_context, captures=cache is None)
        except RuntimeError as error:
            logger.warning("%s: %s", library.__name__, "; ".join(messages) or error)
            raise BackendUnavailableError(f"{library.__name__} cannot load {path.name}.") from error
        trained = folder.manifest.trained
        backend = cls(runner, cache, messages, entry, artefact.precision, trained)
        backend.artefact, backend.parity = artefact, artefact.parity
        return backend

    @classmethod
    def _module(cls) -> str | None:
        return next(filter(is_installed, cls.modules), None)

    @classmethod
    @abstractmethod
    def _contexts(
        cls, library: Any, engine: Any, cache_file: Path
    ) -> tuple[Callable[[], Any], RuntimeCache | None]:
        """A function that creates execution contexts, and their kernel cache if they have one."""

    def run(self, images: NDArray[np.uint8], conditions: Conditions | None = None) -> RawOutputs:
        self._messages.clear()
        try:
            values = self._runner.run(inputs_of(self._inputs, images, conditions))
        except (InferenceError, RuntimeError) as error:
            log_text = "; ".join(self._messages)
            logger.warning("%s: %s %s", self.name, error, log_text)
            raise failure(self.name, images.shape, error, log_text) from error
        if self._cache is not None:
            self._runs[images.shape] += 1
            if self._runs[images.shape] in _SAVE_AFTER:
                self._cache.save()
        return RawOutputs.of(self._outputs, values)

    def largest_batch(self, views: int, height: int, width: int) -> int:
        return self._runner.largest_batch(views, height, width)

    def free(self) -> None:
        self._runner.free()

    def close(self) -> None:
        if self._cache is not None:
            self._cache.save()
        self._runner.close()


class TensorRT(PlanBackend):
    """Runs a TensorRT plan, built for one compute capability or for Ampere and later."""

    name = "tensorrt"
    kind = Kind.TENSORRT
    modules = ("tensorrt", LEAN)
    extra = "tensorrt-lean"

    @classmethod
    def _contexts(
        cls, library: Any, engine: Any, cache_file: Path
    ) -> tuple[Callable[[], Any], RuntimeCache | None]:
        strategy = library.ExecutionContextAllocationStrategy.USER_MANAGED
        return lambda: engine.create_execution_context(strategy), None


class TensorRTRTX(PlanBackend):
    """Runs a TensorRT-RTX plan; the library specializes its kernels and captures CUDA graphs itself."""

    name = "tensorrt-rtx"
    kind = Kind.TENSORRT_RTX
    modules = ("tensorrt_rtx",)
    extra = "tensorrt-rtx"

    @classmethod
    def _contexts(
        cls, library: Any, engine: Any, cache_file: Path
    ) -> tuple[Callable[[], Any], RuntimeCache | None]:
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            library.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        cache = RuntimeCache(config, cache_file)
        return lambda: engine.create_execution_context(config), cache


def runnable(artefacts: Sequence[Artefact], capability: str, module: str, version: str) -> Artefact:
    """The plan that a library can run on a GPU; a plan built only for that GPU is preferred.

    Only the manifest's facts decide, so the file of an unsuitable plan is never read.

    Parameters
    ----------
    capability : str
        The GPU's compute capability.
    module, version : str
        The library's Python module and version.

    Raises
    ------
    BackendUnavailableError
        If no plan can run; the message has the reason for each.
    """
    by_fit = sorted(artefacts, key=lambda each: capability not in each.compute_capabilities)
    reasons = []
    for artefact in by_fit:
        reason = _misfit(artefact, capability, module, version)
        if reason is None:
            return artefact
        reasons.append(f"{artefact.files[0].name} {reason}")
    raise BackendUnavailableError("; ".join(reasons))


def _misfit(artefact: Artefact, capability: str, module: str, version: str) -> str | None:
    if not any(_covers(one, capability) for one in artefact.compute_capabilities):
        made_for = ", ".join(artefact.compute_capabilities)
        return f"is for compute capability {made_for}, and this GPU has {capability}"
    if module == LEAN and not artefact.version_compatible:
        return f"is not version-compatible, and {LEAN} runs only version-compatible plans"
    # Version-compatible plans too: they are built without a runtime inside and need that of their
    # release.
    if Version(artefact.library) != Version(version):
        return f"was built with version {artefact.library}, and {module} {version} is installed"
    return None


def _covers(made_for: str, capability: str) -> bool:
    """Whether ``made_for``, such as ``9.0`` or ``8.0+`` (8.0 and later), includes ``capability``."""
    if made_for.endswith("+"):
        return Version(capability) >= Version(made_for[:-1])
    return capability == made_for


def _deserialize(library: Any, runtime: Any, path: Path) -> Any:
    """Deserialize the plan in a file.

    Raises
    ------
    BackendUnavailableError
        If the library reports that the plan cannot run on this machine.
    RuntimeError
        If deserialization fails; the library's log has the reason.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        if hasattr(runtime, "get_engine_validity"):
            validity, causes = runtime.get_engine_validity(plan)
            if validity == library.EngineValidity.INVALID:
                known = library.EngineInvalidityDiagnostics.__members__.items()
                names = [name for name, flag in known if causes & int(flag)]
                raise BackendUnavailableError(
                    f"{library.__name__} reports that {path.name} cannot run here "
                    f"({', '.join(names) or 'no reason given'})."
                )
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError("deserialize_cuda_engine")
    return engine


def _check_tensors(library: Any, engine: Any, graph: Graph, entry: GraphEntry) -> None:
    """Check that a plan's inputs and outputs are those of its graph.

    Raises
    ------
    BackendUnavailableError
        If a name or a dtype differs.
    """
    dtypes = {"uint8": library.uint8, "int64": library.int64, "float32": library.float32}
    expected = {spec.name: dtypes[spec.dtype] for spec in (*entry.inputs, *entry.outputs)}
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    if {name: engine.get_tensor_dtype(name) for name in names} != expected:
        raise BackendUnavailableError(
            f"The plan's inputs and outputs are not those of graph {graph.key}; build the engine again."
        )
