"""Image bytes -> RGB array, and the focal length that the file's EXIF states."""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
import pyspng
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.IcoImagePlugin import IcoImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from da3_runtime.errors import ImageError, ImageFormatError, ImageTooLargeError
from da3_runtime.image.exif import ORIENTATION, exif_focal_px, exif_numbers
from da3_runtime.image.heif import is_heif, open_heif
from da3_runtime.image.samples import Samples, rgb_of_samples
from da3_runtime.image.tiff import PlainTiff, layout_of, read_wide, trimmed, unsupported

# No other decoder ever gets a file. JpegImageFile reads the first picture of a multi-picture file.
_PLUGINS: tuple[type[ImageFile], ...] = (
    JpegImageFile,
    PngImageFile,
    WebPImageFile,
    BmpImageFile,
    PlainTiff,
    GifImageFile,
    IcoImageFile,
    AvifImageFile,
)
FORMATS = tuple(str(plugin.format) for plugin in _PLUGINS)

_DAMAGED = "The image is damaged or cut short and cannot be decoded: send the whole file."
# Deflate expands one byte to at most 1032, and a pixel takes at least one bit. Pillow accepts a PNG
# whose pixels end early.
_PNG_PIXELS_PER_BYTE = 1032 * 8
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Kinds of all chunks of a PNG whose pixels no chunk changes: before the pixels only color spaces,
# physical size, background and time; after them nothing.
_PLAIN_CHUNKS = re.compile(rb"IHDR(?:bKGD|cHRM|cICP|gAMA|iCCP|pHYs|sBIT|sRGB|tIME)*(?:IDAT)+IEND")
_MAX_CHUNKS = 2**14  # a photo has fewer; more are not worth the memory of a list
_XMP_ORIENTATION = re.compile(r'tiff:Orientation(?:="|>)([1-8])')
# The entry of EXIF in the item list of an AVIF.
_AVIF_EXIF_ITEM = re.compile(rb"(infe.{8})Exif", re.DOTALL)

# Modes of Pillow with samples wider than 8 bits. Its own conversion would clip them.
_WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


class Photo(NamedTuple):
    """A decoded image.

    Attributes
    ----------
    rgb : NDArray[np.uint8]
        [H, W, 3].
    focal_px : float | None
        Focal length in pixels of ``rgb``, from EXIF; None if EXIF does not state it.
    warnings : tuple[str, ...]
        Sentences about what had to be assumed.
    """

    rgb: NDArray[np.uint8]
    focal_px: float | None
    warnings: tuple[str, ...] = ()


def decode_photo(data: bytes, *, max_bytes: int, max_pixels: int) -> Photo:
    """Decode an image as a viewer shows it.

    EXIF rotation is applied, transparency becomes white, samples of more than 8 bits are scaled by
    :func:`rgb_of_samples`, and an animation gives its first frame. Other pixels equal Pillow's. Limits
    are checked in order of cost: bytes, then the header's width and height, then pixels.

    Parameters
    ----------
    data : bytes
        An image in one of :data:`FORMATS`, or HEIC if the extra ``heif`` is installed.
    max_bytes, max_pixels : int
        Largest encoded size in bytes and largest width times height.

    Raises
    ------
    ImageTooLargeError
        If the image exceeds a limit; the message names the limit.
    ImageFormatError
        If the bytes are in none of the formats.
    ImageError
        If they are empty or damaged.
    """
    if not data:
        raise ImageError("The image is empty (0 bytes): send the whole file.")
    if len(data) > max_bytes:
        raise ImageTooLargeError(
            f"The image has {len(data)} bytes; the limit is {max_bytes} (MAX_IMAGE_BYTES)."
        )
    with _damage_as_image_error():
        return _decode(data, max_pixels)


@contextlib.contextmanager
def _damage_as_image_error() -> Iterator[None]:
    """Raise ImageError for whatever the body raises: decoders raise nearly anything on damaged files."""
    try:
        yield
    except ImageError:
        raise
    except Exception:
        raise ImageError(_DAMAGED) from None


def _decode(data: bytes, max_pixels: int) -> Photo:
    if is_heif(data):
        picture = open_heif(data)
        width, height = picture.size
        _check_pixels(width, height, max_pixels)
        rgb, warnings = _rgb_of(picture.to_pillow())
        return _upright(rgb, 1, exif_numbers(picture.info.get("exif") or b""), warnings)
    pixels = trimmed(data)
    layout = layout_of(pixels)
    if layout is not None:
        _check_pixels(layout.width, layout.height, max_pixels)
        samples = read_wide(pixels, layout) if layout.is_wide else None
        if samples is not None:
            rgb, warnings = rgb_of_samples(samples)
            orientation = layout.tags.get(ORIENTATION, 1)
            return _upright(rgb, orientation, exif_numbers(data), warnings)
    try:
        image = _open(pixels, max_pixels)
    except ImageFormatError:
        raise unsupported(layout) if layout is not None else _unknown_format() from None
    with image:
        _check_pixels(*image.size, max_pixels)
        _check_png(image, len(data))
        plain = _decode_png(image, data)
        if plain is not None:
            # No chunk has EXIF or XMP. To ask Pillow for them would decode all pixels again.
            return _upright(plain, 1, {}, [])
        plain = _decode_jpeg(image, data)
        rgb, warnings = _wide_samples(image, data) if plain is None else (plain, [])
        exif = data if layout is not None else image.info.get("exif", b"")
        tags = exif_numbers(exif)
        return _upright(rgb, _orientation(image, tags), tags, warnings)


def photo_of_image(image: Image.Image, max_pixels: int) -> Photo:
    """A Pillow image the way a person sees it, as :func:`decode_photo` sees an encoded one.

    Raises
    ------
    ImageTooLargeError
        If it has more than ``max_pixels`` pixels.
    ImageError
        If its file is damaged.
    """
    _check_pixels(*image.size, max_pixels)
    with _damage_as_image_error():
        rgb, warnings = _rgb_of(image)
        tags = exif_numbers(image.info.get("exif", b""))
        return _upright(rgb, _orientation(image, tags), tags, warnings)


def photo_of_array(rgb: NDArray[np.uint8], max_pixels: int) -> Photo:
    """An upright RGB array, uint8 [H, W, 3], as a photo; its focal length is not known.

    Raises
    ------
    ImageTooLargeError
        If it has more than ``max_pixels`` pixels.
    ImageError
        If it has another dtype or shape.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or not rgb.size:
        raise ImageError(
            f"The array is {rgb.dtype} {list(rgb.shape)}; give RGB as uint8 [height, width, 3]."
        )
    _check_pixels(rgb.shape[1], rgb.shape[0], max_pixels)
    return Photo(np.ascontiguousarray(rgb), None)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The image with its header read; unlike ``Image.open``, without Pillow's global pixel limit."""
    for plugin in _PLUGINS:
        accept = Image.OPEN[str(plugin.format)][1]
        # A text says that this build of Pillow lacks the format.
        if accept is None or accept(data[:16]) is not True:
            continue
        if plugin is IcoImageFile:
            for size in _icon_sizes(data):
                _check_pixels(*size, max_pixels)
        try:
            return _opened(plugin, data)
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue
    raise _unknown_format()


def _opened(plugin: type[ImageFile], data: bytes) -> ImageFile:
    try:
        return plugin(io.BytesIO(data))
    except Exception:
        if plugin is not AvifImageFile:
            raise
        # This plugin alone rewrites EXIF, which fails on damaged tags.
        return plugin(io.BytesIO(_AVIF_EXIF_ITEM.sub(rb"\1free", data)))


def _unknown_format() -> ImageFormatError:
    names = ", ".join(FORMATS)
    return ImageFormatError(
        f"The image is in none of the formats that can be read: send one of {names}."
    )


def _icon_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Width and height of every image in an icon; Pillow decodes one while it opens the file."""
    for entry in range(6, 6 + 16 * int.from_bytes(data[4:6], "little"), 16):
        start = int.from_bytes(data[entry + 12 : entry + 16], "little")
        if data[start : start + 8] == _PNG_SIGNATURE:
            yield struct.unpack_from(">II", data, start + 16)
        else:
            width, height = struct.unpack_from("<ii", data, start + 4)
            yield abs(width), abs(height) // 2


def _orientation(image: Image.Image, tags: dict[int, float]) -> int:
    """EXIF's orientation, else that of XMP or of Pillow's other sources; 1 if there is none."""
    # The rotation of an AVIF is its container's; Pillow returns it as EXIF.
    if image.format != "AVIF":
        found = tags.get(ORIENTATION)
        if found is not None:
            return int(found)
        xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or ""
        match = _XMP_ORIENTATION.search(xmp.decode("latin-1") if isinstance(xmp, bytes) else xmp)
        if match:
            return int(match[1])
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        # Unreadable EXIF turns nothing.
        return 1


def _upright(
    stored: NDArray[np.uint8], orientation: int, tags: dict[int, float], warnings: list[str]
) -> Photo:
    """Pixels as stored, turned upright, with the focal length of their EXIF."""
    height, width = stored.shape[:2]
    rgb = np.ascontiguousarray(_turned(stored, orientation), dtype=np.uint8)
    return Photo(rgb, exif_focal_px(tags, width, height), tuple(warnings))


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"The image is {width} x {height} pixels; the limit is {max_pixels} pixels: send a smaller "
            "image, or raise MAX_IMAGE_PIXELS."
        )


def _check_png(image: Image.Image, size: int) -> None:
    """Refuse a PNG whose header claims more pixels than ``size`` bytes can hold."""
    if image.format == "PNG" and math.prod(image.size) > _PNG_PIXELS_PER_BYTE * size:
        raise ImageError(_DAMAGED)


def _decode_png(image: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    """The pixels of a plain RGB PNG, [H, W, 3], in half of Pillow's time; None leaves it to Pillow.

    Pillow has opened the file, so its limits on compressed chunks hold here too. Neither library refuses
    a wrong checksum of the pixels; Pillow then leaves the last row black, libspng keeps it.
    """
    if (image.format, image.mode) != ("PNG", "RGB") or not _is_plain_png(data, *image.size):
        return None
    try:
        rgb: NDArray[np.uint8] = pyspng.load(data, "RGB")
    except Exception:
        # Pillow may read it nevertheless, or says what is wrong.
        return None
    return rgb


def _is_plain_png(data: bytes, width: int, height: int) -> bool:
    """Whether a PNG is 8-bit RGB of this size, not interlaced, and no chunk changes its pixels."""
    if data[16:29] != struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0):
        return False
    kinds: list[bytes] = []
    start = 8
    while start + 8 <= len(data) and len(kinds) < _MAX_CHUNKS and kinds[-1:] != [b"IEND"]:
        size, kind = struct.unpack_from(">I4s", data, start)
        kinds.append(kind)
        start += 12 + size
    return _PLAIN_CHUNKS.fullmatch(b"".join(kinds)) is not None


def _decode_jpeg(image: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    """The stored pixels of a gray or RGB JPEG without any fault; None leaves it to Pillow.

    It takes a third of Pillow's time with the same library, because it decodes straight into an array.
    """
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data, strict=True)
        if (width, height) != image.size:
            return None
        rgb = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None
    return np.asarray(rgb, dtype=np.uint8)


def _turned(rgb: NDArray[np.uint8], orientation: int) -> cv2.typing.MatLike:
    """Pixels stored with EXIF's ``orientation``, turned upright."""
    match orientation:
        case 2:
            return cv2.flip(rgb, 1)
        case 3:
            return cv2.rotate(rgb, cv2.ROTATE_180)
        case 4:
            return cv2.flip(rgb, 0)
        case 5:
            return cv2.transpose(rgb)
        case 6:
            return cv2.rotate(rgb, cv2.ROTATE_90_CLOCKWISE)
        case 7:
            return cv2.flip(cv2.transpose(rgb), -1)
        case 8:
            return cv2.rotate(rgb, cv2.ROTATE_90_COUNTERCLOCKWISE)
    return rgb


def _wide_samples(image: Image.Image, data: bytes) -> tuple[NDArray[np.uint8], list[str]]:
    """As :func:`_rgb_of`, with all bits of a PNG of 16 bits in color, of which Pillow drops eight."""
    if image.format == "PNG":
        # EXIF may follow the pixels. Pillow raises once about a wrong checksum and then has the pixels.
        with contextlib.suppress(Exception):
            image.load()
        if data[24] == 16 and data[25] in (2, 4, 6) and "transparency" not in image.info:
            values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
            if values is not None and values.dtype == np.uint16 and values.ndim == 3:
                alpha = values[:, :, 3] if values.shape[2] == 4 else None
                return rgb_of_samples(Samples(values[:, :, 2::-1], alpha))
    return _rgb_of(image)


def _rgb_of(image: Image.Image) -> tuple[NDArray[np.uint8], list[str]]:
    """The stored pixels of a Pillow image of any mode, and warnings."""
    if image.mode not in _WIDE_MODES:
        return np.asarray(_to_rgb(image), dtype=np.uint8), []
    values = np.asarray(image)
    transparent = image.info.get("transparency")
    alpha = None
    if isinstance(transparent, int):
        alpha = np.where(values == transparent, 0, np.iinfo(values.dtype).max).astype(values.dtype)
    white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0
    return rgb_of_samples(Samples(values, alpha, white_is_zero=white_is_zero))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Pillow modes of 8 bits a sample to RGB."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
