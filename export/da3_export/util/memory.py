"""Measures how much memory a build needs."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

_INTERVAL = 0.1  # seconds


class PeakMemory:
    """Largest anonymous memory of a process while the context is open.

    Anonymous memory cannot be reclaimed by the system. Resident memory also includes gigabytes of
    checkpoints and weights that are mapped from files, which the system can drop at any time.

    Parameters
    ----------
    pid : str
        Id of the process; this process by default.

    Attributes
    ----------
    gb : float | None
        The peak in GB (1e9 bytes), sampled at the start, at the end and ten times a second in between.
        None if the system has no /proc.
    """

    def __init__(self, pid: str = "self") -> None:
        self.gb: float | None = None
        self._status = Path("/proc") / pid / "status"
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._take()
        self._sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._sampler.join()
        self._take()

    def _sample(self) -> None:
        while not self._ended.wait(_INTERVAL):
            self._take()

    def _take(self) -> None:
        now = _anonymous_gb(self._status)
        if now is not None:
            self.gb = max(self.gb or 0.0, now)

    def __str__(self) -> str:
        return "?" if self.gb is None else f"{self.gb:.1f}"


def _anonymous_gb(status: Path) -> float | None:
    try:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024 / 1e9
    except (OSError, ValueError):
        pass
    return None
