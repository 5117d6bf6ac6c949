"""Depth -> a picture for people."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

CLIP_PERCENTILES = (0.5, 99.5)


def inverse_depth_picture(
    depth: NDArray[np.float32], clip: tuple[float, float] = CLIP_PERCENTILES
) -> NDArray[np.uint8]:
    """Inverse depth as 8-bit gray, near is bright.

    Parameters
    ----------
    depth : NDArray[np.float32]
        [H, W], positive.
    clip : tuple[float, float]
        Percentiles of inverse depth that become black and white.

    Returns
    -------
    NDArray[np.uint8]
        [H, W]; all black where depth is constant.
    """
    inverse = 1.0 / np.maximum(depth, np.finfo(np.float32).tiny)
    low, high = np.percentile(inverse, clip)
    span = max(float(high - low), float(np.finfo(np.float32).eps) * abs(float(high)))
    scaled = np.clip((inverse - low) / span, 0.0, 1.0)
    return np.asarray(np.rint(scaled * 255.0), dtype=np.uint8)


def encode_png(picture: NDArray[np.uint8]) -> bytes:
    """PNG bytes of an 8-bit gray [H, W] or RGB [H, W, 3] picture."""
    if picture.ndim == 3:
        picture = np.ascontiguousarray(picture[:, :, ::-1])
    _, encoded = cv2.imencode(".png", picture)
    return encoded.tobytes()
