"""Muon: momentum whose every matrix is made orthogonal (Jordan et al. 2024, Liu et al. 2025).

torch.optim.Muon is the same rule, but it always iterates in bfloat16, which most CPUs compute many times
slower than FP32, and one matrix at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
# Quintic whose iterates bring singular values from (0, 1] to about 0.7 to 1.2, and how many it takes.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# Brings an update's mean square to AdamW's, so that both take the same learning rates (Liu et al.).
MATCH = 0.2


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum with decoupled weight decay.

    Parameters
    ----------
    parameters : Iterable[nn.Parameter]
        With two or more dimensions; all but the first count as one.
    lr, weight_decay : float
        As AdamW's.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # there is no loss to return
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[len(parameter), parameter[0].numel()].append(parameter)
            for (rows, columns), parameters in by_shape.items():
                updates = orthogonal(torch.stack([self._push(p).flatten(1) for p in parameters]))
                length = group["lr"] * MATCH * max(rows, columns) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.reshape(parameter.shape), alpha=-length)

    def _push(self, parameter: nn.Parameter) -> Tensor:
        """The gradient, taken into the momentum, as far as that will have come a step on."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        momentum: Tensor = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        return parameter.grad.lerp(momentum, MOMENTUM)


def orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest orthogonal matrix to each of [B, rows, columns], by Newton-Schulz iterations."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT
