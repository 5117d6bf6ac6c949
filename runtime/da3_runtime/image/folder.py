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
    names : list[str]
        Path of each photo below the folder, with ``/``, sorted by its parts. Text, as a folder may have
        millions.
    links : set[str]
        Those names that are links themselves.
    skipped : Counter[str]
        Number of the other files, by ending in lower case or in words such as ``hidden``.
    folders : set[Path]
        The folders that were searched, as resolved paths.
    """

    names: list[str] = field(default_factory=list)
    links: set[str] = field(default_factory=set)
    skipped: Counter[str] = field(default_factory=Counter)
    folders: set[Path] = field(default_factory=set)


def in_words(skipped: Counter[str]) -> str:
    """The numbers of skipped files by kind, the most frequent first, such as ``3 .txt, 1 hidden``."""
    return ", ".join(f"{number} {kind}" for kind, number in skipped.most_common())


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
    folders, links = deque([""]), deque[str]()
    while folders or links:
        below = (folders or links).popleft()
        here = folder / below
        real = real_path(here)
        if real in found.folders:
            continue
        if _is_below(real, without):
            found.skipped[_RESULTS] += 1
            continue
        found.folders.add(real)
        try:
            with os.scandir(here) as entries:
                for entry in sorted(entries, key=lambda each: each.name):
                    if entry.name.startswith("._") or entry.name == "__MACOSX":
                        continue
                    name = f"{below}{entry.name}"
                    if _is_folder(entry) and not entry.name.startswith("."):
                        (links if entry.is_symlink() else folders).append(f"{name}/")
                    elif kind := _why_skipped(entry, endings):
                        found.skipped[kind] += 1
                    elif entry.is_symlink() and _is_below(real_path(here / entry.name), without):
                        found.skipped[_RESULTS] += 1
                    else:
                        found.names.append(name)
                        if entry.is_symlink():
                            found.links.add(name)
        except OSError as error:
            raise ImageError(f"{here}: {error.strerror or 'cannot be read'}.") from None
    found.names.sort(key=lambda name: name.split("/"))
    return found


def real_path(path: Path) -> Path:
    """The absolute path without links; unlike ``Path.resolve``, also of a link that leads to itself."""
    return Path(os.path.realpath(path))


def _is_below(path: Path, folder: Path | None) -> bool:
    return folder is not None and path.is_relative_to(folder)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _why_skipped(entry: os.DirEntry[str], endings: frozenset[str]) -> str:
    """The kind under which a file is counted as skipped; empty for a photo."""
    path = Path(entry.path)
    ending = path.suffix.lower()
    if entry.name.startswith("."):
        return "hidden"
    if not ending:
        return "without an ending"
    if ending not in endings:
        return ending if _PLAIN_ENDING.fullmatch(ending) else "other"
    is_file = entry.is_file(follow_symlinks=False) or path.is_file() or not path.exists()
    return "" if is_file else "not a file"
