"""What can be asked for, and a prediction as the files that were."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.output.png import encode_png
from da3_runtime.output.preview import DEFAULT_TONE, Tone, colour_picture, inverse_depth_picture
from da3_runtime.postprocess.depth import Prediction

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


@dataclass(frozen=True)
class Wanted:
    """What to make of a prediction.

    Attributes
    ----------
    outputs : tuple[Output, ...]
        In the order they are given.
    tone, color_map : Tone, str
        Of the pictures.
    """

    outputs: tuple[Output, ...] = (Output.PREVIEW,)
    tone: Tone = DEFAULT_TONE
    color_map: str = "inferno"


class Encoded(NamedTuple):
    """One output.

    Attributes
    ----------
    output : Output
        Which it is.
    file : bytes | None
        A PNG or a NumPy archive; None where the model does not say this, and of a camera.
    facts : dict[str, object]
        What is needed to read it, or the camera itself.
    """

    output: Output
    file: bytes | None
    facts: dict[str, object]


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


def encode_outputs(prediction: Prediction, wanted: Wanted) -> Iterator[Encoded]:
    """What is wanted of a prediction, one after another; raises as :func:`colour_picture`."""
    pictures = _Pictures(prediction, wanted.tone)
    for output in wanted.outputs:
        yield Encoded(output, *_encode(output, prediction, pictures, wanted.color_map))


class _Pictures:
    """The gray picture, made when first asked for."""

    def __init__(self, prediction: Prediction, tone: Tone) -> None:
        self._depth = prediction.depth.values
        self._tone = tone

    @cached_property
    def gray(self) -> NDArray[np.uint8]:
        return inverse_depth_picture(self._depth, self._tone)


def _encode(
    output: Output, prediction: Prediction, pictures: _Pictures, color_map: str
) -> tuple[bytes | None, dict[str, object]]:
    match output:
        case Output.PREVIEW:
            return encode_png(pictures.gray), {}
        case Output.COLOR:
            return encode_png(colour_picture(pictures.gray, color_map)), {}
        case Output.DEPTH_NPZ:
            return npz(prediction.depth.values), {}
        case Output.DEPTH_PNG16:
            png, scale = png16(prediction.depth.values)
            return png, {"depth_scale": scale}
        case Output.CONFIDENCE:
            if prediction.confidence is None:
                return None, {}
            png, scale = png16(prediction.confidence)
            return png, {"confidence_scale": scale}
        case Output.SKY:
            return None if prediction.sky is None else sky_png(prediction.sky), {}
        case Output.CAMERA:
            camera = prediction.camera
            return None, {"camera": None if camera is None else camera.as_lists()}
