"""Depth -> 8-bit previews: gray or through a color map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import SettingError
from da3_runtime.util.parallel import on_cores, strips

# Perceptually uniform color maps, and turbo, by name.
COLOR_MAPS = {
    "inferno": cv2.COLORMAP_INFERNO,
    "magma": cv2.COLORMAP_MAGMA,
    "plasma": cv2.COLORMAP_PLASMA,
    "viridis": cv2.COLORMAP_VIRIDIS,
    "cividis": cv2.COLORMAP_CIVIDIS,
    "turbo": cv2.COLORMAP_TURBO,
}
_BINS = 256
_TINY = np.float32(1e-6)  # the reference service adds it to a depth before it divides by the depth
# Pixels from which percentiles and the histogram are taken. A larger map was enlarged from about as
# many; all of its pixels would move a preview by less than one gray level.
_SAMPLE = 2**18
_STRIP = 2**17  # pixels of one strip: few enough for the cache, enough to be worth a thread's turn
_STEEPEST = 1e30  # gray levels per unit of inverse depth; above it a map counts as constant


@dataclass(frozen=True)
class Tone:
    """How inverse depth becomes 8-bit gray; the fields are those of a request.

    Attributes
    ----------
    clip_percentile_low, clip_percentile_high : float
        Percentiles of inverse depth that become black and white, 0 to 100.
    histogram_equalization : bool
        Whether gray levels are spread by how many pixels have them.
    hist_clip_limit : float
        Largest count of a level, in multiples of the mean count; the excess is spread over all levels.
        0 sets no limit.
    gamma : float
        Exponent applied last; below 1 brightens the middle.
    """

    clip_percentile_low: float = 0.5
    clip_percentile_high: float = 99.5
    histogram_equalization: bool = True
    hist_clip_limit: float = 0.01
    gamma: float = 1.0


DEFAULT_TONE = Tone()


@dataclass(frozen=True, eq=False)
class Levels:
    """The gray level of every depth: a tone, fitted to the depths of one image or of a whole film.

    Attributes
    ----------
    scale : _Scale | None
        None if the depth is constant.
    table : NDArray[np.uint8] | None
        Level of the scale -> gray; None where a level is the gray value itself.
    """

    scale: _Scale | None
    table: NDArray[np.uint8] | None

    def gray(self, depth: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Depth [H, W] as gray [H, W], near is bright; all black if the depth is constant."""
        scale, table = self.scale, self.table
        gray: NDArray[np.uint8] = np.zeros(depth.shape, dtype=np.uint8)
        if scale is None:
            return gray
        is_fine = scale.dtype is np.uint16

        def convert(rows: slice) -> None:
            levels = _levels(depth[rows], scale)
            gray[rows] = (
                levels if table is None else table[levels] if is_fine else cv2.LUT(levels, table)
            )

        on_cores(convert, strips(len(gray), max(1, _STRIP // gray.shape[1])))
        return gray


class _Scale(NamedTuple):
    """Inverse depth -> levels of one integer type: (inverse - low) * gain, rounded down."""

    low: np.float32
    gain: np.float32
    dtype: type[np.unsignedinteger[Any]]


def gray_preview(depth: NDArray[np.float32], tone: Tone = DEFAULT_TONE) -> NDArray[np.uint8]:
    """Inverse depth as 8-bit gray, near is bright.

    Follows the reference service: clip inverse depth to two percentiles, equalize the histogram, apply
    gamma. Percentiles and histogram come from a regular sample of a large map.

    Parameters
    ----------
    depth : NDArray[np.float32]
        [H, W]; negative values count as the nearest.

    Returns
    -------
    NDArray[np.uint8]
        [H, W]; all black where depth is constant.
    """
    return levels_of(_sample(depth), tone).gray(depth)


def levels_of(sample: NDArray[np.float32], tone: Tone = DEFAULT_TONE) -> Levels:
    """The gray levels of a tone for depths of which these are a sample, [N] or [h, w]."""
    # Without equalization a gamma below 1 would tear 8-bit levels apart, so it acts on finer ones.
    is_fine = not tone.histogram_equalization and tone.gamma != 1
    scale = _scale(sample, tone, np.uint16 if is_fine else np.uint8)
    return Levels(scale, None if scale is None else _table(sample, scale, tone))


def _sample(depth: NDArray[np.float32]) -> NDArray[np.float32]:
    """The middle pixel of every square of a large map, [h, w]; all pixels of a small one."""
    # Odd, so that a square has a middle; a sample off the middle is biased where depth is a ramp.
    step = math.ceil(math.sqrt(depth.size / _SAMPLE)) // 2 * 2 + 1
    middle = min(step, depth.shape[0], depth.shape[1]) // 2
    return np.ascontiguousarray(depth[middle::step, middle::step])


def _inverse(depth: NDArray[np.float32]) -> NDArray[np.float32]:
    # np.clip is much faster than np.maximum.
    inverse = np.clip(depth, 0, np.inf)
    inverse += _TINY
    return np.divide(1, inverse, out=inverse)


def _scale(
    sample: NDArray[np.float32], tone: Tone, dtype: type[np.unsignedinteger[Any]]
) -> _Scale | None:
    """The scale between the percentiles; None where they are one value."""
    percents = tone.clip_percentile_low, tone.clip_percentile_high
    low, high = np.percentile(_inverse(sample), percents).astype(np.float32)
    span, top = float(high) - float(low), np.iinfo(dtype).max
    if top > span * _STEEPEST:
        return None
    # Slightly more than exact, so that rounding cannot put white below the top level.
    return _Scale(low, np.float32(top / span * (1 + 1e-6)), dtype)


def _levels(depth: NDArray[np.float32], scale: _Scale) -> NDArray[Any]:
    levels = _inverse(depth)
    # Before the product: in a nearly flat map the difference holds all the information.
    levels -= scale.low
    levels *= scale.gain
    return np.clip(levels, 0, np.iinfo(scale.dtype).max, out=levels).astype(scale.dtype)


def _table(sample: NDArray[np.float32], scale: _Scale, tone: Tone) -> NDArray[np.uint8] | None:
    """Level -> gray, for every level of the scale; None where a level is the gray value itself."""
    if tone.histogram_equalization:
        shares = _equalized(_levels(sample, scale), tone.hist_clip_limit)
    elif tone.gamma == 1:
        return None
    else:
        shares = np.linspace(0, 1, np.iinfo(scale.dtype).max + 1)
    powers = np.power(shares.astype(np.float32), np.float32(tone.gamma))
    return (powers * np.float32(_BINS - 1)).astype(np.uint8)


def _equalized(levels: NDArray[np.uint8], limit: float) -> NDArray[np.float64]:
    """Level -> its brightness after equalization, 0 to 1, float64 [256]."""
    counts = cv2.calcHist([levels], [0], None, [_BINS], [0, _BINS])[:, 0].astype(np.float64)
    if limit > 0:
        most = limit * levels.size / _BINS
        excess = np.maximum(counts - most, 0).sum()
        counts = np.minimum(counts, most) + excess / _BINS
    cumulative = counts.cumsum()
    least = cumulative[cumulative > 0][0]
    return np.asarray(np.maximum(cumulative - least, 0) / max(cumulative[-1] - least, 1.0))


def color_preview(gray: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """A gray preview [H, W] through one of :data:`COLOR_MAPS`, RGB [H, W, 3].

    Raises
    ------
    SettingError
        If no color map has this name; the message lists the known ones.
    """
    if name not in COLOR_MAPS:
        raise SettingError(f"color_map {name!r} is not one of: {', '.join(COLOR_MAPS)}.")
    bgr = cv2.applyColorMap(gray, COLOR_MAPS[name])
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), dtype=np.uint8)
