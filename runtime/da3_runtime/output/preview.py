"""Depth -> pictures for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import SettingError
from da3_runtime.output.percentile import percentile_neighbours
from da3_runtime.util.parallel import on_cores, strips

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
_STRIP = 2**19  # pixels worked on at once: with fewer, threads wait for the interpreter's lock
_STEEPEST = 1e30  # levels in a unit of inverse depth; with more it is constant

Level = TypeVar("Level", np.uint8, np.uint16)


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
    if tone.histogram_equalization:
        gray = _levels_of(depth, tone, np.uint8)
        table = _equalising_table(gray, tone)
        on_cores(lambda rows: cv2.LUT(gray[rows], table, dst=gray[rows]), _parts(gray))
        return gray
    if tone.gamma == 1:
        return _levels_of(depth, tone, np.uint8)
    # Fine levels, so that a gamma that brightens the dark has something to brighten.
    powers = np.power(np.linspace(0, 1, 2**16, dtype=np.float32), np.float32(tone.gamma))
    return _rounded_down(powers)[_levels_of(depth, tone, np.uint16)]


def _clip_range(depth: NDArray[np.float32], tone: Tone) -> tuple[np.float32, np.float32]:
    """The inverse depths that become black and white."""

    def inverse(near: float, far: float, share: float) -> np.float32:
        # In single precision, as of the pixels.
        nearer, farther = (np.float32(1) / (np.float32(max(value, 0)) + _TINY) for value in (near, far))
        return nearer + (farther - nearer) * np.float32(share)

    percents = 100 - tone.clip_percentile_low, 100 - tone.clip_percentile_high
    black, white = percentile_neighbours(depth, percents)
    return inverse(*black), inverse(*white)


def _parts(picture: NDArray[Any]) -> Iterator[slice]:
    return strips(len(picture), max(1, _STRIP // picture.shape[1]))


def _levels_of(depth: NDArray[np.float32], tone: Tone, dtype: type[Level]) -> NDArray[Level]:
    """Inverse depth between its percentiles as levels, rounded down, up to the largest of ``dtype``."""
    low, high = _clip_range(depth, tone)
    top = np.iinfo(dtype).max
    span = float(high) - float(low)
    if top > span * _STEEPEST:
        return np.zeros(depth.shape, dtype=dtype)
    # A little more, so that what is white does not round to below it.
    gain = np.float32(top / span * (1 + 1e-6))
    levels = np.empty(depth.shape, dtype=dtype)

    def make(rows: slice) -> None:
        # Much faster than NumPy's maximum.
        scaled = np.clip(depth[rows], 0, np.inf)
        scaled += _TINY
        np.divide(1, scaled, out=scaled)
        # Before it is multiplied: of a map that is nearly flat the difference is all there is.
        scaled -= low
        scaled *= gain
        levels[rows] = np.clip(scaled, 0, top, out=scaled)

    on_cores(make, _parts(levels))
    return levels


def _rounded_down(shares: NDArray[np.float32]) -> NDArray[np.uint8]:
    """0 to 1 as gray levels."""
    return (shares * np.float32(_BINS - 1)).astype(np.uint8)


def _equalising_table(levels: NDArray[np.uint8], tone: Tone) -> NDArray[np.uint8]:
    """Gray level -> equalised gray level, uint8 [256]."""
    parts: list[cv2.typing.MatLike] = []

    def count(rows: slice) -> None:
        parts.append(cv2.calcHist([levels[rows]], [0], None, [_BINS], [0, _BINS]))

    on_cores(count, _parts(levels))
    counts = np.stack(parts).sum(axis=0, dtype=np.float64)[:, 0]
    if tone.hist_clip_limit > 0:
        limit = tone.hist_clip_limit * levels.size / _BINS
        over = np.maximum(counts - limit, 0).sum()
        counts = np.minimum(counts, limit) + over / _BINS
    cumulative = counts.cumsum()
    least = cumulative[cumulative > 0][0]
    spread = np.maximum(cumulative - least, 0) / max(cumulative[-1] - least, 1.0)
    return _rounded_down(np.power(spread.astype(np.float32), np.float32(tone.gamma)))


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
