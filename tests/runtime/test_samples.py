"""Images of more than 8 bits a sample, or of another type than bytes: the same picture as their original."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from da3_runtime.errors import ImageError, ImageFormatError
from da3_runtime.image.decode import decode_photo, photo_of_image
from tests.support.images import encode, png_chunk, tiff_file
from tests.support.paths import INPUTS, PHOTOS

REFERENCE = np.asarray(Image.open(INPUTS / "reference_gray.png"), np.float64) / 65535
COLOR = np.asarray(Image.open(PHOTOS / "coffee.jpg").resize((160, 120)), np.float64) / 255
ASSUMED = "The brightness range of the image was assumed: {} is black, {} is white."


def decode(data):
    return decode_photo(data, max_bytes=2**24, max_pixels=2**22)


def assert_shows(photo, picture, tolerance=1.0):
    """The photo has the brightness of ``picture``, 0 to 1, to within some of 255 steps."""
    expected = np.atleast_3d(picture) * 255
    assert np.abs(photo.rgb - expected).max() <= tolerance


def as_type(picture, dtype):
    dtype = np.dtype(dtype)
    top = 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max)
    return np.minimum(picture * top, np.nextafter(top, 0) if dtype.itemsize == 8 else top).astype(dtype)


@pytest.mark.parametrize(
    ("name", "warnings"),
    [
        ("reference_gray.png", []),
        ("gray16_miniswhite.tif", []),
        ("gray_float32_0_1.tiff", []),
        ("gray_uint16_10bit.png", [ASSUMED.format(0, 1023)]),
        ("gray_uint16_one_hot_pixel.png", [ASSUMED.format(0, 255)]),
    ],
)
def test_a_gray_photo_of_unusual_samples_is_as_bright_as_its_original(name, warnings):
    photo = decode((INPUTS / name).read_bytes())
    rgb, expected = photo.rgb.astype(int), np.rint(REFERENCE * 255)[:, :, None]
    assert np.mean(np.abs(rgb - expected) <= 1) > 0.9999  # all but a hot pixel
    assert list(photo.warnings) == warnings


def test_a_color_photo_of_floating_point_samples_is_read():
    photo = decode((INPUTS / "rgb_float32_0_1.tif").read_bytes())
    original = Image.open(INPUTS / "turned_bad_rational_stray_bytes.jpg").convert("RGB")
    assert np.abs(photo.rgb.astype(int) - np.asarray(original)).mean() < 3
    assert photo.warnings == ()


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["u2", "i2", "u4", "i4", "u8", "f2", "f4", "f8"])
def test_every_type_of_sample_is_read_from_a_tiff(dtype, order):
    for picture in (REFERENCE, COLOR):
        photo = decode(tiff_file(as_type(picture, dtype), order))
        assert_shows(photo, picture)
        assert photo.warnings == ()


@pytest.mark.parametrize("dtype", ["u2", "f4"])
@pytest.mark.parametrize("compression", [5, 8])
def test_compressed_tiffs_are_read(dtype, compression):
    """LZW and deflate, with the predictor that OpenCV chooses."""
    values = as_type(COLOR, dtype)[:, :, ::-1]
    _, data = cv2.imencode(".tiff", values, [cv2.IMWRITE_TIFF_COMPRESSION, compression])
    assert_shows(decode(data.tobytes()), COLOR)


@pytest.mark.parametrize("dtype", ["u2", "f2", "f8"])
def test_a_deflated_strip_is_read(dtype):
    values = as_type(COLOR, dtype)
    pixels = zlib.compress(values.tobytes())

    def file(size):
        whole = tiff_file(values, t259=8, t279=size)
        return whole[:8] + pixels.ljust(values.nbytes, b"\0") + whole[8 + values.nbytes :]

    assert_shows(decode(file(len(pixels))), COLOR)
    with pytest.raises(ImageError, match="cut short"):
        decode(file(len(pixels) // 2))


@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_separate_planes_are_read(dtype):
    values = as_type(COLOR, dtype).transpose(2, 0, 1)
    height, width = COLOR.shape[:2]
    plane = height * width * values.itemsize
    data = tiff_file(values.reshape(height, width, 3), t284=2)
    assert_shows(decode(data), COLOR)
    assert len(data) > 3 * plane


@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_white_is_zero_is_inverted_in_every_type(dtype):
    photo = decode(tiff_file(as_type(1 - REFERENCE, dtype), t262=0))
    assert_shows(photo, REFERENCE)


@pytest.mark.parametrize("kind", [1, 2])
def test_gray_with_transparency_becomes_white_where_it_is_transparent(kind):
    alpha = np.ones_like(REFERENCE)
    alpha[:100] = 0.25
    color = REFERENCE * alpha if kind == 1 else REFERENCE
    photo = decode(tiff_file(as_type(np.dstack([color, alpha]), "u2"), t338=kind))
    assert_shows(photo, REFERENCE * alpha + 1 - alpha, 1.5)


@pytest.mark.parametrize(
    ("values", "tags", "black", "white"),
    [
        (REFERENCE * 1023, {"t281": 1023}, None, None),
        (REFERENCE * 4095, {"t280": 0, "t281": 4095}, None, None),
        (20000 + REFERENCE * 3000, {"t280": 20000, "t281": 23000}, None, None),
        (REFERENCE * 1023, {}, 0, 1023),
        (REFERENCE * 4095, {"t281": 65535}, 0, 4095),
        (REFERENCE * 65535, {"t281": 255}, None, None),  # a tag that cannot be true
    ],
)
def test_the_range_is_the_one_that_the_file_states_unless_its_samples_deny_it(
    values, tags, black, white
):
    photo = decode(tiff_file(np.rint(values).astype("u2"), **tags))
    assert_shows(photo, REFERENCE)
    assert list(photo.warnings) == ([] if white is None else [ASSUMED.format(black, white)])


def test_the_stated_range_of_floating_point_samples_is_used():
    photo = decode(tiff_file((REFERENCE * 5 - 2).astype("f4"), t340=-2.0, t341=3.0))
    assert_shows(photo, REFERENCE)
    assert photo.warnings == ()


@pytest.mark.parametrize("scale", [255, 4095, 65535])
def test_floating_point_samples_of_whole_numbers_are_scaled_by_their_bits(scale):
    photo = decode(tiff_file((REFERENCE * scale).astype("f4")))
    assert_shows(photo, REFERENCE)
    assert list(photo.warnings) == [ASSUMED.format(0, scale)]


@pytest.mark.parametrize(("scale", "offset"), [(2, -1), (3.7, 0), (0.02, 0), (0.03, 0.4)])
def test_other_floating_point_samples_go_from_black_to_white(scale, offset):
    photo = decode(tiff_file((REFERENCE * scale + offset).astype("f4")))
    assert_shows(photo, REFERENCE, 8)
    assert photo.warnings[0].startswith("The brightness range of the image was assumed: ")


def test_samples_that_are_low_in_contrast_go_from_black_to_white():
    photo = decode(tiff_file((20000 + REFERENCE * 3000).astype("u2")))
    assert_shows(photo, REFERENCE, 8)
    assert len(photo.warnings) == 1


def test_a_little_overshoot_of_floating_point_samples_is_no_other_range():
    photo = decode(tiff_file((REFERENCE * 1.04 - 0.02).astype("f4")))
    assert_shows(photo, REFERENCE, 6)
    assert photo.warnings == ()


@pytest.mark.parametrize("gap", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_black_and_reported(gap):
    values = REFERENCE.astype("f4")
    values[:20] = gap
    photo = decode(tiff_file(values))
    assert not photo.rgb[:20].any()
    assert np.abs(photo.rgb[20:] - REFERENCE[20:, :, None] * 255).max() <= 1
    assert photo.warnings == (
        "Some samples of the image are NaN or infinite; they were taken as black.",
    )
    with pytest.raises(ImageError, match="NaN or infinite: send another"):
        decode(tiff_file(np.full_like(values, gap)))


def png16(values):
    """A PNG of 16 bits: gray, gray with opacity, RGB or RGBA."""
    height, width, samples = np.atleast_3d(values).shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[samples], 0, 0, 0)
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
    pixels = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes(), 1)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_png_of_16_bits_in_color_keeps_its_brightness(bits):
    top = 2**bits - 1
    for picture in (COLOR, np.dstack([COLOR, np.ones(COLOR.shape[:2])]), np.dstack([REFERENCE] * 2)):
        values = np.rint(picture * top)
        if picture.shape[2] == 2:
            values[:, :, 1] = 65535
            picture = picture[:, :, 0]
        photo = decode(png16(values))
        assert_shows(photo, picture[:, :, :3] if picture.ndim == 3 else picture)
        assert list(photo.warnings) == ([] if bits == 16 else [ASSUMED.format(0, top)])


@pytest.mark.parametrize("order", "<>")
def test_packed_samples_of_12_bits_are_read_or_refused_by_their_kind(order):
    values = np.rint(REFERENCE * 4095).astype(np.uint16)
    first, second = values[:, ::2], values[:, 1::2]
    packed = np.dstack([first >> 4, (first & 15) << 4 | second >> 8, second & 255])
    data = tiff_file(packed.reshape(len(values), -1).astype(np.uint8), order, t256=320, t258=12)
    if order == "<":
        assert_shows(decode(data), REFERENCE)
        assert decode(data).warnings == ()
    else:
        with pytest.raises(ImageFormatError, match=r"\(1 x uint12\)"):
            decode(data)


def test_a_single_brightness_assumes_nothing():
    for value in (0, 300, 65535):
        photo = decode(tiff_file(np.full((20, 20), value, "u2")))
        assert (photo.rgb == round(value / 257)).all()
        assert photo.warnings == ()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: tiff_file(np.zeros((9, 9, 5), "u2")), r"\(5 x uint16\)"),
        (lambda: tiff_file(np.zeros((9, 9, 3), "f4"), t259=50000), r"\(3 x float32, zstd\)"),
        (lambda: tiff_file(np.zeros((9, 9, 7), "u1")), r"\(7 x uint8\)"),
        (lambda: tiff_file(np.zeros((9, 9), "u4"), t259=34712), r"\(1 x uint32, compression 34712\)"),
    ],
)
def test_a_tiff_of_another_kind_is_refused_by_its_kind(data, words):
    with pytest.raises(ImageFormatError, match=f"is a TIFF of a kind that is not supported {words}"):
        decode(data())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_a_wide_tiff_cut_short_is_damaged(share, dtype):
    _, data = cv2.imencode(".tiff", as_type(COLOR, dtype))
    with pytest.raises(ImageError, match=r"damaged or cut short|none of the formats"):
        decode(data.tobytes()[: int(len(data) * share)])


def test_a_pillow_image_of_wide_samples_is_as_bright_as_its_file():
    for name in ("gray16_miniswhite.tif", "gray_float32_0_1.tiff", "gray_uint16_10bit.png"):
        with Image.open(INPUTS / name) as image:
            assert_shows(photo_of_image(image, 2**22), REFERENCE)


def test_a_transparent_gray_of_16_bits_becomes_white():
    values = np.full((4, 4), 30000, np.uint16)
    values[0, 0] = 500
    data = encode(Image.fromarray(values), "PNG", transparency=500)
    assert decode(data).rgb[0, 0].tolist() == [255] * 3
    assert decode(data).rgb[1, 1].tolist() == [117] * 3
