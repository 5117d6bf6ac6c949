"""Images of requests that wait for a model at once, run together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import DeviceLostError, InferenceError, OutOfMemoryError
from da3_runtime.network_io import RawOutputs

Images = NDArray[np.uint8]


class Share(NamedTuple):
    """What came of one image.

    Attributes
    ----------
    raw : dict[str, RawOutputs]
        Outputs of the batch it was in, by graph.
    place : int
        The image's index in them.
    seconds : float
        How long the batch ran.
    """

    raw: dict[str, RawOutputs]
    place: int
    seconds: float


class Batcher:
    """Runs one batch at a time, on the thread of a request.

    While a batch runs, requests gather; the next one takes the oldest and those of its size. A request
    that finds nobody else on the way runs at once.

    Parameters
    ----------
    run : Callable[[Images], dict[str, RawOutputs]]
        Runs a batch, uint8 [B, h, w, 3].
    largest : Callable[[int, int], int]
        How many images of a height and width a batch may have.
    patience : float
        Seconds that a batch with room waits for requests that are on the way.

    """

    def __init__(
        self,
        run: Callable[[Images], dict[str, RawOutputs]],
        largest: Callable[[int, int], int],
        patience: float,
    ) -> None:
        self._run = run
        self._largest = largest
        self._patience = patience
        self._changed = threading.Condition()
        self._is_running = False
        self._coming: set[Pending] = set()
        self._waiting: list[Pending] = []  # oldest first

    @contextmanager
    def expect(self) -> Iterator[Pending]:
        """A request is on the way: ``with batcher.expect() as pending: pending.run(image)``."""
        pending = Pending(self)
        with self._changed:
            self._coming.add(pending)
        try:
            yield pending
        finally:
            with self._changed:
                self._coming.discard(pending)
                self._changed.notify_all()

    def run(self, pending: Pending) -> None:
        """See to the outcome of a request whose image is ready, together with those that wait."""
        with self._changed:
            self._coming.discard(pending)
            self._waiting.append(pending)
            self._changed.notify_all()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: pending.outcome is not None or not self._is_running)
                if pending.outcome is not None:
                    return
                self._is_running = True
                oldest = self._waiting[0]
            try:
                # Whoever is awake first; the batch may be without its own image.
                self._run_together(self._gather(oldest))
            finally:
                self._end_turn()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No batch runs in the body."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_running)
            self._is_running = True
        try:
            yield
        finally:
            self._end_turn()

    def _end_turn(self) -> None:
        with self._changed:
            self._is_running = False
            self._changed.notify_all()

    def _gather(self, first: Pending) -> list[Pending]:
        """``first`` and those of its size that wait, or come in time, taken off the queue."""
        deadline = time.monotonic() + self._patience
        shape = first.image.shape
        room = self._largest(*shape[1:3]) - 1
        with self._changed:
            while True:
                fellows = [p for p in self._waiting if p is not first and p.image.shape == shape][:room]
                patience = deadline - time.monotonic()
                if len(fellows) == room or not self._coming or patience <= 0:
                    break
                self._changed.wait(patience)
            batch = [first, *fellows]
            self._waiting = [pending for pending in self._waiting if pending not in batch]
        return batch

    def _run_together(self, batch: list[Pending]) -> None:
        images = [pending.image for pending in batch]
        start = time.perf_counter()
        try:
            raw = self._run(images[0] if len(images) == 1 else np.concatenate(images))
        except Exception as error:
            retry = isinstance(error, InferenceError) and len(batch) > 1
            if retry and not isinstance(error, (OutOfMemoryError, DeviceLostError)):
                # An image is to fail only for what it is itself.
                for pending in batch:
                    self._run_together([pending])
                return
            for pending in batch:
                pending.outcome = error
            return
        seconds = time.perf_counter() - start
        for place, pending in enumerate(batch):
            pending.outcome = Share(raw, place, seconds)


class Pending:
    """One request's way through a :class:`Batcher`, from before its image is ready."""

    image: Images

    def __init__(self, batcher: Batcher) -> None:
        self.outcome: Share | Exception | None = None
        self._batcher = batcher

    def run(self, image: Images) -> Share:
        """What comes of the image, uint8 [1, h, w, 3]; raises as the backend does."""
        self.image = image
        self._batcher.run(self)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome
