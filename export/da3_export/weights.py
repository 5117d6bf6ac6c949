"""Which weights an engine is built from: the checkpoint, and the SDT head if the engine has one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from da3_export.parity.cases import LARGE_SHAPES, Case, case_images
from da3_export.random_weights import seed_of, write_random_checkpoint, write_random_sdt
from da3_export.request import Request
from da3_export.util.progress import Progress
from da3_runtime.errors import CheckpointError
from da3_runtime.network import precision
from da3_runtime.network.load import feature_width, load_network, load_sdt
from da3_runtime.network.vit import Features
from da3_runtime.store.checkpoint import (
    HUB,
    RANDOM_PREFIX,
    SDT_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    bundled_sdt,
    find_checkpoint,
    find_sdt,
    random_seed,
)
from da3_runtime.store.manifest import CHECKPOINT_DIR, Manifest, Source, sha256_of
from da3_runtime.store.releases import NESTED, weights_name
from da3_runtime.variants import Graph, Head, Variant, nested_variant

RANDOM_SDT_SEED = 0  # of the SDT head that is used where no trained one exists


@dataclass(frozen=True)
class Weights:
    """Everything that an engine is made from, on disk.

    Attributes
    ----------
    checkpoint, sdt : Checkpoint, Checkpoint | None
        The variant's checkpoint, and the SDT head if the engine has one.
    source, head_source : Source, Source | None
        The same as the manifest describes them.
    """

    checkpoint: Checkpoint
    sdt: Checkpoint | None
    source: Source
    head_source: Source | None

    def sdt_of(self, graph: Graph) -> Path | None:
        """File of the SDT head, if ``graph`` has one."""
        return self.sdt.path if self.sdt is not None and graph.takes_sdt else None

    def digests(self, graph: Graph) -> list[str | None]:
        """SHA-256 of the files that ``graph`` is made from."""
        return source_digests(self.source, self.head_source, graph)


def source_digests(source: Source, head_source: Source | None, graph: Graph) -> list[str | None]:
    """SHA-256 of the checkpoint and, for a graph that can have an SDT head, of the head."""
    head = [head_source.sha256 if head_source else None] if graph.takes_sdt else []
    return [source.sha256, *head]


def find_weights(request: Request, old: Manifest | None, staging: Path) -> Weights:
    """The weights to build from; random ones are written to ``staging`` unless they already exist.

    Parameters
    ----------
    old : Manifest | None
        Manifest of the engine folder as it is.
    staging : Path
        Folder of the build; it must exist.

    Raises
    ------
    CheckpointError
        If weights cannot be found or do not fit.
    SettingError
        If ``WEIGHTS`` or ``SDT_WEIGHTS`` is of no known form.
    """
    checkpoint = _checkpoint(request, old, staging)
    sdt = _sdt(request, checkpoint, staging) if request.head is Head.SDT else None
    return Weights(checkpoint, sdt, _source(checkpoint), _source(sdt) if sdt is not None else None)


def _checkpoint(request: Request, old: Manifest | None, staging: Path) -> Checkpoint:
    """The checkpoint; random weights beside the engine are used again if they are of the same seed."""
    source = {HUB: request.variant, NESTED: nested_variant(request.variant)}.get(request.weights)
    if source is not None and source.repo is not None:
        Progress(request.title, 0).log(f"checkpoint from the hub: {source.repo}")
    if not request.weights.startswith(RANDOM_PREFIX):
        return find_checkpoint(
            request.variant, request.weights, request.revision, request.cached_models_dir
        )
    seed = seed_of(request.weights)
    beside = request.folder / CHECKPOINT_DIR / WEIGHTS_FILE
    if old is not None and _is_random(beside, seed, old.source):
        return Checkpoint(f"{RANDOM_PREFIX}{seed}", beside, trained=False)
    return write_random_checkpoint(request.variant, seed, staging / CHECKPOINT_DIR)


def _sdt(request: Request, checkpoint: Checkpoint, staging: Path) -> Checkpoint:
    """The SDT head: ``SDT_WEIGHTS``, else the bundled one if its width fits, else random weights."""
    graph = next(graph for graph in request.variant.graphs if graph.takes_sdt)
    channels, fused = feature_width(graph), request.sdt_fusion_channels
    given = request.sdt_weights
    is_random = given is not None and given.startswith(RANDOM_PREFIX)
    if given is not None and not is_random:
        head = find_sdt(given)
        load_sdt(channels, head.path, fused)
        return head
    bundled = bundled_sdt(request.variant)
    if bundled is not None and fused == request.variant.sdt_fusion_channels and not is_random:
        return bundled
    target = staging / CHECKPOINT_DIR / SDT_FILE
    target.parent.mkdir(exist_ok=True)
    seed = seed_of(given, "SDT_WEIGHTS") if given is not None else RANDOM_SDT_SEED
    features = _features(request.variant, graph, checkpoint.path) if checkpoint.trained else None
    write_random_sdt(channels, fused, seed, target, features)
    written = Checkpoint(f"{RANDOM_PREFIX}{seed}", target, trained=False)
    beside = request.folder / CHECKPOINT_DIR / SDT_FILE
    if beside.is_file() and sha256_of(beside) == written.sha256():
        target.unlink()
        return Checkpoint(written.weights, beside, trained=False)
    return written


def _features(variant: Variant, graph: Graph, checkpoint: Path) -> Features:
    """What a graph's backbone gives for two of the photos that parity is measured on."""
    network = load_network(variant, graph, checkpoint, precision.FP32)
    images = torch.from_numpy(case_images(Case(*LARGE_SHAPES[0], 2)))
    with torch.inference_mode():
        features: Features = network.backbone.pretrained(images)
    return features


def _is_random(path: Path, seed: int, source: Source) -> bool:
    """Whether a file is the whole checkpoint that ``seed`` gave and ``source`` describes."""
    try:
        of_seed = path.is_file() and random_seed(path) == f"{RANDOM_PREFIX}{seed}"
        return of_seed and sha256_of(path) == source.sha256
    except CheckpointError:
        return False


def _source(checkpoint: Checkpoint) -> Source:
    """The checkpoint as a manifest describes it; raises as :meth:`Checkpoint.sha256`."""
    weights, digest = checkpoint.weights, checkpoint.sha256()
    return Source(
        weights,
        digest,
        checkpoint.repo,
        checkpoint.commit,
        checkpoint.trained,
        weights_name(weights, digest),
    )
