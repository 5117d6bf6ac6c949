"""The size of every network: one row for each, named by :attr:`da3_runtime.variants.Graph.config`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Size of one network. The numbers are those of upstream's ``configs/*.yaml``, except da3-nano's.

    Attributes
    ----------
    width : int
        Embedding width of the backbone.
    depth, heads : int
        Blocks of the backbone, and attention heads of each.
    out_layers : tuple[int, int, int, int]
        Indices of the blocks whose outputs the head reads.
    features : int
        Channels of the head's fused maps.
    out_channels : tuple[int, int, int, int]
        Channels of the head's four levels before fusion.
    alternate_from : int | None
        First block of the any-view part. From there on every second block is global, queries and keys
        are normalized and rotated, and the camera token replaces the class token; each level then
        holds local and global features. None in a monocular network, which has no such part.
    gated : bool
        Whether the feed-forward layers are SwiGLU instead of a GELU MLP.
    table_side : int
        Rows and columns of the learned table of patch positions.
    encoder_depth : int
        Blocks of the camera encoder.
    """

    width: int
    depth: int
    heads: int
    out_layers: tuple[int, int, int, int]
    features: int
    out_channels: tuple[int, int, int, int]
    alternate_from: int | None = None
    gated: bool = False
    table_side: int = 37
    encoder_depth: int = 4

    @property
    def feature_width(self) -> int:
        """Channels of a level that the head reads: local and global features in an any-view network."""
        return self.width if self.alternate_from is None else 2 * self.width


_LARGE_CHANNELS = (256, 512, 1024, 1024)
_MONOCULAR = Sizes(1024, 24, 16, (4, 11, 17, 23), 256, _LARGE_CHANNELS)

SIZES: dict[str, Sizes] = {
    # da3-small's layout, narrow and shallow.
    "da3-nano": Sizes(160, 8, 5, (1, 3, 5, 7), 32, (24, 48, 96, 160), 2, table_side=18, encoder_depth=1),
    "da3-small": Sizes(384, 12, 6, (5, 7, 9, 11), 64, (48, 96, 192, 384), 4),
    "da3-base": Sizes(768, 12, 12, (5, 7, 9, 11), 128, (96, 192, 384, 768), 4),
    "da3-large": Sizes(1024, 24, 16, (11, 15, 19, 23), 256, _LARGE_CHANNELS, 8),
    "da3-giant": Sizes(1536, 40, 24, (19, 27, 33, 39), 256, _LARGE_CHANNELS, 13, gated=True),
    "da3metric-large": _MONOCULAR,
    "da3mono-large": _MONOCULAR,
}
