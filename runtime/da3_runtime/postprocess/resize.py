"""Bicubic resizing of maps, as Pillow's, at a fraction of its time.

Pillow walks every pixel's taps in double precision. Here each axis is a product of small matrices:
pixels that lie near each other have nearly the same few source pixels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.util.parallel import strips

_SLOPE = -0.5  # of the cubic at one pixel's distance, which is Pillow's
_SUPPORT = 2.0  # pixels to each side
# Columns and rows made by one product: with more of them more of its weights are zero.
_COLUMNS, _ROWS = 32, 16
# Multiplications of one product. With more OpenBLAS wakes its threads, which costs more than it gains.
_PRODUCT = 2**18


class _Taps(NamedTuple):
    """Source pixels of every pixel, from the first one on, and their weights, [N] and [N, taps]."""

    first: NDArray[np.intp]
    weights: NDArray[np.float32]


class _Band(NamedTuple):
    """A few target pixels, the source pixels that make them, and their weights, [target, source]."""

    target: slice
    source: slice
    weights: NDArray[np.float32]


def resize_bicubic(values: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    """A map [H, W] resized to ``width`` x ``height``, within its own range.

    Where it shrinks, the cubic is widened by as much, so that every source pixel counts.

    Returns
    -------
    NDArray[np.float32]
        [height, width]; ``values`` themselves where they have that size.
    """
    least, most = values.min(), values.max()
    resized = values
    if width != values.shape[1]:
        resized = _resize_columns(resized, width)
    if height != values.shape[0]:
        resized = _resize_rows(resized, height)
    if resized is not values:
        for band in strips(height, _ROWS):
            np.clip(resized[band], least, most, out=resized[band])
    return resized


def _resize_columns(values: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """[N, C] to [N, count]."""
    resized = np.empty((len(values), count), dtype=np.float32)
    for target, source, weights in _bands(values.shape[1], count, _COLUMNS):
        for rows in strips(len(values), max(1, _PRODUCT // weights.size)):
            np.matmul(values[rows, source], weights.T, out=resized[rows, target])
    return resized


def _resize_rows(values: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """[N, C] to [count, C]."""
    resized = np.empty((count, values.shape[1]), dtype=np.float32)
    for target, source, weights in _bands(len(values), count, _ROWS):
        for columns in strips(values.shape[1], max(1, _PRODUCT // weights.size)):
            np.matmul(weights, values[source, columns], out=resized[target, columns])
    return resized


@lru_cache(maxsize=8)  # photos of one camera follow each other
def _bands(source: int, target: int, size: int) -> tuple[_Band, ...]:
    """How ``source`` pixels of a line make ``target``, ``size`` at a time."""
    first, weights = _taps(source, target)
    taps = weights.shape[1]
    starts = first[::size]
    places = first - np.repeat(starts, size)[:target]
    wide = np.zeros((target, places.max() + taps), dtype=np.float32)
    np.put_along_axis(wide, places[:, None] + np.arange(taps), weights, axis=1)
    bands = []
    for band, start in zip(strips(target, size), starts, strict=True):
        stop = min(first[band.stop - 1] + taps, source)
        bands.append(_Band(band, slice(start, stop), wide[band, : stop - start]))
    return tuple(bands)


def _taps(source: int, target: int) -> _Taps:
    """Which of ``source`` rows make each of ``target`` rows.

    The cubic convolution kernel is Keys's (1981). Rows outside count for nothing.
    """
    step = source / target
    width = max(step, 1.0)
    centres = (np.arange(target) + 0.5) * step
    first = np.maximum((centres - _SUPPORT * width + 0.5).astype(np.intp), 0)
    last = np.minimum((centres + _SUPPORT * width + 0.5).astype(np.intp), source)
    rows = first[:, None] + np.arange((last - first).max())
    x = np.abs(rows - centres[:, None] + 0.5) / width
    near = ((_SLOPE + 2) * x - (_SLOPE + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * _SLOPE - 4 * _SLOPE
    weights = np.where(x < 1, near, np.where(x < _SUPPORT, far, 0))
    weights[rows >= last[:, None]] = 0
    return _Taps(first, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))
