"""Times contenders in turn, and summarizes the times as medians and 99th percentiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from benchmarks.record import reason

MS = 1e3


class Round(NamedTuple):
    """One turn of a contender: median and 99th percentile of its runs, in milliseconds."""

    median_ms: float
    p99_ms: float


class Timing(NamedTuple):
    """A contender over all rounds.

    Attributes
    ----------
    median_ms : float
        Median of the rounds' medians.
    p99_ms : float
        99th percentile of all runs.
    rounds : list[Round]
        In the order in which they were measured.
    """

    median_ms: float
    p99_ms: float
    rounds: list[Round]


def time_in_turn(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    per_round: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, list[list[float]]], dict[str, str]]:
    """Time every contender ``per_round`` times in each of ``rounds`` rounds.

    Each round starts with another contender, so none is always first. Each turn starts with a run that
    is not timed. A contender that fails is left out of later rounds.

    Returns
    -------
    dict[str, list[list[float]]]
        Seconds of every run, by contender and round, for contenders that did not fail.
    dict[str, str]
        Reason for each contender that failed.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in runs}
    failures: dict[str, str] = {}
    for number in range(rounds):
        names = list(seconds)
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            try:
                seconds[name].append(_turn(runs[name], per_round, clock))
            except Exception as error:  # any error of a library goes into the report
                failures[name] = reason(error)
                del seconds[name]
    return seconds, failures


def _turn(run: Callable[[], object], times: int, clock: Callable[[], float]) -> list[float]:
    run()
    seconds = []
    for _ in range(times):
        start = clock()
        run()
        seconds.append(clock() - start)
    return seconds


def summarize(seconds: list[list[float]]) -> Timing:
    """Summarize the seconds of every run, by round."""
    rounds = [
        Round(float(np.median(turn)) * MS, float(np.percentile(turn, 99)) * MS) for turn in seconds
    ]
    pooled = [run for turn in seconds for run in turn]
    return Timing(
        float(np.median([turn.median_ms for turn in rounds])),
        float(np.percentile(pooled, 99)) * MS,
        rounds,
    )
