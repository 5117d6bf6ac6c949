"""Keeps the kernels that TensorRT-RTX specialized for a GPU in a file, for the next start."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from pathlib import Path
from typing import Any

from da3_runtime.store.digests import runtime_cache_folder
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.files import write_atomically

logger = logging.getLogger(__name__)

SUFFIX = ".rtxcache"
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_path(folder: EngineFolder, settings: EngineSettings, plan: str, *made_for: str) -> Path:
    """Path of the file with a plan's kernels.

    The folder is ``RUNTIME_CACHE_DIR`` if it is set; otherwise the plan's own, or the user's cache
    folder if the plan's cannot be written.

    Parameters
    ----------
    plan : str
        The plan's file name.
    *made_for : str
        Everything that the kernels depend on; each combination has its own file.
    """
    digest = hashlib.sha256("\n".join(made_for).encode()).hexdigest()[:16]
    name = f"{plan}.{digest}{SUFFIX}"
    named = settings.runtime_cache_dir
    if named is None and folder.hub is None and os.access(folder.path, os.W_OK):
        return folder.path / name
    return runtime_cache_folder(named) / name


class RuntimeCache:
    """A library's runtime cache, loaded from its file if the file is intact.

    The file starts with the SHA-256 digest of the rest, so the library never reads a damaged cache. The
    library itself checks that the cache fits the GPU, the driver and its version.

    Parameters
    ----------
    config : IRuntimeConfig
        Configuration of the contexts that will use the cache.
    path : Path
        The file.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._cache = config.create_runtime_cache()
        self._saved = _read(path)
        if self._saved and not self._cache.deserialize(self._saved):
            logger.info("%s was made on another machine; the kernels are specialized again", path.name)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the file if the cache changed. A failure is only logged: the next start is slower."""
        with self._lock:
            data = bytes(memoryview(self._cache.serialize()))
            if data == self._saved:
                return
            self._saved = data
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self._path, hashlib.sha256(data).digest() + data)
            except OSError as error:
                logger.warning("%s cannot be saved: %s", self._path.name, error.strerror)


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError:
        return b""
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        logger.warning("%s is damaged; the kernels are specialized again", path.name)
        return b""
    return data
