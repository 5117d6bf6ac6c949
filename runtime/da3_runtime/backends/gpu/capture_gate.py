"""A lock that keeps every other user off the GPU while one backend captures a CUDA graph.

ONNX Runtime captures in CUDA's global mode: if another thread allocates memory or synchronizes the
device during a capture, that call fails and the graph is invalid. So every thread loads and runs models
inside :meth:`CaptureGate.use`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CaptureGate:
    """Admits many users of the GPU, or one capture.

    Capturing never blocks: it is skipped while others are active. Users block while a capture runs.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        self._is_capturing = False

    @contextmanager
    def use(self) -> Iterator[None]:
        """Use the GPU in the body; wait first for a running capture to end."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_capturing)
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1

    @contextmanager
    def capture(self) -> Iterator[bool]:
        """Yield whether the body may capture: not while anyone else uses the GPU or captures."""
        with self._changed:
            is_free = self._users <= 1 and not self._is_capturing
            if is_free:
                self._is_capturing = True
        try:
            yield is_free
        finally:
            if is_free:
                with self._changed:
                    self._is_capturing = False
                    self._changed.notify_all()


GATE = CaptureGate()
