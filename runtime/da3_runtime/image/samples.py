"""Samples wider than 8 bits, or of another type than bytes -> RGB."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import ImageError

_LOOKED_AT = 2**18  # samples from which the brightness range is judged
_TAILS = (0.5, 99.5)  # percentiles; samples beyond may be faulty pixels
_SLAB = 2**18  # samples that are converted at once
# An image whose brightest pixel is below this part of its range, or that varies over a smaller part,
# would look black, white or gray.
_LEAST_WHITE, _LEAST_CONTRAST = 1 / 4, 1 / 16
_GUESS_CONTRAST = 1 / 4  # contrast that speaks for a number of bits
# Floating-point images overshoot their range at edges after they were resized.
_OVERSHOOT = 1 / 16


@dataclass(frozen=True)
class Samples:
    """Decoded samples, and the file's own statements about them.

    Attributes
    ----------
    color : NDArray[Any]
        Integers or floating-point numbers, gray [H, W] or RGB [H, W, 3].
    alpha : NDArray[Any] | None
        Opacity, [H, W], of the same type; None if the image is opaque.
    is_premultiplied : bool
        Whether ``color`` was multiplied by the opacity.
    low, high : float | None
        Smallest and largest value of the range of ``color``; None if the file states none.
    white_is_zero : bool
        Whether the smallest value is white.
    """

    color: NDArray[Any]
    alpha: NDArray[Any] | None = None
    is_premultiplied: bool = False
    low: float | None = None
    high: float | None = None
    white_is_zero: bool = False


def rgb_of_samples(samples: Samples) -> tuple[NDArray[np.uint8], list[str]]:
    """RGB, uint8 [H, W, 3], of an image on white, and warnings about what was assumed.

    The brightness range is the file's own; else that of the type, or 0 to 1 for floating point. If it
    leaves out samples, or they use only a small part of it, the range is assumed: the smallest number of
    bits that holds nearly all samples, else from their darkest to their brightest.

    Raises
    ------
    ImageError
        If no sample is a finite number.
    """
    low, high, is_assumed = _range_of(samples)
    warnings = []
    if is_assumed:
        black, white = (high, low) if samples.white_is_zero else (low, high)
        warnings.append(
            f"The brightness range of the image was assumed: {black:g} is black, {white:g} is white."
        )
    eight, has_gaps = _scaled(samples.color, low, high, samples.white_is_zero)
    if has_gaps:
        warnings.append("Some samples of the image are NaN or infinite; they were taken as black.")
    rgb = np.repeat(eight[:, :, None], 3, 2) if eight.ndim == 2 else eight
    if samples.alpha is not None:
        # The opacity has the bits of the color.
        opaque = high if is_assumed and samples.alpha.max() <= high else _type_range(samples.alpha)[1]
        alpha, _ = _scaled(samples.alpha, 0.0, opaque, False)
        _lay_on_white(rgb, alpha, samples.is_premultiplied)
    return rgb, warnings


def _lay_on_white(rgb: NDArray[np.uint8], alpha: NDArray[np.uint8], is_premultiplied: bool) -> None:
    for channel in range(3):
        color = rgb[:, :, channel].astype(np.uint16)
        opaque = color * 255 if is_premultiplied else color * alpha
        light = opaque + (255 - alpha.astype(np.uint32)) * 255
        rgb[:, :, channel] = np.minimum((light + 127) // 255, 255)


def _scaled(
    values: NDArray[Any], low: float, high: float, is_inverted: bool
) -> tuple[NDArray[np.uint8], bool]:
    """Values from ``low`` to ``high`` as bytes, and whether any was not finite; those become 0."""
    eight = np.empty(values.shape, np.uint8)
    rows = max(1, _SLAB * len(values) // values.size)
    has_gaps = False
    for start in range(0, len(values), rows):
        slab = values[start : start + rows].astype(np.float64)
        gaps = ~np.isfinite(slab)
        slab[gaps] = low
        levels = np.rint((np.clip(slab, low, high) - low) * (255 / (high - low)))
        if is_inverted:
            levels = 255 - levels
        levels[gaps] = 0
        eight[start : start + rows] = levels
        has_gaps |= bool(gaps.any())
    return eight, has_gaps


def _type_range(values: NDArray[Any]) -> tuple[float, float]:
    return 0.0, 1.0 if values.dtype.kind == "f" else float(np.iinfo(values.dtype).max)


def _range_of(samples: Samples) -> tuple[float, float, bool]:
    """Smallest value, largest value, and whether they were assumed."""
    values = samples.color
    step = math.isqrt(values.size // _LOOKED_AT) or 1
    finite = values[::step, ::step].astype(np.float64)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        raise ImageError("The samples of the image are all NaN or infinite: send another image.")
    dark, bright = (float(each) for each in np.percentile(finite, _TAILS))
    is_float = values.dtype.kind == "f"
    low, high = _type_range(values)
    stated = (
        low if samples.low is None else samples.low,
        high if samples.high is None else samples.high,
    )
    if stated[0] <= dark and bright <= stated[1] and stated[0] < stated[1]:
        low, high = stated
    margin = _OVERSHOOT * (high - low) if is_float else 0.0
    is_inside = low - margin <= dark and bright <= high + margin
    if is_inside and (dark == bright or _fills(low, high, max(low, dark), min(high, bright))):
        return low, high, False
    for bits in range(8, 33):
        white = float(2**bits - 1)
        # Floating-point images of small numbers hold no integers.
        if (bright > 16 or not is_float) and _fills(0.0, white, dark, bright, _GUESS_CONTRAST):
            return 0.0, white, True
    return dark, bright if bright > dark else dark + 1, True


def _fills(
    low: float, high: float, dark: float, bright: float, contrast: float = _LEAST_CONTRAST
) -> bool:
    """Whether samples from ``dark`` to ``bright`` use enough of a range to show a picture."""
    size = high - low
    return (
        low <= dark
        and bright <= high
        and bright - low >= _LEAST_WHITE * size
        and bright - dark >= contrast * size
    )
