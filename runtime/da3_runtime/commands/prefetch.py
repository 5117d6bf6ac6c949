"""Hub -> cache, ahead of time: a model's checkpoint and its published engine."""

from __future__ import annotations

import sys

from da3_runtime.errors import ArtefactError
from da3_runtime.settings import Settings
from da3_runtime.store.checkpoint import Checkpoint, download
from da3_runtime.store.find_engine import find_engine


def prefetch(settings: Settings) -> None:
    """Fetch what the settings' model needs, each file once, and print where it is.

    huggingface_hub shows a bar for every file on a terminal; elsewhere there is a line before and after
    each part.

    Raises
    ------
    CheckpointError, ArtefactError
        If a part cannot be had.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    folder, warnings = find_engine(settings)
    variant = folder.variant
    if variant.repo is None:
        _say(f"{variant.model_id}: its checkpoint is part of this installation.")
    else:
        _say(f"{variant.model_id}: fetching the checkpoint of {variant.repo} ...")
        checkpoint = download(variant.repo, settings.revision, settings.cached_models_dir)
        _say(f"{variant.model_id}: {_described(checkpoint)}")
    if settings.engine_repo is None:
        _say("No engine was fetched: ENGINE_REPO names no repository.")
    elif folder.hub is None and folder.manifest is not None:
        _say("No engine was fetched: ENGINE_DIR has it.")
    elif folder.hub is None or folder.manifest is None:
        reason = " ".join(warnings) or f"it has none of {variant.model_id} with head {folder.head}."
        raise ArtefactError(f"No engine was fetched from ENGINE_REPO: {reason}")
    else:
        published = folder.manifest.graphs
        for graph in (*variant.graphs, *variant.ray_graphs):
            if graph.key not in published:
                continue
            for name, entry in published[graph.key].artefacts.items():
                _say(
                    f"{variant.model_id}: fetching {name} of {graph.key}, {entry.size / 1e6:.0f} MB ..."
                )
                _say(f"{variant.model_id}: {folder.verified(entry)}")


def _described(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.path} ({checkpoint.path.stat().st_size / 1e6:.0f} MB)"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
