"""Image bytes -> RGB array, and the focal length that the file tells."""

from __future__ import annotations

import io
import math
import warnings
from typing import NamedTuple

import cv2
import numpy as np
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
from da3_runtime.output.png import decode_png

# A plugin's import makes its format known to Pillow; no other decoder is ever given a file.
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

_ORIENTATION = 0x0112  # EXIF's tag for how the pixels lie
_DAMAGED = "The image is damaged or cut short and cannot be decoded."
# Deflate makes 1032 bytes of one at most (its format's limit), and a pixel is a bit at least. Pillow
# takes a PNG whose pixels end early for whole.
_PNG_PIXELS_PER_BYTE = 1032 * 8

# Modes whose samples are wider than 8 bits, and the largest value each is scaled from. Pillow's own
# conversion to RGB clips them instead.
WIDE_MODES = ("I;16", "I;16L", "I;16B", "I", "F")


class Photo(NamedTuple):
    """A decoded image.

    Attributes
    ----------
    rgb : NDArray[np.uint8]
        [H, W, 3].
    focal_px : float | None
        Focal length in its pixels, where its EXIF tells.
    """

    rgb: NDArray[np.uint8]
    focal_px: float | None


def decode_photo(data: bytes, *, max_bytes: int, max_pixels: int) -> Photo:
    """Decode an image the way a person sees it.

    EXIF rotation is applied, transparency is laid over white, 16-bit samples are scaled to 8, and of an
    animation the first frame is taken; apart from that pixels are as Pillow decodes them. Limits are
    checked in order of cost: bytes, then the header's width and height, then pixels.

    Parameters
    ----------
    data : bytes
        An image encoded in one of :data:`FORMATS`.
    max_bytes, max_pixels : int
        Largest encoded size and largest width x height.

    Raises
    ------
    ImageTooLargeError
        Naming the limit that the image is over.
    ImageFormatError
        If the bytes are of none of the formats.
    ImageError
        If they are empty or damaged.
    """
    if not data:
        raise ImageError("The image is empty (0 bytes).")
    if len(data) > max_bytes:
        raise ImageTooLargeError(
            f"The image has {len(data)} bytes; the limit is {max_bytes} (MAX_IMAGE_BYTES)."
        )
    # Pillow's own limit, for pictures inside of others: it refuses more than twice this.
    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2
    try:
        with warnings.catch_warnings():
            # Pillow warns of EXIF it cannot read, and of a pixel limit of its own; ours follows below.
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
        raise ImageFormatError(f"The image is of none of the formats read here: {names}.") from None
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
        # EXIF that cannot be read says nothing; the pixels may be whole.
        return None


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"The image is {width} x {height} pixels; the limit is {max_pixels} pixels "
            "(MAX_IMAGE_PIXELS)."
        )


def _check_png(image: Image.Image, size: int) -> None:
    """Refuse a PNG that says it has more pixels than so few bytes can hold."""
    if image.format == "PNG" and math.prod(image.size) > _PNG_PIXELS_PER_BYTE * size:
        raise ImageError(_DAMAGED)


def _decode_png(image: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    """The pixels of a whole RGB PNG with no EXIF and nothing else that could change them.

    In a third of Pillow's time. All others, and what has the slightest fault, are left to Pillow.
    """
    return decode_png(data, *image.size) if (image.format, image.mode) == ("PNG", "RGB") else None


def _decode_jpeg(image: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    """The pixels of a JPEG that is whole and has no more than three channels, as a person sees them.

    Straight into an array, which takes a third of Pillow's time with the same library. What has the
    slightest fault is left to Pillow.
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
    """Pixels that lie as EXIF's ``orientation`` says, upright."""
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
