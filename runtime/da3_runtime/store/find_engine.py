"""Where an engine is: ``ENGINE_DIR``, else the hub repository ``ENGINE_REPO``."""

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
        If model or head do not exist.
    ManifestError
        If the manifest is damaged, or that of another engine.
    """
    variant, head = find_variant(settings.model_id), find_head(settings.head)
    path = settings.engine_dir / variant.model_id / head
    return EngineFolder(variant, head, path, _read(path, variant, head))


def find_engine(settings: EngineSettings) -> tuple[EngineFolder, list[str]]:
    """The folder of the engine that the settings name, and warnings about where it is not.

    The first with a manifest is taken: the folder in ``ENGINE_DIR``, then the same in ``ENGINE_REPO``,
    whose artefacts are fetched one by one as a backend needs them. Where there is none, the folder is
    the one in ``ENGINE_DIR``, without a manifest. Raises as :func:`local_engine`.
    """
    local = local_engine(settings)
    if local.manifest is not None or settings.engine_repo is None:
        return local, []
    variant, head = local.variant, local.head
    repo, revision = parse_repo(settings.engine_repo)
    inside = PurePosixPath(variant.model_id, head)
    try:
        published = hub_file(repo, str(inside / MANIFEST_NAME), revision, settings.cached_models_dir)
    except HubError as error:
        logger.warning("ENGINE_REPO: the hub repository %s %s", repo, error)
        warnings = [] if error.is_missing else [f"ENGINE_REPO was skipped: {repo} {error}."]
        return local, warnings
    folder = published.parent
    hub = HubFolder(repo, folder.parents[1].name, inside, settings.cached_models_dir)
    return EngineFolder(variant, head, folder, _read(folder, variant, head), hub), []


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
