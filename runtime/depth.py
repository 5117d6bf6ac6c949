"""Raw outputs -> depth with a unit and a camera, at the size of the photo."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import RawOutputs
from runtime.camera import Camera
from runtime.errors import InferenceError
from runtime.nested import align
from runtime.rays import cameras_from_rays
from runtime.sky import fill_sky
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


@dataclass(frozen=True)
class Prediction:
    """What the networks say about one image, at the model's size.

    Attributes
    ----------
    depth : Depth
        The depth map.
    camera : Camera | None
        Where the variant has one; intrinsics in pixels of the model's input.
    warnings : list[str]
        What a caller should know.
    """

    depth: Depth
    camera: Camera | None
    warnings: list[str]


def prediction_of(raw: dict[str, RawOutputs], index: int, variant: Variant) -> Prediction:
    """The answer for one image of a batch.

    Parameters
    ----------
    raw : dict[str, RawOutputs]
        Outputs of the variant's graphs, by name. Where there are rays the camera is taken from them.

    Raises
    ------
    InferenceError
        If an output holds anything but finite numbers.
    """
    outputs = [raw[graph.name] for graph in variant.graphs]
    for values in (value for graph in outputs for value in graph if value is not None):
        if not np.isfinite(values[index]).all():
            raise InferenceError("The network gave an output that is not finite.")
    first = outputs[0]
    camera, warnings = _camera(first, index)
    if len(outputs) > 1:
        assert camera is not None
        return _nested(first, outputs[1], index, variant, camera, warnings)
    values = first.depth[index]
    if first.sky is not None:
        values = fill_sky(values, first.sky[index])
    return Prediction(Depth(values, variant.unit), camera, warnings)


def _camera(raw: RawOutputs, index: int) -> tuple[Camera | None, list[str]]:
    """The camera from the rays if there are any, else from the camera decoder if there is one."""
    if raw.intrinsics is None or raw.extrinsics is None:
        return None, []
    decoded = Camera(raw.intrinsics[index], raw.extrinsics[index])
    if raw.rays is None or raw.ray_confidence is None:
        return decoded, []
    height, width = raw.depth.shape[1:]
    one = slice(index, index + 1)
    (camera,) = cameras_from_rays(raw.rays[one], raw.ray_confidence[one], width, height)
    if camera is None:
        return decoded, ["The rays determine no camera; it is the camera decoder's."]
    return camera, []


def _nested(
    anyview: RawOutputs,
    metric: RawOutputs,
    index: int,
    variant: Variant,
    camera: Camera,
    warnings: list[str],
) -> Prediction:
    assert anyview.confidence is not None
    assert metric.sky is not None
    assert variant.canonical_focal is not None
    aligned = align(
        anyview.depth[index],
        anyview.confidence[index],
        camera.extrinsics,
        metric.depth[index],
        metric.sky[index],
        focal=camera.focal,
        canonical_focal=variant.canonical_focal,
    )
    return Prediction(
        Depth(aligned.depth, variant.unit if aligned.metric else Unit.RELATIVE),
        camera._replace(extrinsics=aligned.extrinsics),
        [*warnings, *aligned.warnings],
    )


def resize_depth(depth: Depth, width: int, height: int) -> Depth:
    """``depth`` resized bilinearly to ``width`` x ``height``."""
    if depth.values.shape == (height, width):
        return depth
    values = cv2.resize(depth.values, (width, height), interpolation=cv2.INTER_LINEAR)
    return Depth(np.asarray(values, dtype=np.float32), depth.unit)
