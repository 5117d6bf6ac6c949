"""What can be asked for, and maps as files of numbers."""

from __future__ import annotations

import io
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.render import encode_png

_LEVELS = 65535


class Output(StrEnum):
    """What can be asked for."""

    PREVIEW = "preview"
    DEPTH_PNG16 = "depth_png16"
    DEPTH_NPZ = "depth_npz"
    CONFIDENCE = "confidence"
    SKY = "sky"
    CAMERA = "camera"
    COLOR = "color"


class Scaled(NamedTuple):
    """Numbers as a 16-bit PNG.

    Attributes
    ----------
    png : bytes
        Gray, 16 bits; 0 is invalid.
    scale : float
        What one step is worth.
    """

    png: bytes
    scale: float


def png16(values: NDArray[np.float32]) -> Scaled:
    """Non-negative numbers [H, W] as a 16-bit PNG whose largest step is their maximum.

    A value is the step times the scale, off by at most half a scale; zero, and what is not a number,
    is 0. What is positive and below half a scale is 1, so that it stays valid.
    """
    valid = np.isfinite(values) & (values > 0)
    top = float(values[valid].max(initial=0.0))
    scale = top / _LEVELS if top > 0 else 1.0
    with np.errstate(invalid="ignore"):
        steps = np.clip(np.rint(np.where(valid, values, 0) / scale), 1, _LEVELS)
    return Scaled(encode_png(np.where(valid, steps, 0).astype(np.uint16)), scale)


def npz(values: NDArray[np.float32]) -> bytes:
    """A compressed NumPy archive with the one array ``depth``, float32 [H, W]."""
    stream = io.BytesIO()
    np.savez_compressed(stream, depth=values.astype(np.float32, copy=False))
    return stream.getvalue()


def sky_png(sky: NDArray[np.bool_]) -> bytes:
    """PNG that is 255 where there is sky and 0 elsewhere."""
    return encode_png(np.where(sky, np.uint8(255), np.uint8(0)))
