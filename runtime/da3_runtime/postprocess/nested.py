"""The nested model's composition: any-view depth, scaled to metres by the metric network's.

Follows NestedDepthAnything3Net step by step, for one image, with exact quantiles where upstream samples
100 000 random pixels. Where upstream asserts, divides by nothing or multiplies by zero, this answers
with a warning.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.postprocess.sky import FAR_QUANTILE, MIN_PIXELS, is_ground

MIN_METRIC = 1e-2  # metres (compute_alignment_mask)
MIN_DEPTH = 1e-3
SKY_DISTANCE = 200.0  # metres, the farthest that sky is said to be

Map = NDArray[np.float32]


class Aligned(NamedTuple):
    """The composed answer for one image.

    Attributes
    ----------
    depth, confidence : NDArray[np.float32]
        [H, W]; depth in metres if ``metric``.
    extrinsics : NDArray[np.float32]
        [3, 4], translation scaled with the depth.
    scale : float
        Factor that the any-view depth was multiplied with.
    metric : bool
        False where no scale could be found: the depth is relative then.
    warnings : list[str]
        What a caller should know.
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
    focal: float,
    canonical_focal: float,
) -> Aligned:
    """Compose the outputs of the two networks for one image.

    Parameters
    ----------
    depth, confidence : NDArray[np.float32]
        Any-view, [H, W], depth relative.
    extrinsics : NDArray[np.float32]
        Any-view, [3, 4].
    metric_depth, sky : NDArray[np.float32]
        Metric network, [H, W].
    focal : float
        Mean focal length in pixels of the model's input.
    canonical_focal : float
        Focal length at which ``metric_depth`` is in metres.
    """
    warnings: list[str] = []
    metres = metric_depth * np.float32(focal / canonical_focal)
    ground = is_ground(sky)
    if ground.sum() <= MIN_PIXELS:
        warnings.append("Almost all of the image is sky; the scale was estimated on all of it.")
        ground = np.ones_like(ground)
    confident = ground & (confidence >= np.quantile(confidence[ground], 0.5))
    usable = (metres > MIN_METRIC) & (depth > MIN_DEPTH)
    scale = _least_squares_scale(metres, depth, confident & usable)
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
    moved[:, 3] *= np.float32(factor)
    return Aligned(
        depth=np.where(in_sky, np.float32(far), scaled),
        confidence=np.where(in_sky, np.float32(1), confidence),
        extrinsics=moved,
        scale=factor,
        metric=metric,
        warnings=warnings,
    )


def _least_squares_scale(metres: Map, depth: Map, mask: NDArray[np.bool_]) -> float | None:
    """S that minimises |metres - s * depth|^2 over the mask; None where there is nothing to fit."""
    a, b = metres[mask].astype(np.float64), depth[mask].astype(np.float64)
    norm = float(b @ b)
    if norm <= 0.0:
        return None
    scale = float(a @ b) / norm
    return scale if np.isfinite(scale) and scale > 0 else None
