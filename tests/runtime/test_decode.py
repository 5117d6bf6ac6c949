"""Image bytes -> RGB."""

import io
import random
import struct
import sys
import tracemalloc
import warnings
import zlib
from itertools import pairwise

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps, features

from da3_runtime.errors import ImageError, ImageFormatError, ImageTooLargeError
from da3_runtime.image import decode as module
from da3_runtime.image.decode import decode_photo
from tests.support.images import png_chunk as chunk
from tests.support.images import tiff_file
from tests.support.paths import INPUTS, PHOTOS

LIMITS = {"max_bytes": 2**24, "max_pixels": 2**22}


def encode(image, fmt, **options):
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def decode(data, **limits):
    return decode_photo(data, **{**LIMITS, **limits}).rgb


GRADIENT = np.linspace(0, 255, 20 * 30 * 3).reshape(20, 30, 3).astype(np.uint8)


@pytest.mark.parametrize("fmt", ["PNG", "BMP", "TIFF", "WEBP"])
def test_decodes_lossless_formats_exactly(fmt):
    options = {"lossless": True} if fmt == "WEBP" else {}
    assert np.array_equal(decode(encode(Image.fromarray(GRADIENT), fmt, **options)), GRADIENT)


def test_decodes_a_jpeg_photo():
    rgb = decode((PHOTOS / "temple.jpg").read_bytes())
    assert rgb.shape == (427, 640, 3)
    assert rgb.dtype == np.uint8


def test_decodes_the_first_frame_of_a_gif():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpeg_pixels_equal_pillows(mode, options):
    """In every orientation, and with sides that are no multiple of a block."""
    photo = Image.open(PHOTOS / "coffee.jpg").convert(mode).crop((0, 0, 203, 101))
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(photo, "JPEG", exif=exif, **options)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert np.array_equal(decode(data), np.asarray(upright.convert("RGB")))


def test_decodes_a_jpeg_with_a_fault_that_pillow_forgives():
    data = encode(Image.fromarray(GRADIENT), "JPEG")
    scan = data.index(b"\xff\xda")
    faulty = data[:scan] + b"\x00\x00" + data[scan:]  # bytes before a marker
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(faulty, strict=True)
    assert np.array_equal(decode(faulty), decode(data))


def png_of(rows, width, cuts=(), before=(), after=()):
    """A PNG of filtered rows, its deflated stream cut into chunks at ``cuts``."""
    pixels = zlib.compress(rows.tobytes(), 1)
    places = [0, *cuts, len(pixels)]
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), 8, 2, 0, 0, 0)), *before]
    parts += [(b"IDAT", pixels[start:stop]) for start, stop in pairwise(places)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in [*parts, *after, (b"IEND", b"")])


def filtered_rows(height, width, seed=0):
    """Rows of noise that use every filter type of PNG."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (height, 1 + 3 * width), np.uint8)
    rows[:, 0] = rng.integers(0, 5, height)
    return rows


def by_libspng(data):
    """The pixels if libspng decodes the file, None if it is left to Pillow."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return module._decode_png(image, data)
    except (OSError, SyntaxError):
        return None


def by_pillow(data):
    """Pillow's pixels, or the error's sentence."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_decode_png", lambda *_: None)
        return pixels_or_error(data)


def pixels_or_error(data):
    try:
        return decode(data)
    except ImageError as error:
        return str(error)


def same(one, other):
    return one == other if isinstance(one, str) else np.array_equal(one, other)


def same_but_for_the_last_row(one, other):
    """Pillow leaves the last row black if the stream's checksum is wrong; libspng keeps the row."""
    return same(one, other) or (
        not isinstance(other, str) and same(one[:-1], other[:-1]) and not other[-1, -1].any()
    )


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 50), (50, 1), (333, 211), (1, 70000), (70000, 1), (500, 600)]
)
def test_png_pixels_equal_pillows(size):
    rows = filtered_rows(*size)
    data = png_of(rows, size[1])
    whole = by_libspng(data)
    assert np.array_equal(whole, np.asarray(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode(data), whole)


@pytest.mark.parametrize("cuts", [(0, 0, 1, 2, 3), (100, 100, 5000), tuple(range(0, 6000, 13))])
def test_png_pixels_do_not_depend_on_chunk_sizes(cuts):
    data = png_of(filtered_rows(40, 50), 50, cuts)
    assert by_libspng(data) is not None
    assert same(decode(data), by_pillow(data))


EXIF = Image.Exif()
EXIF[0x0112] = 6
XMP = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'
ROTATED = {
    "exif": {"before": [(b"eXIf", EXIF.tobytes()[6:])]},
    "exif after the pixels": {"after": [(b"eXIf", EXIF.tobytes()[6:])]},
    "xmp": {"before": [(b"iTXt", XMP)]},
    "xmp after the pixels": {"after": [(b"iTXt", XMP)]},
}


@pytest.mark.parametrize("name", ROTATED)
def test_turns_a_png_upright(name):
    data = png_of(filtered_rows(40, 50), 50, **ROTATED[name])
    assert decode(data).shape == (50, 40, 3)
    assert same(decode(data), by_pillow(data))


def test_a_transparent_color_of_an_rgb_png_becomes_white():
    rows = np.zeros((4, 1 + 3 * 5), np.uint8)
    rows[1:, 4:] = 7
    data = png_of(rows, 5, before=[(b"tRNS", bytes([0, 7, 0, 7, 0, 7]))])
    assert decode(data)[2, 3].tolist() == [255] * 3
    assert decode(data)[0, 0].tolist() == [0] * 3


def test_a_faulty_png_gives_pillows_pixels_or_error():
    rows = filtered_rows(60, 70)
    surplus = np.concatenate([rows, rows])
    tall = bytearray(png_of(surplus, 70))
    tall[20:24] = struct.pack(">I", 60)
    wrong = rows.copy()
    wrong[30, 0] = 5
    data = png_of(rows, 70)
    last = len(data) - 12 - 4  # the stream's checksum ends here
    faulty = {
        "surplus rows": bytes(tall),
        "an unknown filter": png_of(wrong, 70),
        "rows missing": png_of(rows[:-1], 70)[:20] + struct.pack(">I", 60) + png_of(rows[:-1], 70)[24:],
        "cut short": data[: len(data) // 2],
        "no end": data[:-12],
        "wrong checksum": data[: last - 1] + bytes([data[last - 1] ^ 1]) + data[last:],
        "something after the end": data + b"more",
        "something after the stream": png_of(rows, 70, after=[(b"IDAT", b"more")]),
        "a chunk between the pixels": png_of(rows, 70, after=[(b"tEXt", b"a\0b"), (b"IDAT", b"more")]),
        "a size beyond the file": data[:33] + b"\xff" + data[34:],
        "thousands of chunks": png_of(rows, 70, before=[(b"tIME", bytes(7))] * 20000),
    }
    for name, bad in faulty.items():
        assert same_but_for_the_last_row(pixels_or_error(bad), by_pillow(bad)), name
        harmless = ("something after the end", "something after the stream", "wrong checksum")
        assert (by_libspng(bad) is not None) == (name in harmless), name


TEXT = b"tEXt"
FRAME = struct.pack(">IIIIIHHBB", 0, 20, 10, 0, 0, 1, 1, 0, 0)
CHUNKS = {
    "a frame's box": [(b"fcTL", FRAME)],
    "an animation's frame": [(b"acTL", struct.pack(">II", 1, 0)), (b"fcTL", FRAME)],
    "a frame's pixels": [(b"fcTL", FRAME), (b"fdAT", bytes(8))],
    "another header": [(b"IHDR", struct.pack(">IIBBBBB", 50, 40, 8, 2, 0, 0, 1))],
    "the end": [(b"IEND", b"")],
    "text that Pillow takes for interlace": [(TEXT, b"interlace\x001")],
    "text that Pillow takes for a box": [(TEXT, b"bbox\x001")],
    "text that Pillow takes for transparency": [(TEXT, b"transparency\x001")],
}


@pytest.mark.parametrize("name", CHUNKS)
def test_leaves_pngs_whose_chunks_change_pixels_to_pillow(name):
    data = png_of(filtered_rows(40, 50), 50, before=CHUNKS[name])
    assert by_libspng(data) is None
    assert same(pixels_or_error(data), by_pillow(data))


def test_chunks_that_change_no_pixel_are_allowed():
    srgb, gamma, density = (b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 45455)), (b"pHYs", bytes(9))
    data = png_of(filtered_rows(40, 50), 50, before=[srgb, gamma, density])
    assert same(by_libspng(data), by_pillow(data))


def test_mutated_pngs_give_pillows_pixels_or_error():
    rng = random.Random(0)
    taken = 0
    for number in range(600):
        rows = filtered_rows(30, 40, number)
        if number % 2:
            rows[rng.randrange(30), 0] = rng.randrange(10)
        data = bytearray(png_of(rows, 40, (50, 700)))
        if number % 3:
            data[rng.randrange(8, len(data))] = rng.randrange(256)
        assert same_but_for_the_last_row(pixels_or_error(bytes(data)), by_pillow(bytes(data)))
        taken += by_libspng(bytes(data)) is not None
    assert 300 < taken < 550


@pytest.mark.parametrize("name", ["mpo.jpg", "webp", "stray_bytes.jpg"])
def test_a_photo_with_a_damaged_exif_tag_is_turned_upright(name):
    data = (INPUTS / f"turned_bad_rational{'_' if 'stray' in name else '.'}{name}").read_bytes()
    photo = decode_photo(data, **LIMITS)
    assert photo.rgb.shape == (320, 240, 3)
    assert photo.focal_px == pytest.approx(240.37)


def exif_block(order, *entries, values=b""):
    """EXIF with these entries before the orientation 6: (tag, type, count, four bytes)."""
    made = [*entries, (0x0112, 3, 1, struct.pack(f"{order}HH", 6, 0))]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", 8)
    rows = b"".join(
        struct.pack(f"{order}HHL", *row) + last for row, last in ((e[:3], e[3]) for e in made)
    )
    return head + struct.pack(f"{order}H", len(made)) + rows + bytes(4) + values


def damaged_exif(order):
    far, near = struct.pack(f"{order}L", 90000), struct.pack(f"{order}L", 8)
    return {
        "a text beyond the end": exif_block(order, (0x010F, 2, 5000, far)),
        "a fraction beyond the end": exif_block(order, (0x011A, 5, 1, far)),
        "a fraction over zero": exif_block(
            order, (0x011A, 5, 1, struct.pack(f"{order}L", 38)), values=bytes(8)
        ),
        "a text for a number": exif_block(order, (0x011A, 2, 4, b"7200"), (0x8769, 2, 4, b"abcd")),
        "an unknown type": exif_block(order, (0x010F, 99, 1, bytes(4)), (0x9003, 0, 0, bytes(4))),
        "a directory in itself": exif_block(order, (0x8769, 4, 1, near), (0x8825, 4, 1, near)),
        "a directory beyond the end": exif_block(order, (0x8769, 4, 1, far), (0x8825, 4, 1, far)),
        "a huge count": exif_block(order, (0x927C, 7, 2**32 - 1, near), (0x0132, 2, 2**31, near)),
        "a maker's note": exif_block(
            order, (0x927C, 7, 20, struct.pack(f"{order}L", 38)), values=b"FUJIFILM\xff\xff\xff\xff" * 2
        ),
        "an unknown unit": exif_block(order, (0x0128, 3, 1, b"\xff\xff\xff\xff")),
        "nothing after the orientation": exif_block(order)[:22],
    }


@pytest.mark.parametrize("fmt", ["JPEG", "MPO", "PNG", "WEBP"])
@pytest.mark.parametrize("order", "<>")
def test_only_the_orientation_of_exif_has_to_be_sound(order, fmt):
    frames = {"save_all": True, "append_images": [Image.fromarray(GRADIENT)]} if fmt == "MPO" else {}
    for name, exif in damaged_exif(order).items():
        photo = Image.fromarray(GRADIENT)
        data = encode(photo, fmt, exif=b"Exif\0\0" + exif, **frames)
        assert decode(data).shape == (30, 20, 3), name


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("order", "<>")
def test_damaged_tags_of_a_tiff_leave_its_pixels_readable(order, dtype):
    values = GRADIENT.astype(dtype) * (np.iinfo(dtype).max // 255)
    far = struct.pack(f"{order}L", 90000)
    damaged = [
        (270, 2, 5000, far),  # a text beyond the end, before the tags of the pixels
        (282, 2, 4, b"7200"),
        (283, 5, 1, far),
        (296, 3, 1, struct.pack(f"{order}HH", 3, 0)),
        (306, 2, 2**32 - 1, far),
        (34665, 4, 1, far),
        (34853, 2, 4, b"abcd"),
    ]
    sound = tiff_file(values, order, t274=6, **{f"t{each[0]}": 1 for each in damaged})
    data = bytearray(sound)
    for tag, kind, count, value in damaged:
        at = data.index(struct.pack(f"{order}HHLL", tag, 4, 1, 1))
        data[at : at + 12] = struct.pack(f"{order}HHL", tag, kind, count) + value
    assert np.array_equal(decode(bytes(data)), np.rot90(GRADIENT, -1))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_damaged_exif_of_an_avif_leaves_its_own_rotation():
    exif = Image.Exif()
    exif[0x0112] = 6  # Pillow writes it as the container's rotation
    exif[0x011A] = 72.0
    exif[0x010F] = "A maker"
    data = encode(Image.fromarray(GRADIENT), "AVIF", exif=exif, speed=10)
    at = data.index(b"MM\0*")
    for damaged in (
        data[: at + 14] + b"\xff" * 8 + data[at + 22 :],
        data.replace(b"\0\0\0\x48\0\0\0\1", bytes(8)),
    ):
        assert damaged != data
        assert decode(damaged).shape == (30, 20, 3)


def test_random_damage_to_exif_never_costs_the_photo():
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x011A] = "A maker", 6, 72.0
    exif[0x8769] = {0x920A: 4.2, 0xA405: 26, 0x9003: "2020"}
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    whole = exif.tobytes()
    for number in range(200):
        block = bytearray(whole)
        for _ in range(rng.randrange(1, 8)):
            block[rng.randrange(14, len(block))] = rng.randrange(256)
        for fmt in ("JPEG", "PNG", "WEBP"):
            data = encode(Image.fromarray(GRADIENT), fmt, exif=bytes(block))
            assert decode(data).shape in ((30, 20, 3), (20, 30, 3)), number


def test_decoding_leaves_global_state_alone(monkeypatch):
    """Requests are decoded by several threads at once."""
    files = [encode(Image.fromarray(GRADIENT), fmt) for fmt in ("JPEG", "PNG", "WEBP", "TIFF", "GIF")]
    changes = []
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 17)
        patch.setattr(warnings, "catch_warnings", lambda **_: changes.append("warnings"))
        for data in files:
            assert decode(data).shape == GRADIENT.shape
        assert Image.MAX_IMAGE_PIXELS == 17
    assert changes == []


def test_decodes_heic_turned_upright_with_its_focal_length():
    pytest.importorskip("pi_heif")
    photo = decode_photo((INPUTS / "turned.heic").read_bytes(), **LIMITS)
    assert photo.rgb.shape == (320, 240, 3)
    assert photo.focal_px == pytest.approx(240.37)
    original = decode_photo((INPUTS / "turned_bad_rational.webp").read_bytes(), **LIMITS).rgb
    assert np.abs(photo.rgb.astype(int) - original).mean() < 6
    with pytest.raises(ImageTooLargeError, match=r"(320 x 240|240 x 320) pixels; .*MAX_IMAGE_PIXELS"):
        decode((INPUTS / "turned.heic").read_bytes(), max_pixels=76799)
    with pytest.raises(ImageError, match="cut short"):
        decode((INPUTS / "turned.heic").read_bytes()[:9000])


def test_heic_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    monkeypatch.setattr("da3_runtime.util.extras.is_installed", lambda module: False)
    with pytest.raises(ImageFormatError, match=r"The image is HEIC, and .*da3-runtime\[heif\]"):
        decode((INPUTS / "turned.heic").read_bytes())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_applies_exif_rotation(orientation):
    stored = Image.fromarray(GRADIENT)
    exif = Image.Exif()
    exif[0x0112] = orientation
    rgb = decode(encode(stored, "PNG", exif=exif))
    expected = {
        1: GRADIENT,
        2: GRADIENT[:, ::-1],
        3: GRADIENT[::-1, ::-1],
        4: GRADIENT[::-1],
        5: GRADIENT.transpose(1, 0, 2),
        6: GRADIENT[::-1].transpose(1, 0, 2),
        7: GRADIENT[::-1, ::-1].transpose(1, 0, 2),
        8: GRADIENT[:, ::-1].transpose(1, 0, 2),
    }[orientation]
    assert np.array_equal(rgb, expected)


def test_transparency_becomes_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (10, 20, 30, 255)
    rgb = decode(encode(Image.fromarray(rgba), "PNG"))
    assert rgb[0, 0].tolist() == [10, 20, 30]
    assert rgb[3, 3].tolist() == [255, 255, 255]


def test_a_transparent_palette_color_becomes_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([200, 0, 0, 0, 200, 0] + [0] * 762)
    image.putpixel((0, 0), 1)
    rgb = decode(encode(image, "PNG", transparency=0))
    assert rgb[0, 0].tolist() == [0, 200, 0]
    assert rgb[1, 1].tolist() == [255, 255, 255]


def test_scales_sixteen_bit_samples_to_eight():
    wide = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    rgb = decode(encode(Image.fromarray(wide), "PNG"))
    assert np.array_equal(rgb[:, :, 0], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    fmt = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    rgb = decode(encode(Image.fromarray(GRADIENT).convert(mode), fmt))
    assert rgb.shape == GRADIENT.shape


def test_too_many_bytes_names_the_limit():
    with pytest.raises(ImageTooLargeError, match="MAX_IMAGE_BYTES"):
        decode(b"x" * 11, max_bytes=10)


def test_refuses_too_many_pixels_from_the_header_alone():
    # A valid header of a huge PNG without a single pixel behind it.
    header = encode(Image.new("L", (1, 1)), "PNG")
    huge = header[:16] + (60000).to_bytes(4, "big") * 2 + header[24:29]
    import zlib

    huge += zlib.crc32(huge[12:29]).to_bytes(4, "big") + header[33:]
    with pytest.raises(ImageTooLargeError, match="MAX_IMAGE_PIXELS"):
        decode(huge)


def test_refuses_a_huge_image_inside_an_icon_before_decoding_it():
    inner = encode(Image.new("L", (6000, 6000)), "PNG")
    entry = bytes([0, 0, 0, 0]) + (1).to_bytes(2, "little") + (8).to_bytes(2, "little")
    entry += len(inner).to_bytes(4, "little") + (22).to_bytes(4, "little")
    icon = b"\0\0\1\0\1\0" + entry + inner
    tracemalloc.start()
    with pytest.raises(ImageTooLargeError, match="MAX_IMAGE_PIXELS"):
        decode(icon)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_decodes_up_to_the_pixel_limit():
    data = encode(Image.new("RGB", (50, 40)), "PNG")
    assert decode(data, max_pixels=2000).shape == (40, 50, 3)
    with pytest.raises(ImageTooLargeError):
        decode(data, max_pixels=1999)


@pytest.mark.parametrize(
    ("data", "status"),
    [(b"", 422), (b"not an image", 415), (b"\xff\xd8\xff\xe0 cut", 422), (b"GIF89a", 415)],
)
def test_bytes_that_are_no_image_give_one_sentence(data, status):
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert str(caught.value).startswith("The ")
    assert caught.value.status == status


@pytest.mark.parametrize("fmt", ["PPM", "TGA", "PCX", "DDS"])
def test_refuses_formats_that_are_not_listed(fmt):
    Image.init()  # every decoder Pillow has is known now
    with pytest.raises(ImageFormatError, match="JPEG, PNG, WEBP, BMP, TIFF, GIF, ICO, AVIF"):
        decode(encode(Image.fromarray(GRADIENT), fmt))


def test_decodes_the_first_jpeg_of_a_multi_picture_file():
    pictures = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    data = encode(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    assert decode(data)[0, 0].tolist() == [254, 0, 0]


def test_decodes_the_largest_image_of_an_icon():
    icon = Image.fromarray(np.full((64, 64, 3), 77, np.uint8))
    rgb = decode(encode(icon, "ICO", sizes=[(16, 16), (64, 64)]))
    assert rgb.shape == (64, 64, 3)
    assert (rgb == 77).all()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_decodes_avif():
    rgb = decode(encode(Image.open(PHOTOS / "coffee.jpg"), "AVIF", quality=95))
    assert np.abs(rgb.astype(int) - np.asarray(Image.open(PHOTOS / "coffee.jpg"))).mean() < 3


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_a_truncated_image_gives_one_sentence(fmt):
    data = encode(Image.open(PHOTOS / "coffee.jpg"), fmt)
    with pytest.raises(ImageError, match=r"cut short|not an image"):
        decode(data[: len(data) // 3])


def test_a_plain_png_is_decoded_once(monkeypatch):
    """Pillow's getexif decodes a whole PNG, because EXIF may come after the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    opened = type(Image.open(stream))
    monkeypatch.setattr(opened, "load", lambda self: pytest.fail("Pillow decoded the pixels too"))
    photo = decode_photo(stream.getvalue(), max_bytes=10**6, max_pixels=10**6)
    assert np.array_equal(photo.rgb, pixels)
