"""The SDT head: Simple Depth Transformer of the AnyDepth paper (arXiv 2601.02760).

One fused map instead of a pyramid: each level's patches are projected with its token, the four are
summed with learned weights, and the sum is upsampled 16 times by four DySample steps. Parameter names
are those of the fine-tuned heads that exist.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from da3_runtime.network.dpt import activate
from da3_runtime.network.dysample import DySample
from da3_runtime.network.precision import FP32Conv2d, full, low
from da3_runtime.network.vit import Features
from da3_runtime.variants import PATCH, Series

LEVELS = 4
HIDDEN = 32


class WeightedFusion(nn.Module):
    """Four levels of patches and tokens to one [B, P, F]."""

    def __init__(self, channels: int, fused: int) -> None:
        super().__init__()
        self.readout_projects = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * channels, channels), nn.GELU()) for _ in range(LEVELS)
        )
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, fused, bias=False), nn.GELU()) for _ in range(LEVELS)
        )
        self.layer_weights = nn.Parameter(torch.ones(LEVELS))

    def forward(self, levels: list[Tensor], tokens: list[Tensor]) -> Tensor:
        """Patches [B, P, C] and token [B, C] of each level, FP32, to [B, P, F] in FP32."""
        shares = torch.softmax(full(self.layer_weights), dim=0)
        total: Tensor | None = None
        for i, (patches, token) in enumerate(zip(levels, tokens, strict=True)):
            readout, _ = self.readout_projects[i].children()
            assert isinstance(readout, nn.Linear)
            # The token joins every patch, so its half of the product is the same for all of them.
            of_patch, of_token = readout.weight.split(patches.shape[-1], dim=1)
            by_token = F.linear(low(token, readout), of_token, readout.bias)
            x = F.gelu(F.linear(low(patches, readout), of_patch) + by_token[:, None])
            x = full(self.projections[i](x)) * shares[i]
            total = x if total is None else total + x
        assert total is not None
        return total


class DetailEnhancer(nn.Module):
    """relu(BN(depthwise 3x3) + x)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.dwconv(x)) + x)


class Upsample(nn.Module):
    """Four times larger: twice { DySample, conv 3x3, BN, ReLU }."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dysample1 = self._step(channels)
        self.dysample2 = self._step(channels)

    @staticmethod
    def _step(channels: int) -> nn.Sequential:
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        return nn.Sequential(DySample(channels), conv, nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        larger: Tensor = self.dysample2(self.dysample1(x))
        return larger


class SDT(nn.Module):
    """The head's parameters and its logits.

    Parameters
    ----------
    channels : int
        Feature width of a level (twice the embedding width where levels concatenate).
    fused : int
        Width of the fused map.
    outputs : int
        Channels of the output.
    """

    def __init__(self, channels: int, fused: int, outputs: int) -> None:
        super().__init__()
        self.weighted_fusion = WeightedFusion(channels, fused)
        self.detail_enhancer = DetailEnhancer(fused)
        self.upsample_1 = Upsample(fused)
        self.refinement_1 = self._refinement(fused)
        self.upsample_2 = Upsample(fused)
        self.refinement_2 = self._refinement(fused)
        self.output_conv = nn.Sequential(
            nn.Conv2d(fused, fused // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(fused // 2, HIDDEN, 3, padding=1),
            nn.ReLU(),
            FP32Conv2d(HIDDEN, outputs, 1),
        )

    @staticmethod
    def _refinement(channels: int) -> nn.Sequential:
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, features: Features) -> Tensor:
        """Logits [B, outputs, H, W] in FP32, at the image's exact size.

        Sixteen times the patch grid is more than fourteen times, so the logits are resized bilinearly,
        by pixel centers, as DySample places its points.
        """
        grid_h, grid_w = features.grid
        x = self.weighted_fusion(features.levels, features.tokens)
        x = low(x, self.detail_enhancer.dwconv)
        x = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], grid_h, grid_w)
        x = self.detail_enhancer(x)
        x = self.refinement_1(self.upsample_1(x))
        x = self.refinement_2(self.upsample_2(x))
        size = (grid_h * PATCH, grid_w * PATCH)
        return F.interpolate(self.output_conv(x), size=size, mode="bilinear", align_corners=False)


def fold_batch_norms(head: SDT) -> None:
    """Fold every batch normalization into the convolution before it, in place, in FP32.

    BN(conv(x)) = (w * g / sqrt(var + eps)) x + (b - mean) * g / sqrt(var + eps) + beta.
    """
    enhancer = head.detail_enhancer
    _fold(enhancer.dwconv, enhancer.norm)
    enhancer.norm = nn.Identity()  # type: ignore[assignment]
    steps = [s for u in (head.upsample_1, head.upsample_2) for s in (u.dysample1, u.dysample2)]
    for sequence, at in [*((s, 1) for s in steps), (head.refinement_1, 0), (head.refinement_2, 0)]:
        conv, batch_norm = sequence[at], sequence[at + 1]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(batch_norm, nn.BatchNorm2d)
        _fold(conv, batch_norm)
        sequence[at + 1] = nn.Identity()


def _fold(conv: nn.Conv2d, batch_norm: nn.BatchNorm2d) -> None:
    assert batch_norm.running_mean is not None
    assert batch_norm.running_var is not None
    with torch.no_grad():
        gain = batch_norm.weight / torch.sqrt(batch_norm.running_var + batch_norm.eps)
        bias = conv.bias if conv.bias is not None else torch.zeros_like(gain)
        shifted = (bias - batch_norm.running_mean) * gain + batch_norm.bias
        conv.weight = nn.Parameter(conv.weight * gain.reshape(-1, 1, 1, 1), requires_grad=False)
        conv.bias = nn.Parameter(shifted, requires_grad=False)


class SDTHead(nn.Module):
    """An SDT as the network runs it: batch norms folded, maps activated.

    Parameters
    ----------
    head : SDT
        In FP32 and eval mode; changed in place.
    series : Series
        Decides the second map.
    """

    def __init__(self, head: SDT, series: Series) -> None:
        super().__init__()
        self.series = series
        self.sdt = head
        fold_batch_norms(head)

    def forward(self, features: Features) -> tuple[Tensor, Tensor]:
        """The series' two maps, FP32 [V, H, W] each."""
        return activate(self.sdt(features), self.series)
