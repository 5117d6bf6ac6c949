"""Digests of large files, computed once and remembered for as long as a file stays as it is.

A file counts as the same while its path, inode, size and times of change are the same. The digests are
kept in memory and, for the next process, in one file in the folder of the runtime caches.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from da3_runtime.store import manifest
from da3_runtime.util.files import write_atomically

logger = logging.getLogger(__name__)

FILE_NAME = "digests.json"
_MAX_FILES = 256  # how many files are remembered, the latest ones
# A file that changed so recently may change again without another time, as clocks tick in milliseconds.
_SETTLED_NS = 10**9

Entry = list[object]  # what identifies the file's content, then its digest
_known: dict[str, Entry] = {}


def runtime_cache_folder(named: Path | None) -> Path:
    """Folder of the runtime caches: ``RUNTIME_CACHE_DIR`` if it is set, or the user's cache folder."""
    if named is not None:
        return named
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(caches) / "da3-engines"


def remembered_sha256(path: Path, cache_dir: Path | None) -> str:
    """SHA-256 of a file; as :func:`remembered_digest`."""
    return _remembered(path, cache_dir, str(path.absolute()), manifest.sha256_of)


def remembered_digest(path: Path, cache_dir: Path | None) -> str:
    """:func:`digest_of` of a file; the file is read only if it is new or has changed.

    Parameters
    ----------
    cache_dir : Path | None
        ``RUNTIME_CACHE_DIR``. If the folder cannot be written, the digest is remembered in memory only.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    return _remembered(path, cache_dir, f"pieces of {path.absolute()}", manifest.digest_of)


def _remembered(path: Path, cache_dir: Path | None, key: str, compute: Callable[[Path], str]) -> str:
    file = runtime_cache_folder(cache_dir) / FILE_NAME
    identity = _identity(path)
    for entries in (_known, _read(file)):
        entry = entries.get(key)
        if entry is not None and entry[:-1] == identity:
            return str(entry[-1])
    digest = compute(path)
    is_settled = not 0 <= time.time_ns() - path.stat().st_mtime_ns < _SETTLED_NS
    if is_settled and _identity(path) == identity:
        _known[key] = [*identity, digest]
        _write(file, key)
    return digest


def _identity(path: Path) -> Entry:
    stat = path.stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read(file: Path) -> dict[str, Entry]:
    """The remembered digests by path; none if the file is missing or damaged."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {key: entry for key, entry in entries.items() if isinstance(entry, list) and entry}


def _write(file: Path, key: str) -> None:
    """Add a digest to the file. A failure costs only time at the next start."""
    entries = _read(file)
    entries.pop(key, None)
    latest = [*entries.items(), (key, _known[key])][-_MAX_FILES:]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(dict(latest), indent=0).encode())
    except OSError as error:
        logger.info("%s cannot be saved: %s", FILE_NAME, error.strerror)
