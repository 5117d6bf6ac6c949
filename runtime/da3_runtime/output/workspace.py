"""Previews stored on a volume, for as many days as OUTPUT_RETENTION_DAYS sets."""

from __future__ import annotations

import contextlib
import logging
import re
import time
import uuid
from pathlib import Path

from da3_runtime.util.files import write_atomically

logger = logging.getLogger(__name__)

FOLDER = "output_images"
# A preview, and a temporary file that a killed process left behind.
_NAME = re.compile(r"[0-9a-f]{32}\.png|\.[0-9a-f]{32}\.png\..+")
_DAY = 86_400.0
_PRUNE_EVERY = 3600.0


class Workspace:
    """The folder of previews on a volume.

    Parameters
    ----------
    root : Path
        The volume; previews go to its ``output_images``, as in the reference service.
    retention_days : int
        Age in days at which a preview is removed; 0 keeps all.
    """

    def __init__(self, root: Path, retention_days: int) -> None:
        self._root = root
        self._seconds = retention_days * _DAY
        self._next_prune = 0.0

    def keep(self, png: bytes) -> Path | None:
        """Write a preview under a new name; returns its path, None if the volume cannot be written."""
        path = self._root / FOLDER / f"{uuid.uuid4().hex}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            self._prune()
            write_atomically(path, png)
        except OSError as error:
            logger.warning("WORKSPACE: cannot store a preview: %s", error)
            return None
        return path

    def _prune(self) -> None:
        """Remove expired files that :meth:`keep` has named, at most once an hour."""
        now = time.time()
        if not self._seconds or now < self._next_prune:
            return
        self._next_prune = now + _PRUNE_EVERY
        for path in (self._root / FOLDER).iterdir():
            # Another worker on the same volume may have removed it.
            with contextlib.suppress(OSError):
                if _NAME.fullmatch(path.name) and path.stat().st_mtime < now - self._seconds:
                    path.unlink()
