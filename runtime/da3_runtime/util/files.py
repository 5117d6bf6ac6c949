"""Writes that survive a crash, atomic ones among them, and locks between processes."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

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


def locked(path: Path) -> BinaryIO:
    """A file to append to, which this process locks until it is closed; created if it is missing.

    A file system without locks, as some network file systems are, gives the file without a lock.

    Raises
    ------
    BlockingIOError
        If another process has locked it.
    OSError
        If it cannot be written.
    """
    import fcntl  # Windows does not have it

    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                file.close()
                raise
        # A run that ended in between has replaced or removed the file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk and survives a power cut.

    A file system that cannot do this for folders is left as it is.

    Raises
    ------
    OSError
        If a file cannot be written to the disk.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(handle)
