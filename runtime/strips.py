"""Work on the rows of a map, on several cores where it is large."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

# More gain little: a picture's time is then in what is done in one piece.
_MOST_THREADS = 4


def strips(height: int, rows: int) -> Iterator[slice]:
    """Slices of ``rows`` rows each that make ``height``; the last one may have fewer."""
    return (slice(start, min(start + rows, height)) for start in range(0, height, rows))


def on_cores(work: Callable[[slice], object], parts: Iterable[slice]) -> None:
    """Call ``work`` with every part, in any order.

    The calling thread takes part, and only it where every other is busy with other requests; so the work
    should be in calls that release the interpreter's lock. What ``work`` raises is raised.
    """
    left = iter(list(parts))

    def run() -> None:
        # A list's iterator gives every part to one thread only.
        for part in left:
            work(part)

    helpers = [_threads().submit(run) for _ in range(_thread_count() - 1)]
    try:
        run()
    finally:
        for helper in helpers:
            helper.cancel()
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def _thread_count() -> int:
    return min(len(os.sched_getaffinity(0)), _MOST_THREADS)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, _thread_count() - 1), thread_name_prefix="strips")
