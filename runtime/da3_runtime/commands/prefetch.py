"""``da3-runtime prefetch``: download a model's checkpoint and published engine in advance."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from da3_runtime.commands.options import Verbs, add_options, log_to_stderr, settings_of
from da3_runtime.errors import ArtefactError, SettingError

if TYPE_CHECKING:
    from da3_runtime.store.checkpoint import Checkpoint
    from da3_runtime.store.settings import EngineSettings


def add_parser(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "prefetch", help="download a checkpoint, and its published engine if ENGINE_REPO is set"
    )
    add_options(parser, ("model", "head", "revision"))
    parser.add_argument(
        "--engine-only",
        action="store_true",
        help="fetch the published engine of ENGINE_REPO, not the checkpoint",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Download to the hub's cache."""
    log_to_stderr()
    prefetch(settings_of(args).engine, engine_only=args.engine_only)
    return 0


def prefetch(settings: EngineSettings, engine_only: bool = False) -> None:
    """Download every file of the settings' model that the cache lacks, and print the paths.

    On a terminal, huggingface_hub shows a progress bar for every file. Otherwise each part has a plain
    line before and after it.

    Parameters
    ----------
    engine_only : bool
        Whether to leave out the checkpoint.

    Raises
    ------
    SettingError
        If only the engine is wanted and ``ENGINE_REPO`` is not set.
    CheckpointError, ArtefactError
        If a part cannot be downloaded.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from da3_runtime.store.checkpoint import HUB, find_checkpoint
    from da3_runtime.store.engine_weights import verified_sha256
    from da3_runtime.store.find_engine import find_engine
    from da3_runtime.store.releases import NESTED, weights_name

    if engine_only and settings.engine_repo is None:
        raise SettingError("--engine-only needs ENGINE_REPO, a repository of published engines.")
    if not sys.stderr.isatty():
        disable_progress_bars()
    folder, warnings = find_engine(settings)
    variant = folder.variant
    if engine_only:
        pass
    elif variant.repo is None:
        _print(f"{variant.model_id}: its checkpoint is part of this installation.")
    else:
        weights = NESTED if settings.weights == NESTED else HUB
        what = "the nested model" if weights == NESTED else variant.repo
        _print(f"{variant.model_id}: fetching the checkpoint of {what} ...")
        checkpoint = find_checkpoint(variant, weights, settings.revision, settings.cached_models_dir)
        name = weights_name(checkpoint.weights, verified_sha256(checkpoint, settings))
        _print(f"{variant.model_id}: {_described(checkpoint)}, {name}")
    if settings.engine_repo is None:
        _print("No engine was fetched: set ENGINE_REPO to a repository of published engines.")
    elif folder.hub is None and folder.manifest is not None:
        _print("No engine was fetched: ENGINE_DIR already has it.")
    elif folder.hub is None or folder.manifest is None:
        reason = " ".join(warnings) or f"it has no engine of {variant.model_id} with head {folder.head}."
        raise ArtefactError(f"No engine was fetched from ENGINE_REPO: {reason}")
    else:
        published = folder.manifest.graphs
        for graph in (*variant.graphs, *variant.ray_graphs):
            if graph.key not in published:
                continue
            for name, entry in published[graph.key].artefacts.items():
                _print(
                    f"{variant.model_id}: fetching {name} of {graph.key}, {entry.size / 1e6:.0f} MB ..."
                )
                _print(f"{variant.model_id}: {folder.verified(entry)}")


def _described(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.path} ({checkpoint.path.stat().st_size / 1e6:.0f} MB)"


def _print(text: str) -> None:
    print(text, flush=True)
