"""Raw outputs -> depth with a unit, at the size of the photo."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import RawOutputs
from runtime.errors import InferenceError
from runtime.variants import Unit, Variant


@dataclass(frozen=True)
class Depth:
    """A depth map that says what its numbers mean.

    Attributes
    ----------
    values : NDArray[np.float32]
        [H, W], larger is farther.
    unit : Unit
        Metres, or relative: right up to one unknown factor.
    """

    values: NDArray[np.float32]
    unit: Unit


def depth_of(outputs: RawOutputs, index: int, variant: Variant) -> Depth:
    """The depth map of one image of a batch, at the model's size.

    Raises
    ------
    InferenceError
        If it holds anything but finite numbers.
    """
    values = outputs.depth[index]
    if not np.isfinite(values).all():
        raise InferenceError("The network gave a depth that is not finite.")
    return Depth(values, variant.unit)


def resize_depth(depth: Depth, width: int, height: int) -> Depth:
    """``depth`` resized bilinearly to ``width`` x ``height``."""
    if depth.values.shape == (height, width):
        return depth
    values = cv2.resize(depth.values, (width, height), interpolation=cv2.INTER_LINEAR)
    return Depth(np.asarray(values, dtype=np.float32), depth.unit)
