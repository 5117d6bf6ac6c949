"""Image bytes -> RGB array."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.errors import ImageError, ImageTooLargeError

# Modes whose samples are wider than 8 bits, and the largest value each is scaled from. Pillow's own
# conversion to RGB clips them instead.
WIDE_MODES = ("I;16", "I;16L", "I;16B", "I", "F")


def decode_rgb(data: bytes, *, max_bytes: int, max_pixels: int) -> NDArray[np.uint8]:
    """Decode an image the way a person sees it.

    EXIF rotation is applied, transparency is laid over white, 16-bit samples are scaled to 8, and of an
    animation the first frame is taken. Limits are checked in order of cost: bytes, then the header's
    width and height, then pixels.

    Parameters
    ----------
    data : bytes
        An encoded image of any format Pillow reads.
    max_bytes, max_pixels : int
        Largest encoded size and largest width x height.

    Returns
    -------
    NDArray[np.uint8]
        RGB, [H, W, 3].

    Raises
    ------
    ImageTooLargeError
        Naming the limit that the image is over.
    ImageError
        If the bytes are empty, damaged or not an image.
    """
    if not data:
        raise ImageError("The image is empty (0 bytes).")
    if len(data) > max_bytes:
        raise ImageTooLargeError(
            f"The image has {len(data)} bytes; the limit is {max_bytes} (MAX_IMAGE_BYTES)."
        )
    try:
        with warnings.catch_warnings():
            # Pillow's own pixel limit warns or raises by an unrelated constant; ours follows below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        with image:
            _check_pixels(*image.size, max_pixels)
            rgb = _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        text = f"The image has more than {max_pixels} pixels (MAX_IMAGE_PIXELS)."
        raise ImageTooLargeError(text) from None
    except UnidentifiedImageError:
        raise ImageError("The data is not an image in a format this service reads.") from None
    except ImageError:
        raise
    except Exception:
        # Pillow's decoders raise nearly anything on truncated or damaged files.
        raise ImageError("The image is damaged or cut short and cannot be decoded.") from None
    return np.ascontiguousarray(np.asarray(rgb, dtype=np.uint8))


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"The image is {width} x {height} pixels; the limit is {max_pixels} pixels "
            "(MAX_IMAGE_PIXELS)."
        )


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
