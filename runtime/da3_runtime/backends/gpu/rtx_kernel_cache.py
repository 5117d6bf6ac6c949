"""The kernels that TensorRT-RTX specialised for a GPU, kept in a file for the next start."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from pathlib import Path
from typing import Any

from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.files import write_atomically

logger = logging.getLogger(__name__)

SUFFIX = ".rtxcache"
_DIGEST_BYTES = hashlib.sha256().digest_size


def cache_path(folder: EngineFolder, settings: EngineSettings, plan: str, *made_for: str) -> Path:
    """File of the kernels of a plan.

    It lies in ``RUNTIME_CACHE_DIR``, else next to the plan, else, where that cannot be written, in the
    user's cache folder.

    Parameters
    ----------
    plan : str
        The plan's file name.
    *made_for : str
        What the kernels depend on; each combination has a file of its own.
    """
    digest = hashlib.sha256("\n".join(made_for).encode()).hexdigest()[:16]
    name = f"{plan}.{digest}{SUFFIX}"
    if settings.runtime_cache_dir is not None:
        return settings.runtime_cache_dir / name
    if folder.hub is None and os.access(folder.path, os.W_OK):
        return folder.path / name
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111
    return Path(caches) / "da3-engines" / name


class RuntimeCache:
    """A library's runtime cache, filled from its file if that is whole.

    The file starts with the digest of the rest, so that the library never sees a damaged one; whether
    the rest suits the GPU, the driver and the library's version the library finds out itself.

    Parameters
    ----------
    config : IRuntimeConfig
        Of the contexts that are to use it.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._cache = config.create_runtime_cache()
        self._saved = _read(path)
        if self._saved and not self._cache.deserialize(self._saved):
            logger.info("%s was made for another machine; it is made anew", path.name)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write it if it changed. Where that is not possible the next start specialises again."""
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
        logger.warning("%s is damaged; it is made anew", path.name)
        return b""
    return data
