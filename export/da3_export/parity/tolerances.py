"""How far an engine's outputs may be from the reference: every error rule and every tolerance.

Both follow the kind of an output (:data:`da3_runtime.network_io.OUTPUTS`), so a new output needs no
change here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.network_io import OUTPUTS, OutputKind, RawOutputs

# A camera translation below this share of the scene's mean depth counts as no motion. The camera of a
# single view stands still, so a trained network's translation is noise around zero.
STILL = 0.01


class Statistics(NamedTuple):
    """Errors of one output over a batch: mean, 99.9th percentile, maximum."""

    mean: float
    p999: float
    max: float

    @classmethod
    def of(cls, errors: Values) -> Statistics:
        """Statistics of the errors of every number."""
        return cls(float(errors.mean()), float(np.quantile(errors, 0.999)), float(errors.max()))


@dataclass(frozen=True)
class Tolerance:
    """Largest errors allowed; None is not checked."""

    mean: float | None = None
    p999: float | None = None
    max: float | None = None

    def allows(self, measured: Statistics) -> bool:
        """Whether every checked error is finite and within its bound."""
        pairs = zip((self.mean, self.p999, self.max), measured, strict=True)
        return all(bound is None or value <= bound for bound, value in pairs)


Values = NDArray[np.floating]
Tolerances = Mapping[OutputKind, Tolerance]

_CAMERA = (OutputKind.INTRINSICS, OutputKind.EXTRINSICS)
_MAPS = (OutputKind.MAP, OutputKind.SPARSE_MAP)
FP32: Tolerances = {
    **dict.fromkeys(OutputKind, Tolerance(max=1e-4)),
    **dict.fromkeys(_CAMERA, Tolerance(max=1e-3)),
    OutputKind.VIEW: Tolerance(max=0),
}
# DySample's sampling points are FP32 coordinates on a map up to 600 pixels wide, each right to a
# ten-thousandth of a pixel. Features from random weights differ wildly from pixel to pixel, so the maps
# show it. da3metric-large with a random SDT head at 84 x 1036: eager FP32 itself is 1.0e-4 from FP64
# (99.9th percentile 6.2e-5), ONNX Runtime 1.3e-4 from eager FP32.
FP32_SDT: Tolerances = {**FP32, **dict.fromkeys(_MAPS, Tolerance(p999=1e-4, max=3e-4))}
FP16: Tolerances = {
    **dict.fromkeys(OutputKind, Tolerance(mean=3e-3, p999=3e-2)),
    OutputKind.VIEW: Tolerance(max=0),
}
_UNBOUND: Tolerances = {**dict.fromkeys(OutputKind, Tolerance()), OutputKind.VIEW: Tolerance(max=0)}
# Errors that always pass; larger ones are compared with those of PyTorch (parity/eager_bf16.py).
# A camera is a few numbers, whose errors vary by ten times.
BF16: Tolerances = {**_UNBOUND, **{kind: FP16[kind] for kind in _CAMERA}}
# Products of 7-bit weights and 8-bit activations: depth for the eye, not for a survey.
INT8: Tolerances = {**_UNBOUND, **dict.fromkeys(_MAPS, Tolerance(mean=3e-2))}
# In how far photos keep the order of depths: 1 - Spearman's rank correlation.
ORDER = "order"
ORDER_BOUND = Tolerance(max=1e-2)

Rule = Callable[[Values, Values, RawOutputs], Values]


def _map(got: Values, want: Values, _: RawOutputs) -> Values:
    """|a - b| / |b| of a map of positive numbers."""
    return np.abs(got - want) / np.abs(want)


def _sparse_map(got: Values, want: Values, _: RawOutputs) -> Values:
    """|a - b| / max(|b|, 1) of a map that is zero over most of a photo."""
    return np.abs(got - want) / np.maximum(np.abs(want), 1)


def _rays(got: Values, want: Values, _: RawOutputs) -> Values:
    """|a - b| over the length of the ray, direction and origin together."""
    length: Values = np.linalg.norm(want, axis=-1, keepdims=True)
    errors: Values = np.abs(got - want) / length
    return errors


def _intrinsics(got: Values, want: Values, _: RawOutputs) -> Values:
    """|a - b| / |b| of fx, fy, cx and cy, the entries that are not constants."""
    focal_and_center = np.s_[..., (0, 1, 0, 1), (0, 1, 2, 2)]
    return _map(got[focal_and_center], want[focal_and_center], _)


def _rotation(got: Values, want: Values, _: RawOutputs) -> Values:
    """|a - b|, as the entries of a rotation are at most one."""
    return np.abs(got - want)[..., :3]


def _translation(got: Values, want: Values, reference: RawOutputs) -> Values:
    """|a - b| over the length of b, or over :data:`STILL` times the mean depth if that is longer."""
    length: Values = np.linalg.norm(want[..., 3], axis=-1, keepdims=True)
    scene = reference.depth.mean(axis=(-3, -2, -1), dtype=np.float64)[:, None, None]
    moved: Values = np.abs(got - want)[..., 3] / np.maximum(length, STILL * scene)
    return moved


def _view(got: Values, want: Values, _: RawOutputs) -> Values:
    """0 for the same view, 1 for another."""
    return np.not_equal(got, want).astype(np.float64)


# Rules of every kind, by name in the report; an empty name stands for the output's own.
_RULES: dict[OutputKind, dict[str, Rule]] = {
    OutputKind.MAP: {"": _map},
    OutputKind.SPARSE_MAP: {"": _sparse_map},
    OutputKind.RAYS: {"": _rays},
    OutputKind.INTRINSICS: {"": _intrinsics},
    OutputKind.EXTRINSICS: {"rotation": _rotation, "translation": _translation},
    OutputKind.VIEW: {"": _view},
}


def relative_errors(outputs: RawOutputs, reference: RawOutputs) -> dict[str, Values]:
    """Error of every number of every output that the reference has, by name in the report."""
    errors = {}
    for name, output in OUTPUTS.items():
        got, want = getattr(outputs, name), getattr(reference, name)
        if want is not None:
            want = want.astype(np.float64)
            for part, rule in _RULES[output.kind].items():
                errors[part or name] = rule(got, want, reference)
    return errors


def order_error(depth: Values, reference: Values) -> Values:
    """1 - Spearman's rank correlation of each map of depths [B, S, H, W], over its pixels."""
    maps = (each.reshape(-1, each.shape[-2] * each.shape[-1]) for each in (depth, reference))
    ranks = (each.argsort().argsort() for each in maps)
    return np.array([1 - np.corrcoef(*pair)[0, 1] for pair in zip(*ranks, strict=True)])


def bounds_by_name(tolerances: Tolerances) -> dict[str, Tolerance]:
    """Tolerance of every name that a report can have."""
    return {
        part or name: tolerances[output.kind]
        for name, output in OUTPUTS.items()
        for part in _RULES[output.kind]
    }
