"""The stages of a photo that have a bound of their own, and how many photos are in each.

Serving and folders run the same three stages: decode, network and encode. While one photo is in the
network, others are decoded and encoded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from da3_runtime.errors import BusyError
from da3_runtime.inference.batcher import Share
from da3_runtime.inference.estimator import Estimator, Prepared, PreparedScene, Timings

_Input = TypeVar("_Input", Prepared, PreparedScene, Prepared | PreparedScene)


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


class PhotoStages:
    """The stages from an encoded photo to its files.

    Parameters
    ----------
    full_size : int
        How many photos are decoded at once, and as many that are encoded: each takes its full size in
        memory.

    Attributes
    ----------
    decode, network, encode : Stage
        In this order.
    """

    def __init__(self, full_size: int) -> None:
        self.decode = Stage("decode", full_size)
        self.network = Stage("network")  # the batcher bounds it
        self.encode = Stage("encode", full_size)

    @contextmanager
    def run(
        self, estimator: Estimator, prepare: Callable[[], _Input], timings: Timings
    ) -> Iterator[tuple[Share, _Input]]:
        """Decode photos and run the network; the body finishes and encodes them.

        Parameters
        ----------
        prepare : Callable[[], Prepared | PreparedScene]
            Decodes, and returns the network's input.
        timings : Timings
            The stages are recorded here.

        Yields
        ------
        tuple[Share, Prepared | PreparedScene]
            The network's outputs, and its input.
        """
        with estimator.expect() as pending:
            with self.decode.enter():
                prepared = prepare()
            conditions = prepared.conditions if isinstance(prepared, PreparedScene) else None
            with self.network.enter():
                share = estimator.run(pending, prepared.images, timings, conditions)
        # A model that nobody else uses can be closed while its last photo is encoded.
        del estimator, prepare, pending
        with self.encode.enter():
            yield share, prepared
