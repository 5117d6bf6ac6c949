"""Sky of the monocular networks: where it is, and how far it is said to be."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SKY_THRESHOLD = 0.3  # compute_sky_mask
FAR_QUANTILE = 0.99
MIN_PIXELS = 10  # upstream needs more than this many of a kind


def is_ground(sky: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where a sky map [H, W] says that there is no sky."""
    return np.asarray(sky < SKY_THRESHOLD)


def fill_sky(depth: NDArray[np.float32], sky: NDArray[np.float32]) -> NDArray[np.float32]:
    """Put the sky at the 99th percentile of the rest.

    Follows DepthAnything3Net._process_mono_sky_estimation, but with the exact percentile where upstream
    samples 100 000 random pixels, so the same photo always gives the same answer. Depth is returned as
    it is where there are no more than ten pixels of sky, or of anything else.

    Parameters
    ----------
    depth, sky : NDArray[np.float32]
        [H, W] each, in any unit.
    """
    ground = is_ground(sky)
    count = int(ground.sum())
    if count <= MIN_PIXELS or depth.size - count <= MIN_PIXELS:
        return depth
    far = np.quantile(depth[ground], FAR_QUANTILE)
    return np.where(ground, depth, far).astype(np.float32)
