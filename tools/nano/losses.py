"""What training minimises. Depths are [B, H, W], masks bool [B, H, W], every loss a scalar."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Share of a common offset that the scale-invariant error forgives (Eigen et al. 2014; 0.85 is usual).
FORGIVEN = 0.85
GRADIENT_SCALES = 4
# Weight of the term that keeps confidences from falling to one (the DUSt3R and DA3 losses' alpha).
CONFIDENCE_REWARD = 0.2


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the masked pixels of each image, [B]; zero where there is none."""
    count = mask.sum(dim=(1, 2)).clamp(min=1)
    return torch.where(mask, values, 0).sum(dim=(1, 2)) / count


def log_residual(depth: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """log(depth) - log(target over its median), zero outside the mask."""
    pairs = zip(target, mask, strict=True)
    median = torch.stack([t[m].median() if m.any() else t.new_ones(()) for t, m in pairs])
    wanted = torch.log(torch.where(mask, target, 1)) - torch.log(median)[:, None, None]
    return torch.where(mask, torch.log(depth) - wanted, 0)


def scale_invariant(residual: Tensor, mask: Tensor) -> Tensor:
    """Root of the mean square minus :data:`FORGIVEN` times the square of the mean, per image."""
    mean = masked_mean(residual, mask)
    square = masked_mean(residual * residual, mask)
    return torch.sqrt((square - FORGIVEN * mean * mean).clamp(min=1e-8)).mean()


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


def confidence(predicted: Tensor, error: Tensor, mask: Tensor) -> Tensor:
    """Confidence (1 and more) against the error it should foretell: c e - alpha log c."""
    reward = CONFIDENCE_REWARD * torch.log(predicted)
    return masked_mean(predicted * error.detach() - reward, mask).mean()


def sky(depth: Tensor, sky_mask: Tensor, farthest: Tensor) -> Tensor:
    """How far the sky falls short of the image's ``farthest`` depth [B], in logarithms."""
    short = F.relu(torch.log(farthest)[:, None, None] - torch.log(depth))
    return masked_mean(short, sky_mask).mean()


def camera(intrinsics: Tensor, extrinsics: Tensor, target: Tensor) -> Tensor:
    """Relative focal length against ``target`` intrinsics [B, 3, 3]; pose against the identity.

    The pose of a single view is the identity.
    """
    focal = torch.log(intrinsics[:, (0, 1), (0, 1)] / target[:, (0, 1), (0, 1)]).abs().mean()
    pose = (extrinsics - torch.eye(3, 4, device=extrinsics.device)).abs().mean()
    return focal + pose


def rays(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of rays, [B, h, w, 6] each."""
    return (predicted - target).abs().mean()
