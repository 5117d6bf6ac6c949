"""Stops a build on Ctrl-C, even if a library swallows the KeyboardInterrupt.

Python raises KeyboardInterrupt at any point of the main thread: in a callback whose exceptions are
ignored, or inside a library's ``except`` that catches everything. Without this module the build would
continue.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

_received = threading.Event()


def listen() -> None:
    """Record SIGINT from now on. Call this from the main thread."""
    signal.signal(signal.SIGINT, _record)


def _record(number: int, frame: FrameType | None) -> None:
    _received.set()
    signal.default_int_handler(number, frame)


def check() -> None:
    """Raise KeyboardInterrupt if SIGINT was received; call this between the steps of long work."""
    if _received.is_set():
        raise KeyboardInterrupt
