"""Which view of a scene is its reference: the one that sets the frame of all cameras.

Upstream's ``select_reference_view`` with its strategy "saddle_balanced", as arithmetic on tensors of any
number of views. Minima and maxima are taken by their indices, because ONNX Runtime has ReduceMin and
ReduceMax of this opset on the CPU only, and a single node there forbids a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from da3_runtime.network.positions import size_of
from da3_runtime.network_io import CHOOSE

FEWEST_VIEWS = 3  # below, the first view is the reference (upstream's THRESH_FOR_REF_SELECTION)


def reference_of(tokens: Tensor, wanted: Tensor) -> Tensor:
    """Index of the reference of each scene, int64 [B].

    Parameters
    ----------
    tokens : Tensor
        Class tokens of the views, FP32 [B, S, C].
    wanted : Tensor
        The index to take, or :data:`CHOOSE`, int64 [B].
    """
    views = tokens.shape[1]
    chosen = torch.argmin(unbalance(tokens), dim=1)
    enough = (size_of(views, tokens.device) >= FEWEST_VIEWS).to(torch.int64)
    return torch.where(wanted == CHOOSE, chosen * enough, wanted)


def unbalance(tokens: Tensor) -> Tensor:
    """How far each view is from the middle of its scene, [B, S]: least for the reference.

    The middle is that of three measures of the class token, each stretched to [0, 1] within the scene:
    its mean similarity to the other views, its length, and the variance of its direction.
    """
    length = torch.sqrt(torch.sum(tokens * tokens, dim=-1, keepdim=True))
    direction = tokens / length
    others = torch.clamp(size_of(tokens.shape[1], tokens.device) - 1, min=1)
    similarity = torch.matmul(direction, direction.transpose(1, 2))
    measures = (
        (torch.sum(similarity, dim=-1) - 1) / others,
        length[..., 0],
        _variance(direction),
    )
    off = [torch.abs(_stretched(measure) - 0.5) for measure in measures]
    return off[0] + off[1] + off[2]


def _variance(x: Tensor) -> Tensor:
    """Unbiased variance over the channels of [B, S, C]."""
    channels = x.shape[-1]
    deviation = x - torch.mean(x, dim=-1, keepdim=True)
    return torch.sum(deviation * deviation, dim=-1) / (channels - 1)


def _stretched(measure: Tensor) -> Tensor:
    """A measure [B, S] moved and scaled so that it spans [0, 1] over the views."""
    low = torch.gather(measure, 1, torch.argmin(measure, dim=1, keepdim=True))
    high = torch.gather(measure, 1, torch.argmax(measure, dim=1, keepdim=True))
    return (measure - low) / (high - low + 1e-8)
