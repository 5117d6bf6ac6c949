"""Exact percentiles of a large map, without sorting it.

A small sample says between which two values a percentile lies, and only what is between them is looked
at more closely.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.strips import on_cores, strips

_SAMPLE = 2**13
_MARGIN = 5.0  # standard deviations of a rank in the sample
_STRIP = 2**18  # values looked at in one piece


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


def percentile_neighbours(values: NDArray[np.float32], percent: float) -> Neighbours:
    """Where NumPy's linear percentile lies; ``values`` are finite, of any shape and not none.

    Between them the caller may interpolate what is made of the values.
    """
    flat = values.ravel()
    position = percent / 100 * (flat.size - 1)
    rank = min(math.floor(position), max(flat.size - 2, 0))
    # At random: what is taken at even steps may lie in a few columns, or along a line.
    sample = np.sort(flat[np.random.default_rng(0).integers(0, flat.size, _SAMPLE)])
    part_below = rank / flat.size
    place = part_below * sample.size
    margin = _MARGIN * math.sqrt(place * (1 - part_below)) + 3
    first, last = math.floor(place - margin), math.ceil(place + margin)
    least = sample[first] if first >= 0 else -np.inf
    most = sample[last] if last < sample.size else np.inf
    lesser: list[int] = []
    between: list[NDArray[np.float32]] = []

    def look(part: slice) -> None:
        piece = flat[part]
        wanted = piece <= most
        if first >= 0:
            less = piece < least
            lesser.append(int(np.count_nonzero(less)))
            wanted ^= less
        between.append(piece[wanted])

    on_cores(look, strips(flat.size, _STRIP))
    candidates, rank_there = np.concatenate(between), rank - sum(lesser)
    if not 0 <= rank_there < candidates.size - 1:
        # The sample misled.
        candidates, rank_there = flat, rank
    pair = [rank_there, min(rank_there + 1, candidates.size - 1)]
    below, above = np.partition(candidates, pair)[pair]
    return Neighbours(float(below), float(above), position - rank)
