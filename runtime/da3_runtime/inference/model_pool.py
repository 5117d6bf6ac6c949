"""Keeps a limited number of models loaded; the least recently used one is closed first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import NamedTuple

from da3_runtime.inference.estimator import Estimator
from da3_runtime.variants import Head


class ModelKey(NamedTuple):
    """Identifies a loaded model."""

    model_id: str
    head: Head
    ray_pose: bool = False


class _Slot:
    """A model that is loaded or loading, and how many requests use it or wait for it."""

    def __init__(self) -> None:
        self.loading: Future[Estimator] = Future()
        self.users = 0


class ModelPool:
    """Loaded models by key.

    Requests for a model that is loading wait for that load. A model is closed only when no request uses
    it, and before the next model is loaded.

    Parameters
    ----------
    load : Callable[[ModelKey], Estimator]
        Loads a model. Every request that waits for the load raises its error.
    limit : int
        How many models may be loaded at once.
    """

    def __init__(self, load: Callable[[ModelKey], Estimator], limit: int) -> None:
        self._load = load
        self._limit = limit
        self._slots: dict[ModelKey, _Slot] = {}  # least recently used first
        self._changed = threading.Condition()
        # Held while waiting for room, so that later requests cannot overtake the waiting one.
        self._turn = threading.Lock()

    @contextmanager
    def borrow(self, key: ModelKey) -> Iterator[Estimator]:
        """Load the model of ``key`` if necessary; it stays loaded while the body runs."""
        with self._turn:
            slot, is_new, old = self._enter(key)
        try:
            # Outside of both locks, so that requests for other models do not wait.
            if is_new:
                self._fill(key, slot, old)
            yield slot.loading.result()
        finally:
            with self._changed:
                slot.users -= 1
                self._changed.notify_all()

    def drop_idle(self) -> bool:
        """Close every model that no request uses; returns whether any was closed."""
        with self._changed:
            idle = list(iter(self._take_idle, None))
            self._changed.notify_all()
        for slot in idle:
            slot.loading.result().close()
        return bool(idle)

    def loaded(self) -> list[ModelKey]:
        """Keys of the loaded models, least recently used first."""
        with self._changed:
            return [key for key, slot in self._slots.items() if slot.loading.done()]

    def _enter(self, key: ModelKey) -> tuple[_Slot, bool, _Slot | None]:
        """The slot of ``key``, whether it is new, and the slot whose model must be closed for it."""
        with self._changed:
            slot, old = self._slots.pop(key, None), None
            is_new = slot is None
            if slot is None:
                found = self._changed.wait_for(
                    lambda: len(self._slots) < self._limit or self._take_idle()
                )
                old = found if isinstance(found, _Slot) else None
                slot = _Slot()
            slot.users += 1
            self._slots[key] = slot
            return slot, is_new, old

    def _take_idle(self) -> _Slot | None:
        """Remove the least recently used model that no request uses, for the caller to close."""
        idle = next((key for key, slot in self._slots.items() if not slot.users), None)
        return None if idle is None else self._slots.pop(idle)

    def _fill(self, key: ModelKey, slot: _Slot, old: _Slot | None) -> None:
        """Load the model of a slot, after the model of ``old`` has been closed."""
        try:
            if old is not None:
                old.loading.result().close()
            slot.loading.set_result(self._load(key))
        except BaseException as error:
            with self._changed:
                if self._slots.get(key) is slot:
                    del self._slots[key]
                    self._changed.notify_all()
            slot.loading.set_exception(error)
