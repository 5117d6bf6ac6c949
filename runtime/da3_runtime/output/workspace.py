"""Pictures kept on a volume, for as many days as the settings say."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
import uuid
from pathlib import Path

from da3_runtime.util.files import write_atomically

logger = logging.getLogger(__name__)

FOLDER = "output_images"
# A picture's, and what a process that was killed left of one.
_NAME = re.compile(r"[0-9a-f]{32}\.png|\.[0-9a-f]{32}\.png\..+")
_DAY = 86_400.0
_PRUNE_EVERY = 3600.0


class Workspace:
    """The folder of pictures on a volume.

    Parameters
    ----------
    root : Path
        The volume; the pictures lie in its ``output_images``, as the reference service puts them.
    retention_days : int
        Age at which a picture is removed; 0 for never.
    """

    def __init__(self, root: Path, retention_days: int) -> None:
        self._root = root
        self._seconds = retention_days * _DAY
        self._next_prune = 0.0

    def keep(self, png: bytes) -> Path | None:
        """Write a picture under a name of its own; None where the volume cannot be written."""
        if not (self._root.is_dir() and os.access(self._root, os.W_OK)):
            return None
        path = self._root / FOLDER / f"{uuid.uuid4().hex}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            self._prune()
            write_atomically(path, png)
        except OSError as error:
            logger.warning("WORKSPACE: a picture could not be kept: %s", error)
            return None
        return path

    def _prune(self) -> None:
        """Remove what is too old, at most once an hour; only files named as :meth:`keep` names them."""
        now = time.time()
        if not self._seconds or now < self._next_prune:
            return
        self._next_prune = now + _PRUNE_EVERY
        for path in (self._root / FOLDER).iterdir():
            # Another worker on the same volume may be first.
            with contextlib.suppress(OSError):
                if _NAME.fullmatch(path.name) and path.stat().st_mtime < now - self._seconds:
                    path.unlink()
