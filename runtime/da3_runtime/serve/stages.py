"""The stages of a request that have a bound of their own, and how many requests are in each."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from da3_runtime.errors import BusyError


class Stage:
    """A stage of a request. Threads may enter it concurrently.

    Parameters
    ----------
    name : str
        Its name in the metrics.
    limit : int | None
        How many requests may be in it at once; None if something else bounds it.

    Attributes
    ----------
    waiting, in_hand : int
        How many requests wait for it now, and how many are in it.
    """

    def __init__(self, name: str, limit: int | None = None) -> None:
        self.name = name
        self.limit = limit
        self.waiting = 0
        self.in_hand = 0
        self._changed = threading.Condition()

    @contextmanager
    def enter(self, busy: str | None = None) -> Iterator[None]:
        """Be in the stage while the body runs; blocks the thread while the stage is full.

        Parameters
        ----------
        busy : str | None
            Message of the :class:`BusyError` that is raised instead if the stage is full.
        """
        with self._changed:
            if busy is not None and self._is_full():
                raise BusyError(busy)
            self.waiting += 1
            self._changed.wait_for(lambda: not self._is_full())
            self.waiting -= 1
            self.in_hand += 1
        try:
            yield
        finally:
            with self._changed:
                self.in_hand -= 1
                self._changed.notify()

    def _is_full(self) -> bool:
        return self.limit is not None and self.in_hand >= self.limit
