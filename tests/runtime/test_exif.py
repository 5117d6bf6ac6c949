"""The focal length from EXIF, and lenses of resized photos."""

import io
import math

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from da3_runtime.image.decode import decode_photo
from da3_runtime.image.exif import exif_focal_px
from da3_runtime.postprocess.camera import EXIF, centered_lens

IFD, ORIENTATION = 0x8769, 0x0112
FOCAL, PIXEL_X, PIXEL_Y, DENSITY, UNIT, FILM = 0x920A, 0xA002, 0xA003, 0xA20E, 0xA210, 0xA405
SIZE = (400, 300)


def exif(tags, orientation=None):
    made = Image.Exif()
    if orientation:
        made[ORIENTATION] = orientation
    made[IFD] = tags
    return made


def photo(tags, fmt="JPEG", orientation=None):
    stream = io.BytesIO()
    Image.new("RGB", SIZE).save(stream, fmt, exif=exif(tags, orientation))
    return decode_photo(stream.getvalue(), max_bytes=2**20, max_pixels=2**20)


# The diagonal is 500 pixels, 36 x 24 mm film's 43.27 mm: 26 mm on film are 300.5 pixels.
ON_FILM = 26 / math.hypot(36, 24) * 500


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_the_35_mm_equivalent_is_converted_by_diagonals(fmt):
    assert photo({FILM: 26}, fmt).focal_px == pytest.approx(ON_FILM)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_rotated_photo_has_the_same_focal_length(orientation):
    turned = photo({FILM: 26}, orientation=orientation)
    assert turned.rgb.shape == ((300, 400, 3) if orientation in (1, 3) else (400, 300, 3))
    assert turned.focal_px == pytest.approx(ON_FILM)


@pytest.mark.parametrize(("unit", "density"), [(2, 2540.0), (3, 1000.0), (4, 100.0), (None, 2540.0)])
def test_millimeters_are_converted_by_the_sensors_density(unit, density):
    tags = {FOCAL: IFDRational(4), DENSITY: IFDRational(density), PIXEL_X: 800}
    if unit:
        tags[UNIT] = unit
    # 4 mm at 100 pixels per millimeter, in a photo that was later resized to half its width.
    assert photo(tags).focal_px == pytest.approx(200)
    tags.pop(PIXEL_X)
    assert photo(tags).focal_px == pytest.approx(400)


@pytest.mark.parametrize("taken", [{PIXEL_X: 5184, PIXEL_Y: 3456}, {PIXEL_X: 5184}])
def test_a_photo_turned_and_resized_by_software_has_the_focal_length_of_its_long_side(taken):
    tags = {FOCAL: 42.7, DENSITY: 264.09, UNIT: 4, **taken}
    assert exif_focal_px(tags, 432, 648) == pytest.approx(42.7 * 264.09 * 648 / 5184)
    assert exif_focal_px(tags, 648, 432) == pytest.approx(42.7 * 264.09 * 648 / 5184)


def test_a_photo_taken_upright_has_the_focal_length_of_its_width():
    tags = {FOCAL: 42.7, DENSITY: 264.09, UNIT: 4, PIXEL_X: 3456, PIXEL_Y: 5184}
    assert exif_focal_px(tags, 432, 648) == pytest.approx(42.7 * 264.09 * 432 / 3456)
    assert exif_focal_px({**tags, PIXEL_X: 432, PIXEL_Y: 648}, 432, 648) == pytest.approx(42.7 * 264.09)


def test_the_35_mm_equivalent_takes_precedence():
    tags = {FILM: 26, FOCAL: IFDRational(4), DENSITY: IFDRational(100), UNIT: 4}
    assert photo(tags).focal_px == pytest.approx(ON_FILM)


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {FOCAL: IFDRational(4)},
        {FILM: 0},
        {FILM: 60000},
        {FOCAL: IFDRational(4, 0), DENSITY: IFDRational(100), UNIT: 4},
        {FOCAL: IFDRational(4), DENSITY: IFDRational(100), UNIT: 9},
        {FOCAL: IFDRational(1, 1000), DENSITY: IFDRational(100), UNIT: 4},
    ],
)
def test_incomplete_or_implausible_exif_gives_no_focal_length(tags):
    assert photo(tags).focal_px is None


def test_damaged_exif_costs_only_the_focal_length():
    stream = io.BytesIO()
    Image.new("RGB", SIZE).save(
        stream, "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff" + b"\xff" * 40
    )
    decoded = decode_photo(stream.getvalue(), max_bytes=2**20, max_pixels=2**20)
    assert decoded.rgb.shape == (300, 400, 3)
    assert decoded.focal_px is None


def test_a_resized_lens_keeps_its_field_of_view():
    lens = centered_lens(600, 400, 300, EXIF).resized(0.5, 2)
    assert np.array_equal(lens.intrinsics, [[300, 0, 100], [0, 1200, 300], [0, 0, 1]])
    assert lens.focal == 750
    assert lens.source == EXIF
