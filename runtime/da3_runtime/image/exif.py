"""EXIF of a photo -> focal length in pixels."""

from __future__ import annotations

import math

from PIL import Image

# Tags of EXIF 2.32 (CIPA DC-008).
_EXIF_IFD = 0x8769
_FOCAL_LENGTH = 0x920A  # mm
_PIXEL_X_DIMENSION = 0xA002
_FOCAL_PLANE_X_RESOLUTION = 0xA20E  # pixels per unit
_FOCAL_PLANE_RESOLUTION_UNIT = 0xA210
_FOCAL_LENGTH_IN_35MM = 0xA405  # mm, equivalent by the diagonal
_UNIT_IN_MM = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}
_DIAGONAL_35MM = math.hypot(36, 24)
# In multiples of the longest side: a field of view of 170 degrees to 1 degree. Other values are errors.
_PLAUSIBLE = (0.04, 60.0)


def exif_focal_px(exif: Image.Exif, width: int, height: int) -> float | None:
    """Focal length of an image in pixels, from its EXIF; None if it is missing or implausible.

    The 35 mm equivalent takes precedence. CIPA DC-008 defines it by the diagonals of film and image.
    Otherwise the focal length in millimeters times the sensor's pixels per unit gives it. That density
    refers to the photo as taken, which may have been resized since.

    Parameters
    ----------
    exif : Image.Exif
        EXIF of the image.
    width, height : int
        Size of the image as stored, before it is turned upright.
    """
    tags = exif.get_ifd(_EXIF_IFD)
    equivalent = _number(tags.get(_FOCAL_LENGTH_IN_35MM))
    if equivalent:
        return _plausible(equivalent / _DIAGONAL_35MM * math.hypot(width, height), width, height)
    millimeters = _number(tags.get(_FOCAL_LENGTH))
    density = _number(tags.get(_FOCAL_PLANE_X_RESOLUTION))
    unit = _UNIT_IN_MM.get(tags.get(_FOCAL_PLANE_RESOLUTION_UNIT, 2))
    if not (millimeters and density and unit):
        return None
    taken_width = _number(tags.get(_PIXEL_X_DIMENSION)) or width
    return _plausible(millimeters * density / unit * width / taken_width, width, height)


def _number(value: object) -> float | None:
    """An EXIF value as a positive finite number, or None."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return number if 0 < number < math.inf else None


def _plausible(focal_px: float, width: int, height: int) -> float | None:
    low, high = _PLAUSIBLE
    return focal_px if low <= focal_px / max(width, height) <= high else None
