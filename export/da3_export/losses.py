"""Losses that training and distillation share. Maps and masks are [B, H, W]; a loss is a scalar."""

from __future__ import annotations

import torch
from torch import Tensor

GRADIENT_SCALES = 4


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked pixels of each image, [B]; zero for an image without masked pixels."""
    count = mask.sum(dim=(1, 2)).clamp(min=1)
    return torch.where(mask, values, 0).sum(dim=(1, 2)) / count


def gradient_matching(residual: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute slope of the residual, at steps of 1, 2, 4 and 8 pixels (MegaDepth's)."""
    total = residual.new_zeros(())
    for step in (2**i for i in range(GRADIENT_SCALES)):
        values, inside = residual[:, ::step, ::step], mask[:, ::step, ::step]
        down = (values[:, 1:] - values[:, :-1]).abs()
        across = (values[:, :, 1:] - values[:, :, :-1]).abs()
        total = total + masked_mean(down, inside[:, 1:] & inside[:, :-1]).mean()
        total = total + masked_mean(across, inside[:, :, 1:] & inside[:, :, :-1]).mean()
    return total / GRADIENT_SCALES
