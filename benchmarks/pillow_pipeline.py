"""The reference service's steps around the model, as it documents them.

The baseline of :mod:`benchmarks.serving`; tests compare previews with it. It shares no code with
``da3_runtime``.
"""

from __future__ import annotations

import base64
import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CLIP = (0.5, 99.5)
CLIP_LIMIT = 0.01
BINS = 256


def decode(image_base64: str) -> NDArray[np.uint8]:
    """The RGB pixels [H, W, 3] of an image in Base64."""
    with warnings.catch_warnings():
        # Importing da3_runtime may have lowered Pillow's own limit.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(base64.b64decode(image_base64)))
    return np.array(image.convert("RGB"))


def preview(depth: NDArray[np.float32], width: int, height: int) -> NDArray[np.uint8]:
    """Gray preview [height, width] of a depth map of the model's size: equalized inverse depth."""
    resized = np.array(Image.fromarray(depth).resize((width, height), Image.Resampling.BICUBIC))
    # The cubic overshoots; the service clips it to the range of the network's depth.
    inverse = 1.0 / (np.clip(resized, depth.min(), depth.max()) + 1e-6)
    low, high = np.percentile(inverse, CLIP[0]), np.percentile(inverse, CLIP[1])
    share = np.clip((inverse - low) / (high - low + 1e-8), 0, 1)
    levels = (share * 255).astype(np.uint8)
    counts, _ = np.histogram(levels.flatten(), BINS, (0, BINS))
    limit = CLIP_LIMIT * levels.size / BINS
    clipped = np.minimum(counts, limit) + np.maximum(counts - limit, 0).sum() / BINS
    running = clipped.cumsum()
    first = running[running > 0][0]
    table = np.clip((running - first) / (running[-1] - first + 1e-8), 0, 1)
    return np.asarray(table[levels].astype(np.float32) * 255).astype(np.uint8)


def answer(gray: NDArray[np.uint8]) -> str:
    """A PNG in Base64; the service encodes it twice, for its volume and for the response."""
    image = Image.fromarray(gray)
    stored, sent = io.BytesIO(), io.BytesIO()
    image.save(stored, "PNG")
    image.save(sent, "PNG")
    return base64.b64encode(sent.getvalue()).decode()
