"""Exact percentiles of a large map, without sorting it.

A small sample says between which two values a percentile lies, and only what is between them is looked
at more closely.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.util.parallel import on_cores, strips

_SAMPLE = 2**12
_FEW = 0.02  # of the values; they are looked at sooner than told apart
_MARGIN = 5.0  # standard deviations of a rank in the sample
_STRIP = 2**19  # values looked at in one piece


class Neighbours(NamedTuple):
    """Two values that follow each other in order, and how far a percentile lies from one to the other.

    Attributes
    ----------
    below, above : float
        One and the same where there is no other value.
    share : float
        0 to 1.
    """

    below: float
    above: float
    share: float


def percentile_neighbours(values: NDArray[np.float32], percents: Iterable[float]) -> list[Neighbours]:
    """Where NumPy's linear percentiles lie; ``values`` are finite, of any shape and not none.

    Between two neighbours the caller may interpolate what is made of the values.
    """
    flat = values.ravel()
    # At random: what is taken at even steps may lie in a few columns, or along a line.
    sample = np.sort(flat[np.random.default_rng(0).integers(0, flat.size, _SAMPLE)])
    windows = [_Window(percent, flat.size, sample) for percent in percents]
    found: list[NDArray[np.float32]] = []

    def look(part: slice) -> None:
        piece = flat[part]
        found.append(piece[reduce(np.logical_or, [window.look(piece) for window in windows])])

    on_cores(look, strips(flat.size, _STRIP))
    close = np.concatenate(found)
    return [window.neighbours(close, flat) for window in windows]


class _Window:
    """The values among which a percentile lies, if the sample does not mislead.

    Parameters
    ----------
    percent : float
        The percentile.
    size : int
        How many values there are in all.
    sample : NDArray[np.float32]
        Some of them, in order.
    """

    def __init__(self, percent: float, size: int, sample: NDArray[np.float32]) -> None:
        self._size = size
        self._position = percent / 100 * (size - 1)
        self._rank = min(math.floor(self._position), max(size - 2, 0))
        part_below = self._rank / size
        place = part_below * sample.size
        margin = _MARGIN * math.sqrt(place * (1 - part_below)) + 3
        first, last = math.floor(place - margin), math.ceil(place + margin)
        # No bound where it would leave out few.
        few = _FEW * sample.size
        self._least = float(sample[first]) if first > few else -math.inf
        self._most = float(sample[last]) if last < sample.size - few else math.inf
        self._not_less: list[int] = []

    def look(self, piece: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Where a piece of all the values is in the window; threads may call it at once."""
        if self._least == -math.inf:
            return piece <= self._most
        inside = piece >= self._least
        self._not_less.append(int(np.count_nonzero(inside)))
        if self._most < math.inf:
            inside &= piece <= self._most
        return inside

    def neighbours(self, close: NDArray[np.float32], values: NDArray[np.float32]) -> Neighbours:
        """What was asked for, once every piece of ``values`` was looked at.

        Parameters
        ----------
        close : NDArray[np.float32]
            The values in any window.
        """
        rank = self._rank
        if self._least > -math.inf:
            rank -= self._size - sum(self._not_less)
            close = close[close >= self._least]
        if self._most < math.inf:
            close = close[close <= self._most]
        if not 0 <= rank < close.size - 1:
            # The sample misled.
            close, rank = values, self._rank
        pair = [rank, min(rank + 1, close.size - 1)]
        below, above = np.partition(close, pair)[pair]
        return Neighbours(float(below), float(above), self._position - self._rank)
