"""Image bytes -> RGB array, and the focal length that the file's EXIF states."""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
from typing import NamedTuple

import cv2
import numpy as np
import pyspng
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.IcoImagePlugin import IcoImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from da3_runtime.errors import ImageError, ImageFormatError, ImageTooLargeError
from da3_runtime.image.exif import exif_focal_px

# Importing a plugin registers its format with Pillow. No other decoder ever gets a file.
_PLUGINS = (
    JpegImageFile,
    PngImageFile,
    WebPImageFile,
    BmpImageFile,
    TiffImageFile,
    GifImageFile,
    IcoImageFile,
    AvifImageFile,
)
FORMATS = tuple(plugin.format for plugin in _PLUGINS)

_ORIENTATION = 0x0112  # EXIF's tag for rotation and mirroring
_DAMAGED = "The image is damaged or cut short and cannot be decoded: send the whole file."
# Deflate expands one byte to at most 1032, and a pixel takes at least one bit. Pillow accepts a PNG
# whose pixels end early.
_PNG_PIXELS_PER_BYTE = 1032 * 8
# Kinds of all chunks of a PNG whose pixels no chunk changes: before the pixels only color spaces,
# physical size, background and time; after them nothing.
_PLAIN_CHUNKS = re.compile(rb"IHDR(?:bKGD|cHRM|cICP|gAMA|iCCP|pHYs|sBIT|sRGB|tIME)*(?:IDAT)+IEND")
_MAX_CHUNKS = 2**14  # a photo has fewer; more are not worth the memory of a list

# Modes with samples wider than 8 bits. They are scaled to 8; Pillow's own conversion would clip them.
WIDE_MODES = ("I;16", "I;16L", "I;16B", "I", "F")


class Photo(NamedTuple):
    """A decoded image.

    Attributes
    ----------
    rgb : NDArray[np.uint8]
        [H, W, 3].
    focal_px : float | None
        Focal length in pixels of ``rgb``, from EXIF; None if EXIF does not state it.
    """

    rgb: NDArray[np.uint8]
    focal_px: float | None


def decode_photo(data: bytes, *, max_bytes: int, max_pixels: int) -> Photo:
    """Decode an image as a viewer shows it.

    EXIF rotation is applied, transparency becomes white, samples of 16 bits are scaled to 8, and an
    animation gives its first frame. Apart from that, pixels equal Pillow's. Limits are checked in order
    of cost: bytes, then the header's width and height, then pixels.

    Parameters
    ----------
    data : bytes
        An image in one of :data:`FORMATS`.
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
    # Pillow's own limit also covers images inside an image. It refuses more than twice this number.
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2
    try:
        with warnings.catch_warnings():
            # Pillow warns about unreadable EXIF and about its own pixel limit; ours follows below.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_pixels(*image.size, max_pixels)
                _check_png(image, len(data))
                rgb, focal = _decode_png(image, data), None
                if rgb is None:
                    focal = _focal_px(image)
                    rgb = _decode_jpeg(image, data)
                if rgb is None:
                    rgb = np.asarray(_to_rgb(ImageOps.exif_transpose(image)), dtype=np.uint8)
    except Image.DecompressionBombError:
        text = f"The image has more than {max_pixels} pixels (MAX_IMAGE_PIXELS)."
        raise ImageTooLargeError(text) from None
    except UnidentifiedImageError:
        names = ", ".join(FORMATS)
        raise ImageFormatError(
            f"The image is in none of the formats that can be read: send one of {names}."
        ) from None
    except ImageError:
        raise
    except Exception:
        # Pillow's decoders raise nearly anything on truncated or damaged files.
        raise ImageError(_DAMAGED) from None
    return Photo(np.ascontiguousarray(rgb), focal)


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
    try:
        rgb = np.asarray(_to_rgb(ImageOps.exif_transpose(image)), dtype=np.uint8)
        return Photo(np.ascontiguousarray(rgb), _focal_px(image))
    except Exception:
        # Pillow's decoders raise nearly anything on truncated or damaged files.
        raise ImageError(_DAMAGED) from None


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


def _focal_px(image: Image.Image) -> float | None:
    try:
        return exif_focal_px(image.getexif(), *image.size)
    except Exception:
        # Unreadable EXIF costs the focal length only; the pixels may be intact.
        return None


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"The image is {width} x {height} pixels; the limit is {max_pixels} pixels "
            "(MAX_IMAGE_PIXELS)."
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
    """The upright pixels of a gray or RGB JPEG without any fault; None leaves it to Pillow.

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
    return np.asarray(_turned(rgb, image.getexif().get(_ORIENTATION, 1)), dtype=np.uint8)


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


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB."""
    if image.mode in WIDE_MODES:
        samples = np.asarray(image).astype(np.float64)
        top = 65535.0 if samples.max(initial=0.0) > 255 else 255.0
        eight = np.clip(np.rint(samples * (255.0 / top)), 0, 255).astype(np.uint8)
        return Image.fromarray(eight).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
