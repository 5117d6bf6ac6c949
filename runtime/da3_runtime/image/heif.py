"""HEIC, the photos of iPhones, through pi-heif: the extra ``heif``."""

from __future__ import annotations

import io
from typing import Any

from da3_runtime.errors import ImageFormatError
from da3_runtime.util.extras import missing_package

# Brands of ISO/IEC 23008-12 for images and sequences in HEVC.
_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}


def is_heif(data: bytes) -> bool:
    """Whether an image is HEIC: HEIF with pictures in HEVC, unlike AVIF."""
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), 256)
    return not _BRANDS.isdisjoint(data[start : start + 4] for start in (8, *range(16, end, 4)))


def open_heif(data: bytes) -> Any:
    """The main picture of a HEIC, a ``pi_heif.HeifImage``, not decoded yet.

    libheif applies the file's own rotation when it decodes; EXIF's orientation only repeats it.

    Raises
    ------
    ImageFormatError
        If pi-heif is not installed.
    """
    if reason := missing_package("pi_heif"):
        raise ImageFormatError(f"The image is HEIC, and {reason}; or send it as JPEG.")
    import pi_heif  # type: ignore[import-untyped,import-not-found,unused-ignore]

    file = pi_heif.open_heif(io.BytesIO(data))
    return file[file.primary_index]
