"""The nested model's composition: the any-view network's depth, scaled to the metric network's meters.

Follows upstream's NestedDepthAnything3Net step by step for the views of one scene, which share one scale
and one distance of the sky. Quantiles are exact where upstream samples 100 000 random pixels. Where
upstream fails an assertion, divides by zero or scales by zero, this code adds a warning instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.postprocess.sky import FAR_QUANTILE, MIN_PIXELS, is_ground

# Pixels at or below these depths take no part in the scale; upstream's compute_alignment_mask.
MIN_METRIC = 1e-2  # meters
MIN_DEPTH = 1e-3  # relative depth
SKY_DISTANCE = 200.0  # meters; the largest depth that sky gets

Map = NDArray[np.float32]


class Aligned(NamedTuple):
    """The composed outputs for one scene.

    Attributes
    ----------
    depth, confidence : NDArray[np.float32]
        [S, H, W]; depth in meters if ``metric``.
    extrinsics : NDArray[np.float32]
        [S, 3, 4], world to camera; the translation is scaled like the depth.
    scale : float
        Factor from the any-view depth to ``depth``.
    metric : bool
        False if no scale could be found; the depth is relative then.
    warnings : list[str]
        Sentences for the caller.
    """

    depth: Map
    confidence: Map
    extrinsics: NDArray[np.float32]
    scale: float
    metric: bool
    warnings: list[str]


def align(
    depth: Map,
    confidence: Map,
    extrinsics: NDArray[np.float32],
    metric_depth: Map,
    sky: Map,
    focal: Sequence[float],
    canonical_focal: float,
) -> Aligned:
    """Compose the outputs of the two networks for one scene.

    Parameters
    ----------
    depth, confidence : NDArray[np.float32]
        The any-view network's, [S, H, W]; the depth is relative.
    extrinsics : NDArray[np.float32]
        The any-view network's, [S, 3, 4].
    metric_depth, sky : NDArray[np.float32]
        The metric network's, [S, H, W].
    focal : Sequence[float]
        Mean of fx and fy of each view, in pixels of the model's input.
    canonical_focal : float
        Focal length in the same pixels at which ``metric_depth`` is in meters.
    """
    warnings: list[str] = []
    meters = (
        metric_depth * np.array([each / canonical_focal for each in focal], np.float32)[:, None, None]
    )
    ground = is_ground(sky)
    if ground.sum() <= MIN_PIXELS:
        warnings.append("Almost all of the image is sky; the scale was estimated on all of it.")
        ground = np.ones_like(ground)
    confident = ground & (confidence >= np.quantile(confidence[ground], 0.5))
    usable = (meters > MIN_METRIC) & (depth > MIN_DEPTH)
    scale = _least_squares_scale(meters, depth, confident & usable)
    if scale is None:
        warnings.append("No confident pixel has a metric depth; the depth is relative.")
    metric = scale is not None
    factor = 1.0 if scale is None else scale
    scaled = depth * np.float32(factor)
    far = float(np.quantile(scaled[ground], FAR_QUANTILE))
    if metric:
        far = min(far, SKY_DISTANCE)
    in_sky = ~is_ground(sky)
    moved = extrinsics.copy()
    moved[..., 3] *= np.float32(factor)
    return Aligned(
        depth=np.where(in_sky, np.float32(far), scaled),
        confidence=np.where(in_sky, np.float32(1), confidence),
        extrinsics=moved,
        scale=factor,
        metric=metric,
        warnings=warnings,
    )


def _least_squares_scale(meters: Map, depth: Map, mask: NDArray[np.bool_]) -> float | None:
    """The s that minimizes |meters - s * depth|^2 over the mask; None if no positive s does."""
    a, b = meters[mask].astype(np.float64), depth[mask].astype(np.float64)
    norm = float(b @ b)
    if norm <= 0.0:
        return None
    scale = float(a @ b) / norm
    return scale if np.isfinite(scale) and scale > 0 else None
