"""An interruption ends a build even if a library swallows the exception.

Python raises KeyboardInterrupt wherever the main thread happens to be: in a callback whose exceptions
are ignored, or under a library's ``except`` that catches everything. The build would run on to its end.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

_received = threading.Event()


def listen() -> None:
    """Remember from now on that the user asked to stop. Call it from the main thread."""
    signal.signal(signal.SIGINT, _remember)


def _remember(number: int, frame: FrameType | None) -> None:
    _received.set()
    signal.default_int_handler(number, frame)


def check() -> None:
    """Raise KeyboardInterrupt if the user has asked to stop; called between the steps of long work."""
    if _received.is_set():
        raise KeyboardInterrupt
