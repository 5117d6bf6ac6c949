"""The DPT heads: four levels of patch features -> full-resolution maps.

:class:`DPTHead` is upstream's DualDPT (depth and confidence, and rays) or its DPT (depth and sky), with
their parameter names. It differs in two places from their forward passes, by rounding only:

- The ray branch, up to a third of the work of the rest, is computed only on request.
- Each fusion block's 1x1 convolution runs before its bilinear upsampling instead of after, at a quarter
  of the cost. Both are linear, and the interpolation weights sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from da3_runtime.network.positions import aspect_ratio, uv_embedding
from da3_runtime.network.precision import FP32Conv2d, low, norm
from da3_runtime.network.sizes import Sizes
from da3_runtime.network.vit import Features
from da3_runtime.variants import PATCH, Series

HIDDEN = 32  # channels before the last 1x1 convolution
RAY_CHANNELS = 7  # three of the direction, three of the origin, confidence
AUX = "_aux"  # end of the names of the ray branch's parts


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Bilinear resize with aligned corners, as every resize inside upstream's DPT heads."""
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=True)


def add_uv(x: Tensor, aspect: Tensor) -> Tensor:
    """Add upstream's UV positional embedding for an image of this width over height."""
    by_column, by_row = uv_embedding(x.shape[2], x.shape[3], x.shape[1], aspect)
    return x + by_column.to(x.dtype) + by_row.to(x.dtype)


def activate(logits: Tensor, series: Series) -> tuple[Tensor, Tensor]:
    """Logits [V, 2, H, W] to the two maps of a series, [V, H, W] each.

    Depth = exp(logit); confidence = exp(logit) + 1; sky = relu(logit).
    """
    depth, other = logits[:, 0], logits[:, 1]
    if series is Series.ANYVIEW:
        return torch.exp(depth), torch.exp(other) + 1
    return torch.exp(depth), F.relu(other)


def _conv3x3(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class ResidualUnit(nn.Module):
    """Two convolutions around which the input is added (upstream's ResidualConvUnit)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(features, features)
        self.conv2 = _conv3x3(features, features)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.conv2(F.relu(self.conv1(F.relu(x))))
        return inner + x


class FusionBlock(nn.Module):
    """Merge a level into the coarser ones and upsample (upstream's FeatureFusionBlock)."""

    def __init__(self, features: int, has_lateral: bool) -> None:
        super().__init__()
        if has_lateral:
            self.resConfUnit1 = ResidualUnit(features)
        self.resConfUnit2 = ResidualUnit(features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, top: Tensor, lateral: Tensor | None, size: Sequence[int]) -> Tensor:
        if lateral is not None:
            top = top + self.resConfUnit1(lateral)
        return resize(self.out_conv(self.resConfUnit2(top)), *size)


class DPTHead(nn.Module):
    """The head of a series: DualDPT of the any-view networks, DPT of the monocular ones.

    Parameters
    ----------
    sizes : Sizes
        Size of the network.
    series : Series
        Which of the two.
    """

    def __init__(self, sizes: Sizes, series: Series) -> None:
        super().__init__()
        self.series = series
        features, channels = sizes.features, sizes.out_channels
        is_dual = series is Series.ANYVIEW
        self.norm = nn.LayerNorm(sizes.feature_width) if is_dual else nn.Identity()
        self.projects = nn.ModuleList(nn.Conv2d(sizes.feature_width, count, 1) for count in channels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
            ]
        )
        adapters = [_conv3x3(count, features, bias=False) for count in channels]
        self.scratch = nn.ModuleDict(
            {f"layer{i}_rn": adapter for i, adapter in enumerate(adapters, start=1)}
        )
        self.scratch.update(_fusion_blocks(features))
        self.scratch["output_conv1"] = _conv3x3(features, features // 2)
        self.scratch["output_conv2"] = _branch(features, 2 if is_dual else 1)
        if is_dual:
            self.scratch.update(_fusion_blocks(features, AUX))
            self.scratch[f"output_conv1{AUX}"] = nn.ModuleList(_ray_neck(features) for _ in channels)
            shared = nn.LayerNorm(HIDDEN)
            self.scratch[f"output_conv2{AUX}"] = nn.ModuleList(
                _branch(features, RAY_CHANNELS, shared) for _ in channels
            )
        else:
            self.scratch["sky_output_conv2"] = _branch(features, 1)

    def forward(self, features: Features, rays: bool = False) -> tuple[Tensor, ...]:
        """Compute the maps.

        Parameters
        ----------
        rays : bool
            Whether to compute the ray branch too; any-view heads only.

        Returns
        -------
        tuple[Tensor, ...]
            The series' two maps, FP32 [V, H, W] each, for the V views of all scenes. With ``rays`` also
            rays [V, 8 grid_h, 8 grid_w, 6] and their confidence [V, 8 grid_h, 8 grid_w], FP32.
        """
        grid_h, grid_w = features.grid
        height, width = grid_h * PATCH, grid_w * PATCH
        aspect = aspect_ratio(height, width, features.tokens[0].device)
        levels = [
            self.scratch[f"layer{i + 1}_rn"](self._level(i, level, features.grid, aspect))
            for i, level in enumerate(features.levels)
        ]
        x = resize(self.scratch["output_conv1"](self._fuse(levels)), height, width)
        if self.series is Series.ANYVIEW:
            x = add_uv(x, aspect)
            logits = self._logits(self.scratch["output_conv2"], x)
        else:
            branches = (self.scratch["output_conv2"], self.scratch["sky_output_conv2"])
            logits = torch.cat([self._logits(branch, x) for branch in branches], dim=1)
        maps = activate(logits, self.series)
        return (*maps, *self._rays(levels, aspect)) if rays else maps

    def ray_branch(self) -> list[nn.Module]:
        """The modules that only the ray branch uses."""
        return [module for name, module in self.scratch.items() if name.endswith(AUX)]

    def drop_unused(self, rays: bool) -> None:
        """Free the parts that no forward pass reads: the ray branch, or three of its four levels."""
        for name in [name for name in self.scratch if name.endswith(AUX)]:
            part = self.scratch[name]
            if not rays:
                del self.scratch[name]
            elif isinstance(part, nn.ModuleList):
                self.scratch[name] = part[-1:]

    def _level(self, i: int, level: Tensor, grid: tuple[int, int], aspect: Tensor) -> Tensor:
        """Project one level's tokens [B, P, C] and bring them to the level's scale.

        The 1x1 projection runs on the tokens, before they are laid out as an image, so that only the
        narrower result is transposed.
        """
        project = self.projects[i]
        assert isinstance(project, nn.Conv2d)
        weight = project.weight.reshape(project.out_channels, project.in_channels)
        x = F.linear(low(norm(self.norm, level), project), weight, project.bias)
        x = x.transpose(1, 2).reshape(x.shape[0], project.out_channels, *grid)
        if self.series is Series.ANYVIEW:
            x = add_uv(x, aspect)
        resized: Tensor = self.resize_layers[i](x)
        return resized

    def _fuse(self, levels: list[Tensor], suffix: str = "") -> Tensor:
        """Fuse four levels, coarsest first, into one map at twice the finest one's size."""
        l1, l2, l3, l4 = levels
        b1, b2, b3, b4 = (self.scratch[f"refinenet{i}{suffix}"] for i in (1, 2, 3, 4))
        top = b4(l4, None, l3.shape[2:])
        top = b3(top, l3, l2.shape[2:])
        top = b2(top, l2, l1.shape[2:])
        fused: Tensor = b1(top, l1, (2 * l1.shape[2], 2 * l1.shape[3]))
        return fused

    @staticmethod
    def _logits(branch: nn.Module, x: Tensor) -> Tensor:
        hidden, last = branch.children()
        logits: Tensor = last(F.relu(hidden(x)))
        return logits

    def _rays(self, levels: list[Tensor], aspect: Tensor) -> tuple[Tensor, Tensor]:
        """The ray branch: a fusion of its own on the same levels.

        Of its four levels' outputs upstream returns only the finest, so only that one is computed. Rays
        are the logits themselves; confidence = exp(logit) + 1.
        """
        necks, branches = (self.scratch[f"output_conv{i}{AUX}"] for i in (1, 2))
        assert isinstance(necks, nn.ModuleList)
        assert isinstance(branches, nn.ModuleList)
        hidden, hidden_norm, last = branches[-1].children()
        x = hidden(add_uv(necks[-1](self._fuse(levels, AUX)), aspect))
        x = F.relu(norm(hidden_norm, x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        logits = last(x).permute(0, 2, 3, 1)
        return logits[..., :6], torch.exp(logits[..., 6]) + 1


def _fusion_blocks(features: int, suffix: str = "") -> dict[str, nn.Module]:
    """The four fusion blocks of a branch, by upstream's names; the coarsest comes last."""
    return {f"refinenet{i}{suffix}": FusionBlock(features, has_lateral=i < 4) for i in (1, 2, 3, 4)}


def _ray_neck(features: int) -> nn.Sequential:
    """Five convolutions between the full and half the width."""
    half = features // 2
    widths = ((features, half), (half, features), (features, half), (half, features), (features, half))
    return nn.Sequential(*(_conv3x3(*width) for width in widths))


def _branch(features: int, outputs: int, hidden_norm: nn.LayerNorm | None = None) -> nn.ModuleDict:
    """The last two convolutions, by their indices in upstream's sequence, and a norm between them."""
    hidden, last = _conv3x3(features // 2, HIDDEN), FP32Conv2d(HIDDEN, outputs, 1)
    if hidden_norm is None:
        return nn.ModuleDict({"0": hidden, "2": last})
    return nn.ModuleDict({"0": hidden, "2": hidden_norm, "5": last})
