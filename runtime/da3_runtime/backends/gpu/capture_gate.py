"""While one backend captures a CUDA graph, no other uses the GPU.

ONNX Runtime captures in CUDA's global mode: an allocation by any other thread fails meanwhile, and
spoils the graph; so does waiting for the device. Whoever loads a model or runs one does it in
:meth:`CaptureGate.use`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CaptureGate:
    """Lets many use the GPU, or one capture.

    Who would capture never waits; who would use it waits as long as a capture takes.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._users = 0
        self._is_capturing = False

    @contextmanager
    def use(self) -> Iterator[None]:
        """Nobody captures while the body runs."""
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
        """Whether the body may capture: the one use that it is part of is the only one."""
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
