"""Runs work on strips of a map on several cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

# More threads gain little: most of the remaining time is in steps that cannot be split into strips.
_MAX_THREADS = 4


def strips(height: int, rows: int) -> list[slice]:
    """Slices of ``rows`` rows each that cover ``height`` rows; the last one may be shorter."""
    return [slice(start, min(start + rows, height)) for start in range(0, height, rows)]


def on_cores(work: Callable[[slice], object], parts: Sequence[slice]) -> None:
    """Call ``work`` once with every part, in any order, on a few shared threads.

    ``work`` should spend its time in calls that release the interpreter's lock, and must not call this
    function itself. The first exception that ``work`` raises is raised here.
    """
    threads = _thread_count()
    if threads == 1 or len(parts) == 1:
        for part in parts:
            work(part)
        return
    for _ in _pool(threads).map(work, parts):
        pass


@cache
def _thread_count() -> int:
    return min(_usable_cores(), _MAX_THREADS)


def _usable_cores() -> int:
    """Number of cores that this process may use; before Python 3.13 only Linux can limit it."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="strips")


if hasattr(os, "register_at_fork"):
    # A forked process has none of its parent's threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)
