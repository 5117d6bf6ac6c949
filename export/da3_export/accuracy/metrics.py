"""The field's errors of depth maps and of camera poses."""

from __future__ import annotations

from enum import StrEnum
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.postprocess.poses import relative_to

DELTA = 1.25
# Depths below it count as it, in the unit of the known depth: logarithms and ratios need positive ones.
NEAREST = 1e-3

Map = NDArray[np.floating]


class Alignment(StrEnum):
    """How a depth map is fitted to the known depth of its photo before the two are compared."""

    MEDIAN = "median"  # one factor: the median of the known depth over the median of the depth
    LEAST_SQUARES = "least-squares"  # scale and shift of depth, not of inverse depth or logarithms
    NONE = "none"


class Accuracy(NamedTuple):
    """Errors of depth d over the pixels whose depth t is known.

    Attributes
    ----------
    abs_rel : float
        Mean |d - t| / t.
    rmse : float
        Root of the mean square of d - t, in the unit of the known depth.
    log10 : float
        Mean of the absolute difference of the decimal logarithms.
    delta1, delta2, delta3 : float
        Share of pixels where the larger of d / t and t / d is below 1.25, 1.25^2 and 1.25^3.
    silog : float
        100 times the standard deviation of ln d - ln t (scale-invariant logarithmic error; KITTI's).
    """

    abs_rel: float
    rmse: float
    log10: float
    delta1: float
    delta2: float
    delta3: float
    silog: float


def is_known(truth: Map) -> NDArray[np.bool_]:
    """Pixels whose depth is known, bool of the same shape: positive and finite."""
    return np.asarray(np.isfinite(truth) & (truth > 0))


def fit(depth: Map, truth: Map, alignment: Alignment) -> tuple[float, float]:
    """Scale and shift that fit depth maps [..., H, W] to the known depth of the same shape."""
    known = is_known(truth)
    d, t = depth[known].astype(np.float64), truth[known].astype(np.float64)
    if alignment is Alignment.NONE:
        return 1.0, 0.0
    if alignment is Alignment.MEDIAN:
        return float(np.median(t) / max(np.median(d), np.finfo(np.float64).tiny)), 0.0
    spread = float(np.var(d))
    scale = float(np.mean((d - d.mean()) * (t - t.mean()))) / spread if spread else 0.0
    return scale, float(t.mean() - scale * d.mean())


def accuracy(
    depth: Map, truth: Map, alignment: Alignment = Alignment.MEDIAN, farthest: float = np.inf
) -> Accuracy:
    """Accuracy of depth maps [..., H, W] against the known depth of the same shape.

    Parameters
    ----------
    alignment : Alignment
        What is fitted first.
    farthest : float
        Fitted depths beyond it count as it.
    """
    known = is_known(truth)
    scale, shift = fit(depth, truth, alignment)
    t = truth[known].astype(np.float64)
    nearest = min(NEAREST, float(t.min()))
    d = np.clip(depth[known].astype(np.float64) * scale + shift, nearest, farthest)
    ratio = np.maximum(d / t, t / d)
    log = np.log(d / t)
    return Accuracy(
        float(np.mean(np.abs(d - t) / t)),
        float(np.sqrt(np.mean((d - t) ** 2))),
        float(np.mean(np.abs(log)) / np.log(10)),
        float(np.mean(ratio < DELTA)),
        float(np.mean(ratio < DELTA**2)),
        float(np.mean(ratio < DELTA**3)),
        100 * float(np.std(log)),
    )


def pose_errors(found: Map, truth: Map) -> list[float]:
    """Error of each pair of views in degrees, pairs in the order of ``itertools.combinations``.

    It is the larger of two angles: between the found and the true rotation from the first camera to the
    second, and between the found and the true direction in which the second sees the first. If both
    stand at one place, only the rotation counts.

    Parameters
    ----------
    found, truth : Map
        World to camera, [S, 3, 4]; worlds and units may differ.
    """
    errors = []
    for first, second in combinations(range(len(found)), 2):
        a, b = (relative_to(each[[first, second]], 0)[1] for each in (found, truth))
        cosine = (np.trace(a[:, :3] @ b[:, :3].T) - 1) / 2
        lengths = np.linalg.norm(a[:, 3]), np.linalg.norm(b[:, 3])
        if lengths[1] > 0:
            cosine = min(cosine, a[:, 3] @ b[:, 3] / max(lengths[0] * lengths[1], 1e-12))
        errors.append(float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))))
    return errors


def pose_auc(errors: list[float], threshold: float) -> float:
    """Area under the curve of recall over the error up to a threshold, over the threshold, 0 to 1.

    The recall at e is the share of pairs whose error is at most e. It is a step function, and its
    integral from 0 to the threshold is the mean over pairs of max(0, threshold - error).
    """
    return float(np.mean(np.maximum(0.0, 1 - np.asarray(errors) / threshold)))
