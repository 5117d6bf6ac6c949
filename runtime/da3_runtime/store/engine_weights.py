"""The weights that an engine was built from, so that eager gives the same results as the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

from da3_runtime.errors import CheckpointError
from da3_runtime.store.checkpoint import (
    BUNDLED,
    HUB,
    RANDOM_PREFIX,
    SDT_FILE,
    Checkpoint,
    bundled_sdt,
    find_checkpoint,
    find_sdt,
)
from da3_runtime.store.digests import remembered_sha256
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.manifest import CHECKPOINT_DIR
from da3_runtime.store.releases import NESTED
from da3_runtime.store.settings import EngineSettings


def engine_checkpoint(folder: EngineFolder, settings: EngineSettings) -> Checkpoint:
    """The checkpoint that eager must load to give the same results as the folder's engine.

    It is the first of these that exists: the checkpoint that ``WEIGHTS`` names; the one in the engine's
    folder (random weights are stored there); the bundled one, or the hub's at the commit that the engine
    was built from. If the folder has a manifest, the weights must match its digest. A download of a
    published release must match the release's.

    Raises
    ------
    CheckpointError
        If the weights are missing, differ from the engine's, or are not the release that was wanted.
    """
    beside = folder.path / CHECKPOINT_DIR
    source = folder.manifest.source if folder.manifest else None
    revision = settings.revision
    published = source.weights if source is not None and source.weights == NESTED else HUB
    weights = settings.weights or published
    is_random = weights.startswith(RANDOM_PREFIX)
    if (settings.weights is None or is_random) and beside.is_dir():
        weights = str(beside)
    elif is_random or (
        settings.weights is None and source is not None and source.weights not in (published, BUNDLED)
    ):
        raise CheckpointError(
            f"The {weights if is_random or source is None else source.weights} weights of "
            f"{folder.variant.model_id} are missing; set WEIGHTS to their folder, or build the engine "
            "again."
        )
    elif weights == published:
        revision = revision or (source.commit if source else None)
    checkpoint = find_checkpoint(folder.variant, weights, revision, settings.cached_models_dir)
    digest = verified_sha256(checkpoint, settings) if source is not None or checkpoint.repo else None
    if source is not None and digest != source.sha256:
        raise CheckpointError(
            f"The weights for {folder.variant.model_id} are not those its engine was built from; "
            "set WEIGHTS to the right ones, or build the engine again."
        )
    return checkpoint


def engine_sdt(folder: EngineFolder, settings: EngineSettings) -> Checkpoint:
    """The SDT head that eager must load to give the same results as the folder's engine.

    ``SDT_WEIGHTS`` if it is set, else the head in the engine's folder (random heads are stored there),
    else the bundled one.

    Raises
    ------
    CheckpointError
        If the head is missing, or differs from the engine's.
    """
    beside = folder.path / CHECKPOINT_DIR / SDT_FILE
    weights = settings.sdt_weights
    if beside.is_file() and (weights is None or weights.startswith(RANDOM_PREFIX)):
        weights = str(beside)
    head = find_sdt(weights) if weights is not None else bundled_sdt(folder.variant)
    if head is None:
        raise CheckpointError(
            f"The SDT head of {folder.variant.model_id} has no weights; set SDT_WEIGHTS to a "
            ".safetensors file, or run 'make engines HEAD=sdt'."
        )
    source = folder.manifest.head_source if folder.manifest else None
    if source is not None and verified_sha256(head, settings) != source.sha256:
        raise CheckpointError(
            f"The SDT head for {folder.variant.model_id} is not the one its engine was built from; "
            "set SDT_WEIGHTS to that one, or build the engine again."
        )
    return head


def weights_digest(weights: Sequence[Checkpoint], settings: EngineSettings) -> str:
    """Digest of the digests of a checkpoint and, if it was loaded, of an SDT head, in hexadecimal."""
    digests = "".join(verified_sha256(each, settings) for each in weights)
    return hashlib.sha256(digests.encode()).hexdigest()


def verified_sha256(weights: Checkpoint, settings: EngineSettings) -> str:
    """As :meth:`Checkpoint.sha256`; a file that has not changed is not read again."""
    return weights.sha256(partial(remembered_sha256, cache_dir=settings.runtime_cache_dir))
