"""EXIF of a photo -> its orientation, and its focal length in pixels."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

# Tags of EXIF 2.32 (CIPA DC-008).
ORIENTATION = 0x0112  # rotation and mirroring, 1 to 8
_EXIF_IFD = 0x8769
_FOCAL_LENGTH = 0x920A  # mm
_PIXEL_X_DIMENSION = 0xA002
_PIXEL_Y_DIMENSION = 0xA003
_FOCAL_PLANE_X_RESOLUTION = 0xA20E  # pixels per unit
_FOCAL_PLANE_RESOLUTION_UNIT = 0xA210
_FOCAL_LENGTH_IN_35MM = 0xA405  # mm, equivalent by the diagonal
_UNIT_IN_MM = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}
_DIAGONAL_35MM = math.hypot(36, 24)
# In multiples of the longest side: a field of view of 170 degrees to 1 degree. Other values are errors.
_PLAUSIBLE = (0.04, 60.0)
# Types of TIFF that hold numbers, as letters of struct; the two letters of a fraction.
_NUMBERS = {1: "B", 3: "H", 4: "L", 5: "LL", 8: "h", 9: "l", 10: "ll", 11: "f", 12: "d"}


def exif_numbers(exif: bytes) -> dict[int, float]:
    """The first number of every tag in the main and the EXIF directory of an EXIF block.

    A tag that cannot be read is left out, and costs no other tag: many programs write damaged EXIF.

    Parameters
    ----------
    exif : bytes
        A TIFF header and directories, with or without ``Exif`` before it.
    """
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return {}
    tags = _directory(exif, struct.unpack_from(f"{order}L", exif, 4)[0], order)
    pointer = tags.get(_EXIF_IFD)
    return _directory(exif, int(pointer), order) | tags if pointer else tags


def _directory(exif: bytes, start: int, order: str) -> dict[int, float]:
    tags: dict[int, float] = {}
    (count,) = struct.unpack_from(f"{order}H", exif, start) if start + 2 <= len(exif) else (0,)
    for entry in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, length, offset = struct.unpack_from(f"{order}HHLL", exif, entry)
        if kind not in _NUMBERS or length == 0:
            continue
        layout = order + _NUMBERS[kind]
        size = struct.calcsize(layout)
        place = entry + 8 if size * length <= 4 else offset
        if place + size <= len(exif):
            number, *divisor = struct.unpack_from(layout, exif, place)
            if divisor != [0]:
                tags.setdefault(tag, number / divisor[0] if divisor else number)
    return tags


def exif_focal_px(tags: Mapping[int, float], width: int, height: int) -> float | None:
    """Focal length of an image in pixels, from its EXIF; None if it is missing or implausible.

    The 35 mm equivalent takes precedence. CIPA DC-008 defines it by the diagonals of film and image.
    Otherwise the focal length in millimeters times the sensor's pixels per unit gives it. That density
    refers to the photo as taken, which may have been resized since, and turned by software.

    Parameters
    ----------
    tags : Mapping[int, float]
        Numbers of the image's EXIF, from :func:`exif_numbers`.
    width, height : int
        Size of the image as stored, before it is turned upright.
    """
    equivalent = _positive(tags.get(_FOCAL_LENGTH_IN_35MM))
    if equivalent:
        return _plausible(equivalent / _DIAGONAL_35MM * math.hypot(width, height), width, height)
    millimeters = _positive(tags.get(_FOCAL_LENGTH))
    density = _positive(tags.get(_FOCAL_PLANE_X_RESOLUTION))
    unit = _UNIT_IN_MM.get(int(tags.get(_FOCAL_PLANE_RESOLUTION_UNIT, 2)))
    if not (millimeters and density and unit):
        return None
    scale = _scale_since_taken(tags, width, height)
    return _plausible(millimeters * density / unit * scale, width, height)


def _scale_since_taken(tags: Mapping[int, float], width: int, height: int) -> float:
    """Stored size / size as taken, along the side that was the sensor's horizontal one."""
    taken_width = _positive(tags.get(_PIXEL_X_DIMENSION))
    if taken_width is None or taken_width == width:
        return width / (taken_width or width)
    # Sensors lie on their long side, so a missing height is taken to be smaller.
    taken_height = _positive(tags.get(_PIXEL_Y_DIMENSION)) or 0
    is_across = (taken_width - taken_height) * (width - height) < 0
    return (height if is_across else width) / taken_width


def _positive(number: float | None) -> float | None:
    return number if number is not None and 0 < number < math.inf else None


def _plausible(focal_px: float, width: int, height: int) -> float | None:
    low, high = _PLAUSIBLE
    return focal_px if low <= focal_px / max(width, height) <= high else None
