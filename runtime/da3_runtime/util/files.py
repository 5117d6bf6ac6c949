"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Reading it sets it, so it is read once, before there are threads.
_UMASK = os.umask(0)
os.umask(_UMASK)


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``: a reader, or a process killed half-way, finds the old file or the new.

    Raises
    ------
    OSError
        If the folder cannot be written.
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
    """Make a whole file, which may be its writer's alone, ``path``, with the rights of any new file."""
    temporary.chmod(0o666 & ~_UMASK)
    temporary.replace(path)
