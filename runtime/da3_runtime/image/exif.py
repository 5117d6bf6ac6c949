"""EXIF of a photo -> its focal length in pixels."""

from __future__ import annotations

import math

from PIL import Image

# Tags of EXIF 2.32 (CIPA DC-008).
_EXIF_IFD = 0x8769
_FOCAL_LENGTH = 0x920A  # mm
_PIXEL_X_DIMENSION = 0xA002
_FOCAL_PLANE_X_RESOLUTION = 0xA20E  # pixels per unit
_FOCAL_PLANE_RESOLUTION_UNIT = 0xA210
_FOCAL_LENGTH_IN_35MM = 0xA405  # mm, by the diagonal
_UNIT_IN_MM = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}
_DIAGONAL_35MM = math.hypot(36, 24)
# In multiples of the longest side, 170 degrees to 1; beyond it is a mistake of whoever wrote it.
_PLAUSIBLE = (0.04, 60.0)


def exif_focal_px(exif: Image.Exif, width: int, height: int) -> float | None:
    """Focal length in pixels of an image, from its EXIF; None where that does not tell.

    Either from the focal length that would see as much on 35 mm film, of which CIPA DC-008 compares the
    diagonals, or from the focal length in millimetres and the sensor's pixels per unit, which count
    pixels of the photo as it was taken.

    Parameters
    ----------
    width, height : int
        Of the image as stored.
    """
    tags = exif.get_ifd(_EXIF_IFD)
    equivalent = _number(tags.get(_FOCAL_LENGTH_IN_35MM))
    if equivalent:
        return _plausible(equivalent / _DIAGONAL_35MM * math.hypot(width, height), width, height)
    millimetres = _number(tags.get(_FOCAL_LENGTH))
    density = _number(tags.get(_FOCAL_PLANE_X_RESOLUTION))
    unit = _UNIT_IN_MM.get(tags.get(_FOCAL_PLANE_RESOLUTION_UNIT, 2))
    if not (millimetres and density and unit):
        return None
    taken_width = _number(tags.get(_PIXEL_X_DIMENSION)) or width
    return _plausible(millimetres * density / unit * width / taken_width, width, height)


def _number(value: object) -> float | None:
    """A positive finite EXIF number."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return number if 0 < number < math.inf else None


def _plausible(focal_px: float, width: int, height: int) -> float | None:
    low, high = _PLAUSIBLE
    return focal_px if low <= focal_px / max(width, height) <= high else None
