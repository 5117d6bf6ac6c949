"""Depth -> pictures for people."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
_TINY = np.float32(1e-6)  # what the reference service adds to a depth before it divides by it
_STRIP = 2**16  # pixels worked on at once, which stay in a core's cache
_SAMPLE = 2**18  # pixels, at most four times as many, that percentiles are taken from
_FINE = 2**16  # levels before a gamma


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

    Of a large map the percentiles are those of a regular grid of its pixels.

    Parameters
    ----------
    depth : NDArray[np.float32]
        [H, W], positive.

    Returns
    -------
    NDArray[np.uint8]
        [H, W]; all black where depth is constant.
    """
    low, high = _clip_range(depth, tone)
    # Exactly 1 at the high percentile, and nothing divided by nothing where depth is constant.
    span = np.maximum(high - low, np.finfo(np.float32).eps * high)
    picture = np.empty(depth.shape, dtype=np.uint8)
    powers = _power_table(tone) if not tone.histogram_equalization and tone.gamma != 1 else None
    for rows in _strips(*depth.shape):
        shares = _inverse(depth[rows])
        shares -= low
        shares /= span
        np.clip(shares, 0, 1, out=shares)
        picture[rows] = _levels(shares) if powers is None else powers[_fine_levels(shares)]
    if not tone.histogram_equalization:
        return picture
    return np.asarray(cv2.LUT(picture, _equalising_table(picture, tone)), dtype=np.uint8)


def _clip_range(depth: NDArray[np.float32], tone: Tone) -> tuple[np.float32, np.float32]:
    """The inverse depths that become black and white."""
    step = max(1, math.isqrt(depth.size // _SAMPLE))
    sample = _inverse(depth[step // 2 :: step, step // 2 :: step])
    low, high = np.percentile(sample, (tone.clip_percentile_low, tone.clip_percentile_high))
    return np.float32(low), np.float32(high)


def _inverse(depth: NDArray[np.float32]) -> NDArray[np.float32]:
    inverse = np.maximum(depth, np.float32(0))
    inverse += _TINY
    return np.divide(np.float32(1), inverse, out=inverse)


def _strips(height: int, width: int) -> Iterator[slice]:
    rows = max(1, _STRIP // width)
    return (slice(start, start + rows) for start in range(0, height, rows))


def _levels(shares: NDArray[np.float32]) -> NDArray[np.uint8]:
    """0 to 1 as gray levels, rounded down."""
    return (shares * np.float32(_BINS - 1)).astype(np.uint8)


def _fine_levels(shares: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (shares * np.float32(_FINE - 1)).astype(np.uint16)


def _power_table(tone: Tone) -> NDArray[np.uint8]:
    """Fine level -> gray level, uint8 [65536]."""
    shares = np.linspace(0, 1, _FINE, dtype=np.float32)
    return _levels(np.power(shares, np.float32(tone.gamma)))


def _equalising_table(levels: NDArray[np.uint8], tone: Tone) -> NDArray[np.uint8]:
    """Gray level -> equalised gray level, uint8 [256]."""
    counts = cv2.calcHist([levels], [0], None, [_BINS], [0, _BINS])[:, 0].astype(np.float64)
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
