"""Atomic writes: a reader never sees a partial file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Reading the umask means setting it, which affects all threads: read it once, at import.
_UMASK = os.umask(0)
os.umask(_UMASK)


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``; readers find the old file or the new one, even after a crash.

    Raises
    ------
    OSError
        If the folder cannot be written, or the disk is full.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        move_into_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a complete file to ``path`` and give it the permissions of a newly created file."""
    temporary.chmod(0o666 & ~_UMASK)
    temporary.replace(path)
