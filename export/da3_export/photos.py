"""Photo files of a folder, for distillation and evaluation, found as ``da3-runtime depth`` does."""

from __future__ import annotations

from pathlib import Path

from da3_runtime.image.decode import Photo, decode_photo
from da3_runtime.image.folder import Found
from da3_runtime.image.folder import find_photos as photos_below

# An image of depth beside a photo is not a photo.
DEPTH_IMAGE_ENDINGS = (".depth.png", ".depth.tiff", ".depth.tif")
# The files are the user's own, so the limits are far above those of a server.
_MAX_BYTES = 2**28
_MAX_PIXELS = 2**28


def search(folder: Path) -> Found:
    """What a folder and the folders below it contain; nothing if there is no such folder.

    Raises
    ------
    ImageError
        If a folder cannot be read.
    """
    found = photos_below(folder) if folder.is_dir() else Found()
    for ending in DEPTH_IMAGE_ENDINGS:
        photos = [name for name in found.names if not name.lower().endswith(ending)]
        if len(photos) < len(found.names):
            found.skipped[ending] += len(found.names) - len(photos)
            found.names = photos
    return found


def find_photos(folder: Path) -> list[Path]:
    """Photos in a folder and the folders below it, sorted by path; raises as :func:`search`."""
    return [folder / name for name in search(folder).names]


def read_photo(path: Path) -> Photo:
    """Decode a photo: uint8 RGB [H, W, 3], upright, and its focal length from EXIF.

    Raises
    ------
    ImageError
        If the file is not an image that can be read.
    OSError
        If the file cannot be opened.
    """
    return decode_photo(path.read_bytes(), max_bytes=_MAX_BYTES, max_pixels=_MAX_PIXELS)
