"""Finds the engine that the settings name in ``ENGINE_DIR`` or the hub repository ``ENGINE_REPO``."""

from __future__ import annotations

import logging
from pathlib import Path, PurePosixPath

from da3_runtime.errors import ManifestError
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.hub import HubError, HubFolder, hub_file, parse_repo
from da3_runtime.store.manifest import MANIFEST_NAME, Manifest, read_manifest
from da3_runtime.store.settings import EngineSettings
from da3_runtime.variants import Head, Variant, find_head, find_variant

logger = logging.getLogger(__name__)


def local_engine(settings: EngineSettings) -> EngineFolder:
    """The engine folder in ``ENGINE_DIR`` that the settings name, with its manifest.

    Raises
    ------
    UnknownModelError, SettingError
        If the model or the head does not exist.
    ManifestError
        If the manifest is damaged or belongs to another engine.
    """
    variant, head = find_variant(settings.model_id), find_head(settings.head)
    path = settings.engine_dir / variant.model_id / head
    manifest = _read(path, variant, head)
    return EngineFolder(variant, head, path, manifest, cache_dir=settings.runtime_cache_dir)


def find_engine(settings: EngineSettings) -> tuple[EngineFolder, list[str]]:
    """The folder of the engine that the settings name, and a warning if ``ENGINE_REPO`` was skipped.

    The folder in ``ENGINE_DIR`` is used if it has a manifest, otherwise the same folder in
    ``ENGINE_REPO``. Its artefacts are downloaded one by one, when a backend needs them. If neither has a
    manifest, the result is the folder in ``ENGINE_DIR`` with ``manifest=None``. Raises the errors of
    :func:`local_engine`.
    """
    local = local_engine(settings)
    if local.manifest is not None or settings.engine_repo is None:
        return local, []
    variant, head = local.variant, local.head
    repo, revision = parse_repo(settings.engine_repo)
    path_in_repo = PurePosixPath(variant.model_id, head)
    try:
        published = hub_file(
            repo, str(path_in_repo / MANIFEST_NAME), revision, settings.cached_models_dir
        )
    except HubError as error:
        logger.warning("ENGINE_REPO: the hub repository %s %s", repo, error)
        warnings = [] if error.is_missing else [f"ENGINE_REPO was skipped: {repo} {error}."]
        return local, warnings
    folder = published.parent
    hub = HubFolder(repo, folder.parents[1].name, path_in_repo, settings.cached_models_dir)
    manifest = _read(folder, variant, head)
    return EngineFolder(variant, head, folder, manifest, hub, settings.runtime_cache_dir), []


def _read(path: Path, variant: Variant, head: Head) -> Manifest | None:
    manifest = read_manifest(path)
    if manifest is None:
        return None
    complete = {graph.key for graph in variant.graphs} <= set(manifest.graphs)
    if (manifest.model, manifest.head) != (variant.model_id, head) or not complete:
        raise ManifestError(
            f"The engine folder of {variant.model_id} with head {head} holds an engine of "
            f"{manifest.model} with head {manifest.head}; build the engine again."
        )
    return manifest
