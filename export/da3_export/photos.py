"""Photo files of a folder, for distillation and evaluation."""

from __future__ import annotations

from pathlib import Path

from da3_runtime.image.decode import Photo, decode_photo
from da3_runtime.image.folder import find_photos as photos_below

# An image of depth beside a photo is not a photo.
DEPTH_IMAGE_ENDINGS = (".depth.png", ".depth.tiff", ".depth.tif")
# The files are the user's own, so the limits are far above those of a server.
_MAX_BYTES = 2**28
_MAX_PIXELS = 2**28


def find_photos(folder: Path) -> list[Path]:
    """Photos in a folder and the folders below it, sorted by path; empty if there is no such folder.

    Raises
    ------
    ImageError
        If a folder cannot be read.
    """
    names = photos_below(folder).names if folder.is_dir() else []
    return [folder / name for name in names if not name.lower().endswith(DEPTH_IMAGE_ENDINGS)]


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
