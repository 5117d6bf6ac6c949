"""Work on parts of a picture, on several cores where it is large."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from queue import SimpleQueue
from threading import Semaphore
from typing import TypeVar

# More gain little: a picture's time is then in what is done in one piece.
_MOST_THREADS = 4
_AHEAD = 2  # items that wait to be asked for

Item = TypeVar("Item")


def strips(height: int, rows: int) -> Iterator[slice]:
    """Slices of ``rows`` rows each that make ``height``; the last one may have fewer."""
    return (slice(start, min(start + rows, height)) for start in range(0, height, rows))


def on_cores(work: Callable[[slice], object], parts: Iterable[slice]) -> None:
    """Call ``work`` with every part, in any order.

    The calling thread takes part, and only it where every other is busy with other requests; so the
    work should be in calls that release the interpreter's lock. What ``work`` raises is raised, once no
    thread is in it any more.
    """
    share = _Share(work, parts)
    helpers: list[Future[None]] = []
    # Where no thread can be started, or the interpreter ends, the caller does it alone.
    with suppress(RuntimeError):
        count = min(_thread_count(), len(share.left)) - 1
        helpers.extend(_threads().submit(share) for _ in range(count))
    try:
        share()
    finally:
        share.end()
        begun = [helper for helper in helpers if not helper.cancel()]
        wait(begun)
    for helper in begun:
        helper.result()


class _Share:
    """What is left of some work; every call does parts of it until nothing is.

    A call that was not begun waits for a thread even when it is cancelled, so it should hold nothing.
    """

    def __init__(self, work: Callable[[slice], object], parts: Iterable[slice]) -> None:
        self.left = list(parts)[::-1]
        self._work: Callable[[slice], object] | None = work

    def __call__(self) -> None:
        work = self._work
        while work is not None:
            try:
                part = self.left.pop()
            except IndexError:
                return
            work(part)

    def end(self) -> None:
        """Leave the rest, and forget the work."""
        self.left.clear()
        self._work = None


def ahead(items: Iterable[Item]) -> Generator[Item, None, None]:
    """The items, none of them None, in order, made by another thread a little before they are asked for.

    By the caller where no core is left for that. Making them should be in calls that release the
    interpreter's lock. When the caller stops early, nothing is being made any more.
    """
    idle = _idle()
    if not idle.acquire(blocking=False):
        yield from items
        return
    made: SimpleQueue[Item | None] = SimpleQueue()
    room = Semaphore(_AHEAD)
    wanted = True

    def make() -> None:
        try:
            for item in items:
                made.put(item)
                room.acquire()
                if not wanted:
                    return
        finally:
            made.put(None)

    helpers: list[Future[None]] = []
    try:
        helpers.append(_threads().submit(make))
        while (item := made.get()) is not None:
            yield item
            room.release()
        helpers[0].result()
    finally:
        wanted = False
        room.release()
        wait(helpers)
        idle.release()


@cache
def _thread_count() -> int:
    return min(len(os.sched_getaffinity(0)), _MOST_THREADS)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, _thread_count() - 1), thread_name_prefix="strips")


@cache
def _idle() -> Semaphore:
    """Counts the threads that make nothing ahead."""
    return Semaphore(_thread_count() - 1)


# A process that is forked has none of the threads.
os.register_at_fork(after_in_child=_threads.cache_clear)
os.register_at_fork(after_in_child=_idle.cache_clear)
