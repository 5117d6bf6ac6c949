"""A backbone of any size from upstream's vision transformer, for configurations of our own."""

from __future__ import annotations

from depth_anything_3.model.dinov2.dinov2 import DinoV2
from depth_anything_3.model.dinov2.vision_transformer import DinoVisionTransformer
from torch import nn

from da3_runtime.variants import PATCH


class SizedBackbone(DinoV2):  # type: ignore[misc]
    """Upstream's ``DinoV2``, which knows four sizes by name, with the size as numbers.

    Parameters
    ----------
    embed_dim, depth, num_heads : int
        Width, blocks and attention heads.
    img_size : int
        Side of the image that the table of positions is for.
    out_layers : list[int]
        Blocks whose outputs the head reads.
    alt_start, qknorm_start, rope_start, cat_token
        As ``DinoV2``.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        img_size: int,
        out_layers: list[int],
        alt_start: int,
        qknorm_start: int,
        rope_start: int,
        cat_token: bool,
    ) -> None:
        nn.Module.__init__(self)
        self.out_layers = out_layers
        self.pretrained = DinoVisionTransformer(
            img_size=img_size,
            patch_size=PATCH,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            alt_start=alt_start,
            qknorm_start=qknorm_start,
            rope_start=rope_start,
            cat_token=cat_token,
        )
