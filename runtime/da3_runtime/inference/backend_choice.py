"""Engine folder -> the best backend that this machine can run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from da3_runtime.backends import BACKENDS
from da3_runtime.backends.base import Backend
from da3_runtime.backends.eager import Eager
from da3_runtime.backends.gpu.capture_gate import GATE
from da3_runtime.backends.gpu.cuda import has_cuda_driver
from da3_runtime.errors import (
    BackendUnavailableError,
    CheckpointError,
    DA3Error,
    SettingError,
)
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.find_engine import find_engine
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.extras import is_installed
from da3_runtime.util.setting_group import AUTO
from da3_runtime.variants import Graph, check_ray_pose

logger = logging.getLogger(__name__)

UNTRAINED = "The model has random weights; its depth means nothing."
BESIDE_A_GPU = (
    "The model runs on the CPU although there is an NVIDIA GPU; the worker's log has the reasons."
)
UNTRAINED_HEAD = "The SDT head has random weights; its depth means nothing."
_logged: set[tuple[str, str]] = set()  # exceptions whose traceback is in the log: backend, text


def candidates(settings: EngineSettings) -> list[type[Backend]]:
    """The backends to try, best first.

    Raises
    ------
    SettingError
        If ``BACKEND`` is not a known backend, or does not compute in ``PRECISION``.
    """
    named, precision = settings.backend, settings.precision
    found = [cls for cls in BACKENDS if named == cls.name or (named == AUTO and cls.automatic)]
    if not found:
        known = ", ".join([AUTO, *(cls.name for cls in BACKENDS)])
        raise SettingError(f"BACKEND {named!r} is not one of: {known}.")
    precise = [cls for cls in found if precision in cls.precisions]
    if not precise:
        known = " or ".join(found[0].precisions)
        raise SettingError(f"BACKEND {named} takes PRECISION {known}, not {precision}.")
    return precise


def load_backend(settings: EngineSettings) -> Loaded:
    """Load the first backend of :data:`BACKENDS` that this machine can run.

    A backend that this machine cannot run is skipped without a warning. A backend that it could run, but
    whose artefact is missing, damaged or refused, is skipped with a warning. So is one whose library
    raises any exception when it is imported or loads the engine; the log has the traceback. If
    ``BACKEND`` names a backend, only that one is tried.

    Raises
    ------
    SettingError
        As :func:`candidates`, or if ``RAY_POSE`` is set and the network has no ray branch.
    ManifestError
        If the engine's manifest is damaged.
    BackendUnavailableError
        If no backend can run; the message has the reason of each.
    CheckpointError
        If only eager is left and its weights are missing.
    """
    backends = candidates(settings)
    folder, warnings = find_engine(settings)
    if settings.ray_pose:
        check_ray_pose(folder.variant, folder.head)
    wanted = folder.variant.graphs_for(settings.ray_pose)
    reasons: list[str] = []
    failure: DA3Error | None = None
    graphs: dict[str, Backend] = {}
    for cls in backends:
        failure = None
        try:
            reason = cls.unavailable()
            graphs = _load(cls, folder, wanted, settings) if reason is None else {}
        except DA3Error as error:
            failure, reason = error, str(error).rstrip(".")
            if folder.manifest is not None:
                warnings.append(f"{cls.name} was skipped: {reason}.")
                logger.warning("%s skipped for %s: %s", cls.name, folder.path, reason)
        except Exception as error:
            reason = f"it failed with {type(error).__name__}, see the log"
            warnings.append(f"{cls.name} was skipped: {reason}.")
            _log_once(cls, error)
        if graphs:
            if issubclass(cls, Eager) and settings.backend == AUTO:
                warnings.append("No engine could be used; PyTorch eager ran instead.")
                logger.warning("no engine could be used for %s; using eager", folder.path)
            warnings += _untrained(folder, graphs)
            is_chosen = settings.backend == settings.precision == AUTO
            if cls.on_cpu and is_chosen and has_cuda_driver():
                warnings.append(BESIDE_A_GPU)
                logger.warning("the model runs on the CPU beside an NVIDIA GPU (%s)", "; ".join(reasons))
            return Loaded(folder, graphs, warnings)
        reasons.append(f"{cls.name}: {reason}")
        logger.info("%s: %s", cls.name, reason)
    if isinstance(failure, CheckpointError):
        *others, _ = reasons
        if not others:
            raise failure
        raise CheckpointError(
            f"No engine of {folder.variant.model_id} with head {folder.head} can run here "
            f"({'; '.join(others)}), and PyTorch eager has no weights: {failure}"
        )
    if not any(map(is_installed, ("onnxruntime", "torch", "tensorrt", "tensorrt_lean", "tensorrt_rtx"))):
        raise BackendUnavailableError(
            f"No installed package can run {folder.variant.model_id}: "
            'pip install "da3-runtime[cpu]" for its engine, or "da3-runtime[eager]" for its checkpoint.'
        )
    raise BackendUnavailableError(
        f"No backend can run {folder.variant.model_id} with head {folder.head} here "
        f"({'; '.join(reasons)})."
    )


def _load(
    cls: type[Backend], folder: EngineFolder, wanted: Sequence[Graph], settings: EngineSettings
) -> dict[str, Backend]:
    """All graphs on one backend; if one fails, the others are closed again."""
    graphs: dict[str, Backend] = {}
    with GATE.use():
        try:
            for graph in wanted:
                graphs[graph.name] = cls.load(folder, graph, settings)
        except BaseException:
            for loaded in graphs.values():
                loaded.close()
            raise
    return graphs


def _log_once(cls: type[Backend], error: Exception) -> None:
    """Log an unexpected exception of a backend; its traceback only the first time."""
    failure = (cls.name, repr(error))
    is_known = failure in _logged
    _logged.add(failure)
    logger.warning("%s failed: %r", *failure, exc_info=None if is_known else error)


def _untrained(folder: EngineFolder, graphs: dict[str, Backend]) -> list[str]:
    """The warning about random weights, if there are any."""
    if all(graph.trained for graph in graphs.values()):
        return []
    only_head = folder.manifest is not None and folder.manifest.source.trained
    return [UNTRAINED_HEAD if only_head else UNTRAINED]
