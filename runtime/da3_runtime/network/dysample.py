"""DySample: upsampling by learned sampling points (ICCV 2023), style "lp", dynamic scope."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from da3_runtime.network.positions import size_of
from da3_runtime.network.precision import FP32Conv2d, full

SCALE = 2
GROUPS = 4
MAX_OFFSET = 0.5  # of a pixel, at a fully open scope


def initial_positions() -> Tensor:
    """Offsets that make plain bilinear upsampling: the four sub-pixel centers, [1, 2*G*4, 1, 1].

    Channels run over (x, y), then groups, then the sub-pixels row by row.
    """
    center = (torch.arange(SCALE) + 0.5) / SCALE - 0.5
    x = center.repeat(SCALE)
    y = center.repeat_interleave(SCALE)
    return torch.cat((x.repeat(GROUPS), y.repeat(GROUPS))).reshape(1, -1, 1, 1)


class DySample(nn.Module):
    """Upsample by two: every output pixel is sampled bilinearly at a predicted point.

    Offsets, coordinates and sampling are in FP32 whatever the input is: FP16 holds a coordinate of a
    500 pixel side to a quarter of a pixel only.

    Parameters
    ----------
    channels : int
        Channels of the input, a multiple of :data:`GROUPS`.
    """

    init_pos: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        outputs = 2 * GROUPS * SCALE * SCALE
        self.offset = FP32Conv2d(channels, outputs, 1)
        self.scope = FP32Conv2d(channels, outputs, 1, bias=False)
        nn.init.normal_(self.offset.weight, std=0.001)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.scope.weight)
        self.register_buffer("init_pos", initial_positions())

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 2H, 2W], same dtype."""
        wide = full(x)
        offset = self.offset(wide) * torch.sigmoid(self.scope(wide)) * MAX_OFFSET + self.init_pos
        return sample(wide, offset).to(x.dtype)


def sample(x: Tensor, offset: Tensor) -> Tensor:
    """Sample ``x`` [B, C, H, W] at pixel centers plus ``offset`` [B, 2*G*4, H, W], in pixels of ``x``.

    Points outside take the border's value; each group of channels has its own points.

    Returns
    -------
    Tensor
        [B, C, 2H, 2W].
    """
    batch, channels, height, width = x.shape
    points = F.pixel_shuffle(offset.reshape(batch * 2 * GROUPS, SCALE * SCALE, height, width), SCALE)
    points = points.reshape(batch, 2, GROUPS, SCALE * height, SCALE * width)
    columns = torch.arange(width, dtype=torch.float32, device=x.device) + 0.5
    rows = torch.arange(height, dtype=torch.float32, device=x.device) + 0.5
    # Centers of the input pixel that each output pixel belongs to.
    columns = columns[:, None].expand(width, SCALE).reshape(-1)
    rows = rows[:, None].expand(height, SCALE).reshape(-1)
    grid_x = (points[:, 0] + columns) * (2.0 / size_of(width, x.device)) - 1.0
    grid_y = (points[:, 1] + rows[:, None]) * (2.0 / size_of(height, x.device)) - 1.0
    grid = torch.stack((grid_x, grid_y), dim=-1)
    grid = grid.reshape(batch * GROUPS, SCALE * height, SCALE * width, 2)
    grouped = x.reshape(batch * GROUPS, channels // GROUPS, height, width)
    sampled = F.grid_sample(grouped, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.reshape(batch, channels, SCALE * height, SCALE * width)
