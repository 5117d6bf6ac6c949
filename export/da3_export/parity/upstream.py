"""Upstream's own network, from the package depth-anything-3: parity compares every engine with it."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from da3_runtime.errors import BuildError
from da3_runtime.network.load import UNUSED_PARTS, load_weights
from da3_runtime.network.sizes import SIZES, Sizes
from da3_runtime.variants import PATCH, Graph, Variant

# One of upstream's modules, which carry no types.
Upstream = Any


def build_upstream(graph: Graph) -> nn.Module:
    """Upstream's network for a graph, with its initial weights, in FP32 and eval mode.

    Raises
    ------
    BuildError
        If depth-anything-3, or a package that it imports, is not installed.
    """
    try:
        with _quiet():
            network = _build(graph.config)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        reason = (
            "is not installed: pip install --no-deps --ignore-requires-python depth-anything-3==0.1.1."
        )
        if package != "depth_anything_3":
            reason = f"needs {package}, which is not installed: pip install {package}."
        raise BuildError(f"Parity is measured against depth-anything-3, which {reason}") from None
    return network.eval().requires_grad_(False)


def load_upstream(variant: Variant, graph: Graph, path: Path) -> nn.Module:
    """Upstream's network with the weights of a safetensors checkpoint, in FP32.

    Raises
    ------
    BuildError
        As :func:`build_upstream`.
    CheckpointError
        As :func:`da3_runtime.network.load.load_weights`.
    """
    network = build_upstream(graph)
    load_weights(network, variant, graph, path)
    return network


def _build(name: str) -> nn.Module:
    from depth_anything_3.cfg import create_object, load_config
    from depth_anything_3.registry import MODEL_REGISTRY

    if name not in MODEL_REGISTRY:
        return upstream_of(SIZES[name])
    config = load_config(MODEL_REGISTRY[name])
    for part in UNUSED_PARTS:
        config.pop(part.removesuffix("."), None)
    network: nn.Module = create_object(config)
    return network


def upstream_of(sizes: Sizes) -> nn.Module:
    """An any-view network of any size, built from upstream's modules, with its initial weights.

    Upstream's DinoV2 knows four backbones by name. So this makes the vision transformer itself.
    """
    from depth_anything_3.model.cam_dec import CameraDec
    from depth_anything_3.model.cam_enc import CameraEnc
    from depth_anything_3.model.da3 import DepthAnything3Net
    from depth_anything_3.model.dinov2.dinov2 import DinoV2
    from depth_anything_3.model.dinov2.vision_transformer import DinoVisionTransformer
    from depth_anything_3.model.dualdpt import DualDPT

    start = sizes.alternate_from
    backbone = DinoV2.__new__(DinoV2)
    nn.Module.__init__(backbone)
    backbone.out_layers = list(sizes.out_layers)
    backbone.pretrained = DinoVisionTransformer(
        img_size=PATCH * sizes.table_side,
        patch_size=PATCH,
        embed_dim=sizes.width,
        depth=sizes.depth,
        num_heads=sizes.heads,
        ffn_layer="swiglufused" if sizes.gated else "mlp",
        alt_start=start,
        qknorm_start=start,
        rope_start=start,
        cat_token=True,
    )
    width = sizes.feature_width
    head = DualDPT(width, output_dim=2, features=sizes.features, out_channels=sizes.out_channels)
    decoder = CameraDec(width)
    encoder = CameraEnc(sizes.width, trunk_depth=sizes.encoder_depth)
    network: nn.Module = DepthAnything3Net(backbone, head, decoder, encoder)
    return network


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what upstream's modules warn of and print when they are imported and built."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
