"""Runs work on several threads: on strips of a map, and on a long row of photos."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TypeVar

# More threads gain little: most of the remaining time is in steps that cannot be split into strips.
_MAX_THREADS = 4

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


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


def in_order(
    work: Callable[[_Item], _Result], items: Iterable[_Item], threads: int, ahead: int
) -> Iterator[_Result]:
    """The results of ``work`` for every item, in the order of the items.

    Parameters
    ----------
    threads : int
        How many items are worked on at once.
    ahead : int
        How many results may wait for that of an earlier item; it bounds the memory.

    Raises
    ------
    BaseException
        The first exception that ``work`` raises, after the running calls have ended. No other starts.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque[Future[_Result]]()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                while waiting and (len(waiting) >= ahead or waiting[0].done()):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@cache
def _thread_count() -> int:
    return min(usable_cores(), _MAX_THREADS)


def usable_cores() -> int:
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
