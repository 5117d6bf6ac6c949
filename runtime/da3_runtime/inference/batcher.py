"""Runs the images of concurrent requests as batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import DeviceLostError, InferenceError, OutOfMemoryError
from da3_runtime.network_io import Conditions, RawOutputs

Images = NDArray[np.uint8]
Run = Callable[[Images, Conditions], dict[str, RawOutputs]]


class Share(NamedTuple):
    """One scene's share of the results of a batch; a photo is a scene of one view.

    Attributes
    ----------
    raw : dict[str, RawOutputs]
        Outputs of the whole batch, by graph.
    position : int
        The scene's position in the batch.
    seconds : float
        How long the batch ran.
    """

    raw: dict[str, RawOutputs]
    position: int
    seconds: float


class Batcher:
    """Runs one batch at a time, on the thread of a request.

    Requests that arrive while a batch runs wait. The next batch takes the oldest of them and the others
    with scenes of the same shape. A request runs at once if no other is waiting or being decoded.

    Parameters
    ----------
    run : Run
        Runs a batch, uint8 [B, S, h, w, 3], with what is wanted or known of its scenes.
    largest : Callable[[int, int, int], int]
        How many scenes of this many views, height and width a batch may have; at least 1.
    max_wait : float
        Seconds that a batch with room waits for requests that are still being decoded.
    """

    def __init__(
        self,
        run: Run,
        largest: Callable[[int, int, int], int],
        max_wait: float,
    ) -> None:
        self._run = run
        self._largest = largest
        self._max_wait = max_wait
        self._changed = threading.Condition()
        self._is_running = False
        self._expected: set[Pending] = set()  # their images are not ready yet
        self._waiting: list[Pending] = []  # oldest first

    @contextmanager
    def expect(self) -> Iterator[Pending]:
        """Announce a request before its image is ready, so that a batch can wait for it.

        Use it as ``with batcher.expect() as pending: pending.run(image)``.
        """
        pending = Pending(self)
        with self._changed:
            self._expected.add(pending)
        try:
            yield pending
        finally:
            with self._changed:
                self._expected.discard(pending)
                self._changed.notify_all()

    def run(self, pending: Pending) -> None:
        """Set the outcome of a request whose image is ready, in a batch with others that wait."""
        with self._changed:
            self._expected.discard(pending)
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
                # This thread runs the next batch, even if its own image is not in it.
                self._run_together(self._gather(oldest))
            finally:
                self._finish()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait for the running batch to end; no batch runs while the body does."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_running)
            self._is_running = True
        try:
            yield
        finally:
            self._finish()

    def _finish(self) -> None:
        with self._changed:
            self._is_running = False
            self._changed.notify_all()

    def _gather(self, first: Pending) -> list[Pending]:
        """Take the next batch off the queue: ``first``, and others of its size that arrive in time."""
        deadline = time.monotonic() + self._max_wait
        shape = first.image.shape
        room = self._largest(*shape[1:4]) - 1
        with self._changed:
            while True:
                others = [p for p in self._waiting if p is not first and p.image.shape == shape][:room]
                remaining = deadline - time.monotonic()
                if len(others) == room or not self._expected or remaining <= 0:
                    break
                self._changed.wait(remaining)
            batch = [first, *others]
            self._waiting = [pending for pending in self._waiting if pending not in batch]
        return batch

    def _run_together(self, batch: list[Pending]) -> None:
        images = [pending.image for pending in batch]
        conditions = Conditions.joined([pending.conditions for pending in batch])
        start = time.perf_counter()
        try:
            raw = self._run(images[0] if len(images) == 1 else np.concatenate(images), conditions)
        except Exception as error:
            retry = isinstance(error, InferenceError) and len(batch) > 1
            if retry and not isinstance(error, (OutOfMemoryError, DeviceLostError)):
                # Run the images one by one, so that only the faulty image fails.
                for pending in batch:
                    self._run_together([pending])
                return
            for pending in batch:
                pending.outcome = error
            return
        seconds = time.perf_counter() - start
        for position, pending in enumerate(batch):
            pending.outcome = Share(raw, position, seconds)


class Pending:
    """One request in a :class:`Batcher`, announced before its image is ready."""

    image: Images
    conditions: Conditions

    def __init__(self, batcher: Batcher) -> None:
        self.outcome: Share | Exception | None = None
        self._batcher = batcher

    def run(self, image: Images, conditions: Conditions | None = None) -> Share:
        """Run the scene, uint8 [1, S, h, w, 3], in a batch; raises as the backend does.

        Parameters
        ----------
        conditions : Conditions | None
            What is wanted or known of the scene; None is nothing.
        """
        self.image, self.conditions = image, conditions or Conditions.none(*image.shape[:2])
        self._batcher.run(self)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome
