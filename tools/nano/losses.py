"""Losses of training on rendered scenes. Depths and masks are [B, H, W]; a loss is a scalar."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from da3_export.losses import masked_mean

# Share of a common offset that the scale-invariant error ignores (Eigen et al. 2014; 0.85 is usual).
FORGIVEN = 0.85
# Weight of the term that keeps confidences above one (alpha in the losses of DUSt3R and DA3).
CONFIDENCE_REWARD = 0.2
# Baseline, in the scene's median depths, below which a camera's place counts less.
SHORT_BASELINE = 0.1
BASELINE_WEIGHT = 0.3  # of a baseline's relative error beside a radian of rotation


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


def confidence(predicted: Tensor, error: Tensor, mask: Tensor) -> Tensor:
    """Confidence c (1 and more) against the error e that it should predict: c e - alpha log c."""
    reward = CONFIDENCE_REWARD * torch.log(predicted)
    return masked_mean(predicted * error.detach() - reward, mask).mean()


def sky(depth: Tensor, sky_mask: Tensor, farthest: Tensor) -> Tensor:
    """How far the sky falls short of the image's ``farthest`` depth [B], in logarithms."""
    short = F.relu(torch.log(farthest)[:, None, None] - torch.log(depth))
    return masked_mean(short, sky_mask).mean()


def camera(intrinsics: Tensor, extrinsics: Tensor, lens: Tensor, pose: Tensor) -> Tensor:
    """Relative focal length against ``lens`` [N, 3, 3], and extrinsics against ``pose`` [N, 3, 4]."""
    focal = torch.log(intrinsics[:, (0, 1), (0, 1)] / lens[:, (0, 1), (0, 1)]).abs().mean()
    return focal + (extrinsics - pose).abs().mean()


def relative_pose(extrinsics: Tensor, pose: Tensor) -> Tensor:
    """Angle between the rotations, and distance between the centers as a share of the baseline.

    Both are extrinsics [N, 3, 4] relative to one of the cameras. A small angle is the norm of the
    rotations' difference over sqrt(2).
    """
    turn = _length((extrinsics - pose)[:, :, :3].flatten(1)) / math.sqrt(2)
    away = _length(center(extrinsics) - center(pose))
    share = away / (_length(center(pose)) + SHORT_BASELINE)
    return (turn + BASELINE_WEIGHT * share).mean()


def center(extrinsics: Tensor) -> Tensor:
    """Where the cameras of world-to-camera [N, 3, 4] stand, [N, 3]."""
    return -torch.einsum("nij,ni->nj", extrinsics[:, :, :3], extrinsics[:, :, 3])


def _length(vectors: Tensor) -> Tensor:
    """Length of [N, C], with a gradient at zero."""
    return torch.sqrt((vectors * vectors).sum(dim=1) + 1e-6)


def rays(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of rays, [B, h, w, 6] each."""
    return (predicted - target).abs().mean()
