"""Upstream's own forward in eager FP32: what every engine is compared with."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from runtime.backends.base import RawOutputs
from runtime.eager.vit import IMAGENET_MEAN, IMAGENET_STD


def run_reference(upstream: nn.Module, images: NDArray[np.uint8]) -> RawOutputs:
    """Run upstream's modules, one view per image, on a batch of uint8 [B, H, W, 3]."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    with torch.inference_mode():
        pixels = torch.from_numpy(images).float().div(255)
        views = pixels.sub(mean).div(std).permute(0, 3, 1, 2).contiguous()[:, None]
        out = upstream(views)
        maps = (out.depth, out.depth_conf, out.intrinsics, out.extrinsics)
        return RawOutputs(*(tensor[:, 0].float().numpy() for tensor in maps))
