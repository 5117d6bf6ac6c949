"""Sky of the monocular networks: where it is, and the depth that it gets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Upstream's values: compute_sky_mask, _process_mono_sky_estimation.
SKY_THRESHOLD = 0.3
FAR_QUANTILE = 0.99
MIN_PIXELS = 10  # sky, and ground, count only with more pixels than this


def is_ground(sky: NDArray[np.float32]) -> NDArray[np.bool_]:
    """True where a sky map marks no sky."""
    return np.asarray(sky < SKY_THRESHOLD)


def fill_sky(depth: NDArray[np.float32], sky: NDArray[np.float32]) -> NDArray[np.float32]:
    """Set the depth of the sky to the 99th percentile of the rest.

    Follows upstream's DepthAnything3Net._process_mono_sky_estimation, but with the exact percentile
    where upstream samples 100 000 random pixels: the same photo always gives the same depth. Depth is
    returned unchanged if at most :data:`MIN_PIXELS` pixels are sky, or at most as many are not.

    Parameters
    ----------
    depth, sky : NDArray[np.float32]
        [H, W] each, or [S, H, W] for views that share one depth of the sky; the depth in any unit.
    """
    ground = is_ground(sky)
    count = int(ground.sum())
    if count <= MIN_PIXELS or depth.size - count <= MIN_PIXELS:
        return depth
    far = np.quantile(depth[ground], FAR_QUANTILE)
    return np.where(ground, depth, far).astype(np.float32)
