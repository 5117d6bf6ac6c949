"""TensorRT and TensorRT-RTX plans, run through the libraries' Python bindings and cuda-bindings."""

from __future__ import annotations

import importlib
import logging
import mmap
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from packaging.version import Version

from da3_runtime.backends.base import Backend
from da3_runtime.backends.gpu.cuda import compute_capability, device_name, failure, missing
from da3_runtime.backends.gpu.plan_runner import PlanRunner
from da3_runtime.backends.gpu.rtx_kernel_cache import RuntimeCache, cache_path
from da3_runtime.errors import BackendUnavailableError, InferenceError
from da3_runtime.network_io import INPUT, RawOutputs
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.manifest import Artefact, Kind
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.extras import not_installed
from da3_runtime.variants import Graph

logger = logging.getLogger(__name__)

# The package `tensorrt_lean` is nothing but these bindings, and is on no index but its maker's.
LEAN = "tensorrt_lean_bindings"
# After how many runs of a shape the specialised kernels are saved: at the first run those that it needed
# are there, and some runs later those that the library makes meanwhile.
_SAVE_AFTER = (1, 8)


def error_log(library: Any) -> tuple[Any, list[str]]:
    """A logger for a TensorRT library, and the list in which it keeps errors and prints nothing."""
    messages: list[str] = []

    class Log(library.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            # Without a driver every call reports the CUDA call that found none, and goes on.
            harmless = "cudaError 35" in message
            if severity <= library.ILogger.Severity.ERROR and not harmless:
                messages.append(message.strip().splitlines()[0])

    return Log(), messages


class PlanBackend(Backend):
    """A serialised plan of one of the two TensorRT libraries.

    Attributes
    ----------
    kind : Kind
        The artefact it loads.
    modules : tuple[str, ...]
        Python modules that can run it, best first.
    """

    kind: ClassVar[Kind]
    modules: ClassVar[tuple[str, ...]]
    gains_from_batches = True

    def __init__(
        self,
        runner: PlanRunner,
        cache: RuntimeCache | None,
        messages: list[str],
        outputs: tuple[str, ...],
        precision: str,
        trained: bool,
    ) -> None:
        self._runner = runner
        self._cache = cache
        self._messages = messages
        self._outputs = outputs
        self.precision = precision
        self.trained = trained
        self._runs: Counter[tuple[int, ...]] = Counter()

    @classmethod
    def unavailable(cls) -> str | None:
        if cls._module() is None:
            return not_installed(cls.modules[0])
        return missing()

    @classmethod
    def load(cls, folder: EngineFolder, graph: Graph, settings: EngineSettings) -> Backend:
        artefacts = folder.artefacts(graph, cls.kind)
        library = importlib.import_module(cls._module() or cls.modules[0])
        artefact = runnable(artefacts, compute_capability(), library.__name__, library.__version__)
        path = folder.verified(artefact)
        made_for = (artefact.sha256, library.__version__, device_name())
        log, messages = error_log(library)
        try:
            engine = _deserialize(library, library.Runtime(log), path)
            _check_tensors(library, engine, graph)
            new_context, cache = cls._contexts(
                library, engine, cache_path(folder, settings, path.name, *made_for)
            )
            runner = PlanRunner(engine, graph.outputs, new_context, captures=cache is None)
        except RuntimeError as error:
            logger.warning("%s: %s", library.__name__, "; ".join(messages) or error)
            raise BackendUnavailableError(f"{library.__name__} cannot load {path.name}.") from error
        assert folder.manifest is not None
        trained = folder.manifest.trained
        return cls(runner, cache, messages, graph.outputs, artefact.precision, trained)

    @classmethod
    def _module(cls) -> str | None:
        return next((name for name in cls.modules if find_spec(name) is not None), None)

    @classmethod
    @abstractmethod
    def _contexts(
        cls, library: Any, engine: Any, cache_file: Path
    ) -> tuple[Callable[[], Any], RuntimeCache | None]:
        """What makes execution contexts, and the cache of the kernels they specialise, if they do."""

    def run(self, images: NDArray[np.uint8]) -> RawOutputs:
        self._messages.clear()
        try:
            values = self._runner.run(images)
        except (InferenceError, RuntimeError) as error:
            said = "; ".join(self._messages)
            logger.warning("%s: %s %s", self.name, error, said)
            raise failure(self.name, images.shape, error, said) from error
        if self._cache is not None:
            self._runs[images.shape] += 1
            if self._runs[images.shape] in _SAVE_AFTER:
                self._cache.save()
        return RawOutputs.of(self._outputs, values)

    def largest_batch(self, height: int, width: int) -> int:
        return self._runner.largest_batch(height, width)

    def free(self) -> None:
        self._runner.free()

    def close(self) -> None:
        if self._cache is not None:
            self._cache.save()
        self._runner.close()


class TensorRT(PlanBackend):
    """A plan for one compute capability, or for Ampere and later."""

    name = "tensorrt"
    kind = Kind.TENSORRT
    modules = ("tensorrt", LEAN)

    @classmethod
    def _contexts(
        cls, library: Any, engine: Any, cache_file: Path
    ) -> tuple[Callable[[], Any], RuntimeCache | None]:
        strategy = library.ExecutionContextAllocationStrategy.USER_MANAGED
        return lambda: engine.create_execution_context(strategy), None


class TensorRTRTX(PlanBackend):
    """A plan whose kernels are specialised for the GPU it meets; it captures CUDA graphs by itself."""

    name = "tensorrt-rtx"
    kind = Kind.TENSORRT_RTX
    modules = ("tensorrt_rtx",)

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
    """The plan of ``artefacts`` that a library can run on a GPU, one made for just that GPU first.

    Looks at what the manifest says alone: a plan that does not fit is never read.

    Parameters
    ----------
    capability : str
        The GPU's compute capability.
    module, version : str
        Python module of the library, and its version.

    Raises
    ------
    BackendUnavailableError
        Saying why each cannot run.
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
        return f"is not version-compatible, and {LEAN} runs no other"
    # A version-compatible plan too: it carries no runtime of its own, and needs that of its release.
    if Version(artefact.library) != Version(version):
        return f"was built with version {artefact.library}, and {module} {version} is installed"
    return None


def _covers(made_for: str, capability: str) -> bool:
    """Whether ``9.0``, or ``8.0+`` for that and later, covers a compute capability."""
    if made_for.endswith("+"):
        return Version(capability) >= Version(made_for[:-1])
    return capability == made_for


def _deserialize(library: Any, runtime: Any, path: Path) -> Any:
    """The engine of a plan.

    Raises
    ------
    BackendUnavailableError
        If the library says that it cannot run here.
    RuntimeError
        If it fails; why is in its log.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        if hasattr(runtime, "get_engine_validity"):
            validity, causes = runtime.get_engine_validity(plan)
            if validity == library.EngineValidity.INVALID:
                known = library.EngineInvalidityDiagnostics.__members__.items()
                names = [name for name, flag in known if causes & int(flag)]
                raise BackendUnavailableError(
                    f"{library.__name__} says that {path.name} cannot run here "
                    f"({', '.join(names) or 'no reason given'})."
                )
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError("deserialize_cuda_engine")
    return engine


def _check_tensors(library: Any, engine: Any, graph: Graph) -> None:
    """See that a plan has the tensors that its graph should have.

    Raises
    ------
    BackendUnavailableError
        If it has others.
    """
    wanted = {INPUT: library.uint8} | dict.fromkeys(graph.outputs, library.float32)
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    if {name: engine.get_tensor_dtype(name) for name in names} != wanted:
        raise BackendUnavailableError(f"The plan has other tensors than graph {graph.key}.")
