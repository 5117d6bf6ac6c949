"""Optimizers of training and distillation: Muon for hidden matrices, AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

PEAK_RATE = 1e-3
MATRIX_PEAK_RATE = 3e-3  # of the matrices that Muon updates
OUTPUTS = 8  # a matrix with this many rows or fewer makes maps or offsets, which AdamW updates
WARM_UP = 200  # steps
WEIGHT_DECAY = 0.03


class Optimizers:
    """Both optimizers of a network.

    torch.optim.Muon takes matrices only, so a convolution is given to it as a matrix with one row per
    output channel, which shares the convolution's memory.

    Parameters
    ----------
    network : nn.Module
        The network, on its device; all of its parameters are updated.
    hidden : Iterable[nn.Module]
        Parts of it whose matrices and convolutions Muon updates.
    but_not : Iterable[nn.Module]
        Parts of ``hidden`` that AdamW updates nevertheless.
    """

    def __init__(
        self, network: nn.Module, hidden: Iterable[nn.Module], but_not: Iterable[nn.Module] = ()
    ) -> None:
        left_out = {id(p) for part in but_not for p in part.parameters()}
        self._matrices = [
            p for part in hidden for p in part.parameters() if is_matrix(p) and id(p) not in left_out
        ]
        by_muon = {id(p) for p in self._matrices}
        rest = [p for p in network.parameters() if id(p) not in by_muon]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)
        self._flat = [nn.Parameter(p.detach().view(len(p), -1)) for p in self._matrices]
        self._muon = torch.optim.Muon(
            self._flat,
            lr=MATRIX_PEAK_RATE,
            weight_decay=WEIGHT_DECAY,
            # Scales an update to AdamW's mean square, so that both take similar learning rates.
            adjust_lr_fn="match_rms_adamw",
        )

    def step(self, share: float) -> None:
        """Update every parameter that has a gradient, at this share of the peak rates."""
        for flat, parameter in zip(self._flat, self._matrices, strict=True):
            flat.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for optimizer, peak in ((self._adamw, PEAK_RATE), (self._muon, MATRIX_PEAK_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = share * peak
            optimizer.step()

    def state_dict(self) -> list[dict[str, object]]:
        """State that :meth:`load_state_dict` takes."""
        return [self._adamw.state_dict(), self._muon.state_dict()]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        """Continue from a state that :meth:`state_dict` gave."""
        for optimizer, state in zip((self._adamw, self._muon), states, strict=True):
            optimizer.load_state_dict(state)


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether it maps many values to many; a depthwise convolution does not."""
    return parameter.ndim >= 2 and parameter.shape[1] > 1 and len(parameter) > OUTPUTS


def share_of_peak(step: int, steps: int) -> float:
    """Share of the peak rates at a step: a warm-up, then half a cosine down to a hundredth."""
    warm = min(1.0, (step + 1) / min(WARM_UP, max(1, steps // 4)))
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))
