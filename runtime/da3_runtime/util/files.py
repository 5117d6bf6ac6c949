"""Atomic writes: a reader never sees a partial file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Reading the umask means setting it, which affects all threads: read it once, at import.
_UMASK = os.umask(0)
os.umask(_UMASK)


def write_atomically(path: Path, data: bytes, scratch: Path | None = None) -> None:
    """Write ``data`` to ``path``; readers find the old file or the new one, even after a crash.

    Parameters
    ----------
    scratch : Path | None
        Folder of the temporary file, as for :func:`replacing`.

    Raises
    ------
    OSError
        If the folder cannot be written, or the disk is full.
    """
    with replacing(path, scratch) as temporary, temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def replacing(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """An empty temporary file, renamed to ``path`` unless the body raises.

    Its name is short, so any file name that the disk accepts can be written. The new file gets the
    permissions of a newly created file.

    Parameters
    ----------
    scratch : Path | None
        Folder of the temporary file, on the disk of ``path``; None for the folder of ``path``.

    Raises
    ------
    OSError
        If the folder cannot be written, or the file cannot have this name.
    """
    handle, name = tempfile.mkstemp(dir=scratch or path.parent, prefix=".", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
