"""The photos in a folder and the folders below it."""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from da3_runtime.errors import ImageError
from da3_runtime.image.decode import FORMATS

# Formats that are decoded by a plugin or an extra which is loaded only when a file needs it. Without the
# extra such a photo fails with a sentence that names it; to skip the photo would hide that.
_LOADED_LATER = frozenset((".mpo", ".heic", ".heif", ".hif"))
_RESULTS = "with earlier results"
_PLAIN_ENDING = re.compile(r"\.\w{1,12}")


@dataclass
class Found:
    """What a search found.

    Attributes
    ----------
    photos : list[Path]
        Sorted by path.
    skipped : Counter[str]
        Number of the other files, by ending in lower case or in words such as ``hidden``.
    folders : set[Path]
        The folders that were searched, as resolved paths.
    """

    photos: list[Path] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    folders: set[Path] = field(default_factory=set)


def photo_endings() -> frozenset[str]:
    """Endings, in lower case and with their period, of the names of images that can be decoded."""
    return _LOADED_LATER | {ending for ending, name in Image.EXTENSION.items() if name in FORMATS}


def find_photos(folder: Path, without: Path | None = None) -> Found:
    """Search a folder and the folders below it, by the endings of names.

    Links to files and folders are followed; each folder is searched once, under its own name if that is
    below ``folder``. Hidden files and folders are skipped. What macOS adds to archives (``._NAME``,
    ``__MACOSX``) is ignored. A link to a missing photo counts as a photo, so that its failure is seen.

    Parameters
    ----------
    without : Path | None
        A resolved folder of earlier results, which are left out however they are reached.

    Raises
    ------
    ImageError
        If a folder cannot be read.
    """
    found, endings = Found(), photo_endings()
    folders, links = deque([folder]), deque[Path]()
    while folders or links:
        here = (folders or links).popleft()
        real = real_path(here)
        if real in found.folders:
            continue
        if _is_below(real, without):
            found.skipped[_RESULTS] += 1
            continue
        found.folders.add(real)
        try:
            for path in sorted(here.iterdir()):
                if path.name.startswith("._") or path.name == "__MACOSX":
                    continue
                if path.is_dir() and not path.name.startswith("."):
                    (links if path.is_symlink() else folders).append(path)
                elif kind := _why_skipped(path, endings):
                    found.skipped[kind] += 1
                elif path.is_symlink() and _is_below(real_path(path), without):
                    found.skipped[_RESULTS] += 1
                else:
                    found.photos.append(path)
        except OSError as error:
            raise ImageError(f"{here}: {error.strerror or 'cannot be read'}.") from None
    found.photos.sort()
    return found


def real_path(path: Path) -> Path:
    """The absolute path without links; unlike ``Path.resolve``, also of a link that leads to itself."""
    return Path(os.path.realpath(path))


def _is_below(path: Path, folder: Path | None) -> bool:
    return folder is not None and path.is_relative_to(folder)


def _why_skipped(path: Path, endings: frozenset[str]) -> str:
    """The kind under which a file is counted as skipped; empty for a photo."""
    ending = path.suffix.lower()
    if path.name.startswith("."):
        return "hidden"
    if not ending:
        return "without an ending"
    if ending not in endings:
        return ending if _PLAIN_ENDING.fullmatch(ending) else "other"
    return "" if path.is_file() or not path.exists() else "not a file"
