"""Engine folder -> the best backend that this machine can run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec

from da3_runtime.backends import BACKENDS
from da3_runtime.backends.base import Backend
from da3_runtime.backends.eager import Eager
from da3_runtime.backends.gpu.capture_gate import GATE
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
from da3_runtime.util.setting_group import AUTO
from da3_runtime.variants import Graph, check_ray_pose

logger = logging.getLogger(__name__)

UNTRAINED = "The weights are untrained (drawn at random); the depth means nothing."
UNTRAINED_HEAD = "The SDT head is untrained (drawn at random); the depth means nothing."


def candidates(settings: EngineSettings) -> list[type[Backend]]:
    """The backends to try, best first.

    Raises
    ------
    SettingError
        If ``BACKEND`` names none.
    """
    named = settings.backend
    found = [cls for cls in BACKENDS if named == cls.name or (named == AUTO and cls.automatic)]
    if not found:
        known = ", ".join([AUTO, *(cls.name for cls in BACKENDS)])
        raise SettingError(f"BACKEND {settings.backend!r} is not one of: {known}.")
    return found


def load_backend(settings: EngineSettings) -> Loaded:
    """Load the first backend of :data:`BACKENDS` that this machine can run.

    A backend that cannot run here is passed over in silence; one that should have but whose artefact is
    missing, damaged or refused is passed over with a warning. ``BACKEND`` set to a name tries only that
    one.

    Raises
    ------
    SettingError
        If ``BACKEND`` names none, or ``RAY_POSE`` asks for rays of a network that has none.
    BackendUnavailableError
        If none can run, with every reason.
    CheckpointError
        If only eager is left and its weights cannot be had.
    """
    backends = candidates(settings)
    folder, warnings = find_engine(settings)
    if settings.ray_pose:
        check_ray_pose(folder.variant, folder.head)
    wanted = folder.variant.graphs_for(settings.ray_pose)
    reasons: list[str] = []
    failure: DA3Error | None = None
    for cls in backends:
        reason = cls.unavailable()
        if reason is None:
            try:
                graphs = _load(cls, folder, wanted, settings)
            except DA3Error as error:
                failure = error
                reason = str(error).rstrip(".")
                if folder.manifest is not None:
                    warnings.append(f"{cls.name} was skipped: {reason}.")
                    logger.warning("%s skipped for %s: %s", cls.name, folder.path, reason)
            else:
                if issubclass(cls, Eager) and settings.backend == AUTO:
                    warnings.append("No engine could be used; PyTorch eager answered instead.")
                    logger.warning("no engine could be used for %s; using eager", folder.path)
                warnings += _untrained(folder, graphs)
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
    if not any(map(find_spec, ("onnxruntime", "torch", "tensorrt", "tensorrt_lean", "tensorrt_rtx"))):
        raise BackendUnavailableError(
            f"Nothing is installed that can run {folder.variant.model_id}: "
            'pip install "da3-runtime[cpu]" runs its engine, "da3-runtime[eager]" its checkpoint.'
        )
    raise BackendUnavailableError(
        f"No backend can run {folder.variant.model_id} with head {folder.head} here "
        f"({'; '.join(reasons)})."
    )


def _load(
    cls: type[Backend], folder: EngineFolder, wanted: Sequence[Graph], settings: EngineSettings
) -> dict[str, Backend]:
    """Every graph on one backend, or none."""
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


def _untrained(folder: EngineFolder, graphs: dict[str, Backend]) -> list[str]:
    """The warning that untrained weights call for, if any."""
    if all(graph.trained for graph in graphs.values()):
        return []
    only_head = folder.manifest is not None and folder.manifest.source.trained
    return [UNTRAINED_HEAD if only_head else UNTRAINED]
