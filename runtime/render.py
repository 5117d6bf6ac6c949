"""Depth -> pictures for people."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.errors import SettingError

# Perceptually uniform colour maps, and turbo, by name.
COLOUR_MAPS = {
    "inferno": cv2.COLORMAP_INFERNO,
    "magma": cv2.COLORMAP_MAGMA,
    "plasma": cv2.COLORMAP_PLASMA,
    "viridis": cv2.COLORMAP_VIRIDIS,
    "cividis": cv2.COLORMAP_CIVIDIS,
    "turbo": cv2.COLORMAP_TURBO,
}
_BINS = 256
_TINY = 1e-6  # what the reference service adds to a depth before it divides by it


@dataclass(frozen=True)
class Tone:
    """How inverse depth becomes 8-bit gray; the fields are the request's.

    Attributes
    ----------
    clip_percentile_low, clip_percentile_high : float
        Percentiles of inverse depth that become black and white.
    histogram_equalization : bool
        Whether gray levels are spread by how many pixels have them.
    hist_clip_limit : float
        No level counts for more than this many times the mean of all levels; what is over it is spread
        over all. 0 for no limit.
    gamma : float
        Exponent; below one brightens the middle.
    """

    clip_percentile_low: float = 0.5
    clip_percentile_high: float = 99.5
    histogram_equalization: bool = True
    hist_clip_limit: float = 0.01
    gamma: float = 1.0


DEFAULT_TONE = Tone()


def inverse_depth_picture(depth: NDArray[np.float32], tone: Tone = DEFAULT_TONE) -> NDArray[np.uint8]:
    """Inverse depth as 8-bit gray, near is bright: the reference service's steps.

    Parameters
    ----------
    depth : NDArray[np.float32]
        [H, W], positive.

    Returns
    -------
    NDArray[np.uint8]
        [H, W]; all black where depth is constant.
    """
    inverse = 1.0 / (np.maximum(depth, 0) + np.float32(_TINY))
    percentiles = (tone.clip_percentile_low, tone.clip_percentile_high)
    low, high = np.percentile(inverse, percentiles).astype(np.float32)
    # Exactly 1 at the high percentile, and nothing divided by nothing where depth is constant.
    span = np.maximum(high - low, np.finfo(np.float32).eps * high)
    scaled = np.clip((inverse - low) / span, 0, 1)
    if not tone.histogram_equalization:
        return _levels(np.power(scaled, np.float32(tone.gamma)))
    levels = _levels(scaled)
    return np.asarray(cv2.LUT(levels, _equalising_table(levels, tone)), dtype=np.uint8)


def _levels(shares: NDArray[np.float32]) -> NDArray[np.uint8]:
    """0 to 1 as gray levels, rounded down."""
    return np.asarray(shares * np.float32(255), dtype=np.uint8)


def _equalising_table(levels: NDArray[np.uint8], tone: Tone) -> NDArray[np.uint8]:
    """Gray level -> equalised gray level, uint8 [256]."""
    counts = np.bincount(levels.ravel(), minlength=_BINS).astype(np.float64)
    if tone.hist_clip_limit > 0:
        limit = tone.hist_clip_limit * levels.size / _BINS
        over = np.maximum(counts - limit, 0).sum()
        counts = np.minimum(counts, limit) + over / _BINS
    cumulative = counts.cumsum()
    least = cumulative[cumulative > 0][0]
    spread = np.maximum(cumulative - least, 0) / max(cumulative[-1] - least, 1.0)
    return _levels(np.power(spread.astype(np.float32), np.float32(tone.gamma)))


def colour_picture(gray: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """A gray picture [H, W] through one of :data:`COLOUR_MAPS`, RGB [H, W, 3].

    Raises
    ------
    SettingError
        Naming the maps there are.
    """
    if name not in COLOUR_MAPS:
        raise SettingError(f"color_map {name!r} is not one of: {', '.join(COLOUR_MAPS)}.")
    bgr = cv2.applyColorMap(gray, COLOUR_MAPS[name])
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def encode_png(picture: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    """PNG bytes of a gray [H, W], 8 or 16 bits, or an 8-bit RGB [H, W, 3] picture."""
    if picture.ndim == 3:
        picture = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)  # type: ignore[assignment]
    _, encoded = cv2.imencode(".png", picture)
    return encoded.tobytes()
