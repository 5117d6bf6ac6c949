"""The DPT heads: four levels of patch features -> full-resolution maps.

Drives the modules of upstream's DualDPT (depth and confidence) and DPT (depth and sky). Two things
differ from their forward, neither of which changes a value beyond rounding: DualDPT's ray branch,
up to a third of the rest's work, is computed only when it is asked for, and each fusion block's 1x1
convolution runs before its bilinear upsampling rather than after (both are linear and the interpolation
weights sum to one), at a quarter of the cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from da3_runtime.network import Upstream
from da3_runtime.network.positions import aspect_ratio, uv_embedding
from da3_runtime.network.vit import PATCH, Features, norm
from da3_runtime.variants import Series


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize with aligned corners, as every resize inside upstream's DPT heads."""
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=True)


def residual_unit(unit: Upstream, x: Tensor) -> Tensor:
    """Upstream's ResidualConvUnit."""
    inner: Tensor = unit.conv2(F.relu(unit.conv1(F.relu(x))))
    return inner + x


def fuse(block: Upstream, top: Tensor, lateral: Tensor | None, size: Sequence[int]) -> Tensor:
    """Upstream's FeatureFusionBlock, 1x1 convolution first."""
    if lateral is not None:
        top = top + residual_unit(block.resConfUnit1, lateral)
    return resize(block.out_conv(residual_unit(block.resConfUnit2, top)), *size)


def fuse_levels(blocks: Upstream, levels: list[Tensor]) -> Tensor:
    """Fuse four levels, coarsest first, into one map at twice the finest one's size."""
    l1, l2, l3, l4 = levels
    top = fuse(blocks[3], l4, None, l3.shape[2:])
    top = fuse(blocks[2], top, l3, l2.shape[2:])
    top = fuse(blocks[1], top, l2, l1.shape[2:])
    return fuse(blocks[0], top, l1, (2 * l1.shape[2], 2 * l1.shape[3]))


def add_uv(x: Tensor, aspect: Tensor) -> Tensor:
    """Add upstream's UV positional embedding for an image of this width over height."""
    by_column, by_row = uv_embedding(x.shape[2], x.shape[3], x.shape[1], aspect)
    return x + by_column.to(x) + by_row.to(x)


def activate(logits: Tensor, series: Series) -> tuple[Tensor, Tensor]:
    """Logits [B, 2, H, W] to the two maps of a series, [B, H, W] each.

    Depth = exp(logit); confidence = exp(logit) + 1; sky = relu(logit).
    """
    depth, other = logits[:, 0], logits[:, 1]
    if series is Series.ANYVIEW:
        return torch.exp(depth), torch.exp(other) + 1
    return torch.exp(depth), F.relu(other)


class RayBranch(nn.Module):
    """The ray branch of upstream's DualDPT: a fusion of its own on the same levels.

    Of its four levels' outputs upstream returns only the finest, so only that one is computed.

    Parameters
    ----------
    scratch : Upstream
        ``DualDPT.scratch``.
    dtype : torch.dtype
        As :class:`DPTHead`.
    """

    def __init__(self, scratch: Upstream, dtype: torch.dtype) -> None:
        super().__init__()
        self.fusion = nn.ModuleList(
            [
                scratch.refinenet1_aux,
                scratch.refinenet2_aux,
                scratch.refinenet3_aux,
                scratch.refinenet4_aux,
            ]
        ).to(dtype)
        self.neck: Upstream = scratch.output_conv1_aux[-1].to(dtype)
        hidden, _, self.norm, _, _, self.logits = scratch.output_conv2_aux[-1]
        self.hidden: Upstream = hidden.to(dtype)

    def forward(self, levels: list[Tensor], aspect: Tensor) -> tuple[Tensor, Tensor]:
        """Rays [B, 8 grid_h, 8 grid_w, 6] and their confidence [B, 8 grid_h, 8 grid_w], FP32.

        Rays are the logits themselves; confidence = exp(logit) + 1.
        """
        x = self.hidden(add_uv(self.neck(fuse_levels(self.fusion, levels)), aspect))
        x = F.relu(norm(self.norm, x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        logits = self.logits(x).permute(0, 2, 3, 1)
        return logits[..., :6], torch.exp(logits[..., 6]) + 1


class DPTHead(nn.Module):
    """The depth branch of upstream's DualDPT, with or without its ray branch, or the whole of its DPT.

    Parameters
    ----------
    head : Upstream
        ``DualDPT`` or ``DPT``.
    series : Series
        Which of the two it is.
    dtype : torch.dtype
        Dtype of convolutions (``Precision.head``). The last 1x1 convolutions stay in FP32.
    rays : bool
        Whether the ray branch is computed.
    """

    def __init__(self, head: Upstream, series: Series, dtype: torch.dtype, rays: bool = False) -> None:
        super().__init__()
        scratch = head.scratch
        self.dtype = dtype
        self.series = series
        self.has_uv = bool(head.pos_embed)
        self.norm: Upstream = head.norm
        self.projects: Upstream = head.projects.to(dtype)
        self.resize_layers: Upstream = head.resize_layers.to(dtype)
        self.adapters = nn.ModuleList(
            [scratch.layer1_rn, scratch.layer2_rn, scratch.layer3_rn, scratch.layer4_rn]
        ).to(dtype)
        self.fusion = nn.ModuleList(
            [scratch.refinenet1, scratch.refinenet2, scratch.refinenet3, scratch.refinenet4]
        ).to(dtype)
        self.neck: Upstream = scratch.output_conv1.to(dtype)
        # One branch with both channels (DualDPT), or one for depth and one for sky (DPT).
        branches = [scratch.output_conv2]
        if series is Series.MONOCULAR:
            branches.append(scratch.sky_output_conv2)
        self.hidden: Upstream = nn.ModuleList([branch[0] for branch in branches]).to(dtype)
        self.logits: Upstream = nn.ModuleList([branch[2] for branch in branches])
        self.ray_branch = RayBranch(scratch, dtype) if rays else None

    def forward(self, features: Features) -> tuple[Tensor, ...]:
        """The series' two maps, FP32 [B, H, W] each, then what :class:`RayBranch` gives."""
        grid_h, grid_w = features.grid
        height, width = grid_h * PATCH, grid_w * PATCH
        aspect = aspect_ratio(height, width, features.tokens[0].device)
        levels = [
            self.adapters[i](self._level(i, level, features.grid, aspect))
            for i, level in enumerate(features.levels)
        ]
        x = resize(self.neck(fuse_levels(self.fusion, levels)), height, width)
        if self.has_uv:
            x = add_uv(x, aspect)
        logits = [
            last(F.relu(hidden(x)).float())
            for hidden, last in zip(self.hidden, self.logits, strict=True)
        ]
        maps = activate(torch.cat(logits, dim=1) if len(logits) > 1 else logits[0], self.series)
        return maps if self.ray_branch is None else (*maps, *self.ray_branch(levels, aspect))

    def _level(self, i: int, level: Tensor, grid: tuple[int, int], aspect: Tensor) -> Tensor:
        """Project one level's tokens [B, P, C] and bring them to the level's scale.

        The 1x1 projection runs on the tokens, before they are laid out as an image, so that only the
        narrower result is transposed.
        """
        project = self.projects[i]
        weight = project.weight.reshape(project.out_channels, project.in_channels)
        x = F.linear(norm(self.norm, level).to(self.dtype), weight, project.bias)
        x = x.transpose(1, 2).reshape(x.shape[0], project.out_channels, *grid)
        if self.has_uv:
            x = add_uv(x, aspect)
        resized: Tensor = self.resize_layers[i](x)
        return resized
