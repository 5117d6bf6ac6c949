"""Raw outputs -> depth with a unit and a camera, at the size of the photo."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import InferenceError
from da3_runtime.network_io import RawOutputs
from da3_runtime.postprocess.camera import Camera, Lens, resize_camera
from da3_runtime.postprocess.nested import align
from da3_runtime.postprocess.rays import cameras_from_rays
from da3_runtime.postprocess.resize import resize_bicubic
from da3_runtime.postprocess.sky import fill_sky, is_ground
from da3_runtime.variants import Unit, Variant

PREDICTED = "predicted"
NO_FOCAL = (
    "The focal length is not known, so the depth is relative; send focal_length_px (in pixels of the "
    "image) for metres."
)


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
    confidence : NDArray[np.float32] | None
        [H, W], 1 and more, where the variant has it.
    sky : NDArray[np.bool_] | None
        [H, W], where the variant tells sky from the rest.
    focal_source : str | None
        Whose focal length made metres of the depth: ``predicted``, or a lens's source.
    warnings : list[str]
        What a caller should know.
    """

    depth: Depth
    camera: Camera | None
    confidence: NDArray[np.float32] | None
    sky: NDArray[np.bool_] | None
    focal_source: str | None
    warnings: list[str]


def prediction_of(
    raw: dict[str, RawOutputs], index: int, variant: Variant, lens: Lens | None = None
) -> Prediction:
    """The answer for one image of a batch.

    Parameters
    ----------
    raw : dict[str, RawOutputs]
        Outputs of the variant's graphs, by name. Where there are rays the camera is taken from them.
    lens : Lens | None
        What is known of the photo's lens, in pixels of the model's input. It gives a metric network its
        metres, and takes the place of a nested model's own intrinsics; other variants do without.

    Raises
    ------
    InferenceError
        If an output holds anything but finite numbers.
    """
    outputs = [raw[graph.name] for graph in variant.graphs]
    for values in (value for graph in outputs for value in graph if value is not None):
        _finite(values[index])
    first = outputs[0]
    camera, warnings = _camera(first, index)
    if len(outputs) > 1:
        assert camera is not None
        return _nested(first, outputs[1], index, variant, camera, lens, warnings)
    confidence = None if first.confidence is None else first.confidence[index]
    values, sky, unit, source = first.depth[index], None, variant.unit, None
    if first.sky is not None:
        values, sky = fill_sky(values, first.sky[index]), ~is_ground(first.sky[index])
    if variant.needs_focal and lens is None:
        warnings = [*warnings, NO_FOCAL]
    elif variant.canonical_focal is not None and lens is not None:
        values = _finite(values * np.float32(lens.focal / variant.canonical_focal))
        unit, source = Unit.METRES, lens.source
    return Prediction(Depth(values, unit), camera, confidence, sky, source, warnings)


def _finite(values: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise InferenceError("The network gave an output that is not finite.")
    return values


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
    lens: Lens | None,
    warnings: list[str],
) -> Prediction:
    assert anyview.confidence is not None
    assert metric.sky is not None
    assert variant.canonical_focal is not None
    if lens is not None:
        camera = camera._replace(intrinsics=lens.intrinsics)
    aligned = align(
        anyview.depth[index],
        anyview.confidence[index],
        camera.extrinsics,
        metric.depth[index],
        metric.sky[index],
        focal=camera.focal,
        canonical_focal=variant.canonical_focal,
    )
    source = lens.source if lens is not None else PREDICTED
    return Prediction(
        Depth(aligned.depth, variant.unit if aligned.metric else Unit.RELATIVE),
        camera._replace(extrinsics=aligned.extrinsics),
        aligned.confidence,
        ~is_ground(metric.sky[index]),
        source if aligned.metric else None,
        [*warnings, *aligned.warnings],
    )


def resize_prediction(
    prediction: Prediction, width: int, height: int, *, confidence: bool = True, sky: bool = True
) -> Prediction:
    """``prediction`` for the image resized to ``width`` x ``height``.

    ``confidence`` and ``sky`` say whether those maps are wanted; without them they are None. Maps are
    resized bicubically within their own range, so that nothing becomes nearer or farther than
    it was said to be; the camera's pixels are those of the new size.
    """
    was_height, was_width = prediction.depth.values.shape
    maps = prediction.confidence if confidence else None, prediction.sky if sky else None
    if (was_height, was_width) == (height, width):
        return replace(prediction, confidence=maps[0], sky=maps[1])
    camera = prediction.camera
    return replace(
        prediction,
        depth=replace(prediction.depth, values=resize_bicubic(prediction.depth.values, width, height)),
        camera=camera and resize_camera(camera, width / was_width, height / was_height),
        confidence=None if maps[0] is None else resize_bicubic(maps[0], width, height),
        sky=None
        if maps[1] is None
        else resize_bicubic(maps[1].astype(np.float32), width, height) >= 0.5,
    )
