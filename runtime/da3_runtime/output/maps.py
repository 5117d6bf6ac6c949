"""Maps of numbers -> PNG, TIFF, OpenEXR and NumPy files."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from da3_runtime.errors import OutputError
from da3_runtime.output.png import encode_png
from da3_runtime.postprocess.depth import Seen

_LEVELS = 65535
FARTHEST = _LEVELS / 1000  # meters that a PNG of millimeters can hold
# TIFF's tags of a description and of how samples are predicted, and the prediction for floats.
_DESCRIPTION, _PREDICTOR, _FLOATING_POINT = 270, 317, 3


class ScaledPng(NamedTuple):
    """Numbers as a 16-bit PNG.

    Attributes
    ----------
    png : bytes
        Gray, 16 bits; 0 marks invalid pixels.
    scale : float
        Value of one step, above 0.
    """

    png: bytes
    scale: float


def png16(values: NDArray[np.float32]) -> ScaledPng:
    """Non-negative numbers [H, W] as a 16-bit PNG whose largest step is their maximum.

    Step times scale is the value, to within half a scale. Zero, negative and non-finite values become 0.
    A positive value below half a scale becomes 1, so that it stays valid.
    """
    valid = np.isfinite(values) & (values > 0)
    top = float(values[valid].max(initial=0.0))
    scale = top / _LEVELS if top > 0 else 1.0
    with np.errstate(invalid="ignore"):
        steps = np.clip(np.rint(np.where(valid, values, 0) / scale), 1, _LEVELS)
    return ScaledPng(encode_png(np.where(valid, steps, 0).astype(np.uint16)), scale)


class Millimeters(NamedTuple):
    """Depth as a PNG of millimeters, and the share of its pixels that are too far for it."""

    png: bytes
    beyond: float


def png_of_millimeters(values: NDArray[np.float32]) -> Millimeters:
    """Depth [H, W] in meters as a 16-bit PNG in millimeters, as Open3D, ROS and Rerun read it.

    Zero marks invalid pixels: negative and non-finite ones, and those beyond 65.535 m. A depth below
    half a millimeter becomes 1, so that it stays valid.
    """
    valid = np.isfinite(values) & (values > 0)
    with np.errstate(invalid="ignore", over="ignore"):
        steps = np.rint(values * np.float32(1000))
    is_beyond = valid & (steps > _LEVELS)
    steps = np.where(valid & ~is_beyond, np.maximum(steps, 1), 0)
    return Millimeters(encode_png(steps.astype(np.uint16)), float(is_beyond.mean()))


def npz(values: NDArray[np.float32]) -> bytes:
    """A compressed NumPy archive with one array, ``depth``, float32 [H, W]."""
    stream = io.BytesIO()
    np.savez_compressed(stream, depth=values.astype(np.float32, copy=False))
    return stream.getvalue()


def sky_png(sky: NDArray[np.bool_]) -> bytes:
    """A gray 8-bit PNG of a mask [H, W]: 255 for sky, 0 elsewhere."""
    return encode_png(np.where(sky, np.uint8(255), np.uint8(0)))


def tiff(values: NDArray[np.float32], unit: str) -> bytes:
    """A deflated TIFF of depth [H, W], float32, whose description names the unit."""
    stream = io.BytesIO()
    Image.fromarray(values).save(
        stream,
        "TIFF",
        compression="tiff_adobe_deflate",
        tiffinfo={_DESCRIPTION: f"depth, unit {unit}", _PREDICTOR: _FLOATING_POINT},
    )
    return stream.getvalue()


def exr(values: NDArray[np.float32]) -> bytes:
    """An OpenEXR image of depth [H, W], float32, channel Y.

    Raises
    ------
    OutputError
        If OpenCV writes no OpenEXR images here.
    """
    # OpenCV reads this variable before it writes its first EXR image.
    os.environ.setdefault("OPENCV_IO_ENABLE_OPENEXR", "1")
    kind = [cv2.IMWRITE_EXR_TYPE, cv2.IMWRITE_EXR_TYPE_FLOAT]
    try:
        return cv2.imencode(".exr", values, kind)[1].tobytes()
    except cv2.error:
        raise OutputError(
            "depth_exr cannot be written here: this OpenCV has no OpenEXR, or OPENCV_IO_ENABLE_OPENEXR "
            "turns it off."
        ) from None


def scene_npz(views: Sequence[Seen]) -> bytes:
    """A compressed NumPy archive of what the network saw and returned, with upstream's names.

    ``image``, uint8 [N, h, w, 3]; ``depth`` and ``conf``, float32 [N, h, w]; ``intrinsics`` [N, 3, 3] in
    pixels of ``image``; ``extrinsics`` [N, 3, 4], world to camera. What the model lacks is left out.
    """
    models = [view.model for view in views]
    cameras = [model.camera for model in models if model.camera is not None]
    lists: dict[str, list[NDArray[Any]]] = {
        "image": [view.image for view in views],
        "depth": [model.depth.values for model in models],
        "conf": [model.maps["confidence"] for model in models if "confidence" in model.maps],
        "intrinsics": [camera.intrinsics for camera in cameras],
        "extrinsics": [camera.extrinsics for camera in cameras],
    }
    arrays: dict[str, Any] = {name: np.stack(each) for name, each in lists.items() if each}
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()
