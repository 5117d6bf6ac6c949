"""Our networks with the weights of upstream's modules, or of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from da3_runtime.network.load import load_network
from da3_runtime.network.network import DepthNetwork
from da3_runtime.network.precision import FP32, Precision
from da3_runtime.network.sizes import Sizes
from da3_runtime.store.checkpoint import BUNDLED_DIR
from da3_runtime.variants import Graph, find_variant
from tests.support.paths import NANO

NANO_WEIGHTS = BUNDLED_DIR / NANO / "model.safetensors"

# The monocular networks at da3-small's width: the fixture small_monocular.
SMALL_MONOCULAR = Sizes(384, 4, 6, (0, 1, 2, 3), 64, (48, 96, 192, 384))


def network_of(
    upstream: nn.Module, sizes: Sizes, graph: Graph, precision: Precision, fold: bool = False
) -> DepthNetwork:
    """Our network for inference with a copy of the weights of upstream's, which stays as it is."""
    network = DepthNetwork(sizes, graph)
    network.load_state_dict(upstream.state_dict())
    if fold:
        network.fold_layer_scales()
    return network.for_inference(precision)


def load_nano(path: Path) -> DepthNetwork:
    """da3-nano's network with the weights of a checkpoint."""
    variant = find_variant(NANO)
    return load_network(variant, variant.graphs[0], path, FP32)
