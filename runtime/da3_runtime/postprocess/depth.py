"""Raw outputs -> depth with a unit, camera and maps, at the size of the photo."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import InferenceError
from da3_runtime.network_io import MAPS, RawOutputs
from da3_runtime.postprocess.camera import Camera, Lens, resize_camera
from da3_runtime.postprocess.nested import align
from da3_runtime.postprocess.rays import cameras_from_rays
from da3_runtime.postprocess.sky import fill_sky, is_ground
from da3_runtime.variants import Unit, Variant

PREDICTED = "predicted"
NO_FOCAL = (
    "The focal length is not known, so the depth is relative: send focal_length_px (in pixels of the "
    "image) for meters."
)


@dataclass(frozen=True)
class Depth:
    """A depth map and the unit of its numbers.

    Attributes
    ----------
    values : NDArray[np.float32]
        [H, W], larger is farther.
    unit : Unit
        Meters; relative, which is correct up to one unknown factor; or that of the given cameras.
    """

    values: NDArray[np.float32]
    unit: Unit


@dataclass(frozen=True)
class Prediction:
    """Depth, camera and maps of one image, at one size.

    Attributes
    ----------
    depth : Depth
        The depth map.
    camera : Camera | None
        Intrinsics in pixels of the depth map: the lens's if one was given, else predicted. None if there
        is no lens and the variant predicts no camera.
    maps : Mapping[str, NDArray[Any]]
        The maps of :data:`MAPS` that the variant predicts, [H, W]. ``sky`` is a mask, True for sky; the
        others are float32, as in :class:`RawOutputs`.
    focal_source : str | None
        Source of the focal length that scaled the depth to meters: :data:`PREDICTED` or a lens's
        source. None if no focal length was used.
    warnings : list[str]
        Sentences for the caller.
    seen : Seen | None
        What the network saw and returned, which files of points are made of; None if it was not kept.
    """

    depth: Depth
    camera: Camera | None
    maps: Mapping[str, NDArray[Any]]
    focal_source: str | None
    warnings: list[str]
    seen: Seen | None = None


@dataclass(frozen=True, eq=False)
class Seen:
    """What the network saw of a photo, what it returned for it, and where that is in the photo.

    Attributes
    ----------
    image : NDArray[np.uint8]
        [h, w, 3], RGB: the network's input.
    model : Prediction
        Depth, camera and every map, at the size of ``image``.
    width, height : int
        Size of the photo in pixels.
    left, top : float
        Left upper corner of ``image`` in the photo, in pixels of ``image``.
    scale : tuple[float, float]
        Pixels of the photo for each pixel of ``image``, across and down.
    """

    image: NDArray[np.uint8]
    model: Prediction
    width: int
    height: int
    left: float
    top: float
    scale: tuple[float, float]


def prediction_of(
    raw: Mapping[str, RawOutputs], index: int, variant: Variant, lens: Lens | None = None
) -> Prediction:
    """The prediction for one photo of a batch; as :func:`predictions_of` for a scene of one view."""
    (prediction,) = predictions_of(raw, index, variant, [lens])
    return prediction


def predictions_of(
    raw: Mapping[str, RawOutputs], index: int, variant: Variant, lenses: Sequence[Lens | None]
) -> list[Prediction]:
    """The predictions for the views of one scene of a batch, at the model's size.

    The views share what they have in common: one depth of the sky, and the nested model's one scale.

    Parameters
    ----------
    raw : Mapping[str, RawOutputs]
        Outputs of the variant's graphs, by name. Rays, if any, determine the cameras.
    index : int
        Position of the scene in the batch.
    variant : Variant
        The model that made ``raw``.
    lenses : Sequence[Lens | None]
        The lens of each view, if known, in pixels of the model's input. It replaces predicted
        intrinsics, and scales the depth of a metric network or a nested model to meters. Other depths
        stay relative.

    Raises
    ------
    InferenceError
        If an output has values that are not finite.
    """
    outputs = [raw[graph.name].scene(index) for graph in variant.graphs]
    for values in (value for graph in outputs for value in graph[:-1] if value is not None):
        _finite(values)
    first = outputs[0]
    cameras, warnings = _cameras(first)
    maps: dict[str, NDArray[Any]] = {
        name: values
        for graph in outputs
        for name, values in graph._asdict().items()
        if name in MAPS and values is not None
    }
    cameras = [
        camera if lens is None else lens.camera(camera)
        for camera, lens in zip(cameras, lenses, strict=True)
    ]
    if len(outputs) > 1:
        return _nested(first.depth, outputs[1].depth, maps, variant, cameras, lenses, warnings)
    depth = first.depth
    if "sky" in maps:
        depth, maps["sky"] = fill_sky(depth, maps["sky"]), ~is_ground(maps["sky"])
    return [
        _prediction(
            variant, view, camera, lens, {name: values[i] for name, values in maps.items()}, more
        )
        for i, (view, camera, lens, more) in enumerate(
            zip(depth, cameras, lenses, warnings, strict=True)
        )
    ]


def _prediction(
    variant: Variant,
    values: NDArray[np.float32],
    camera: Camera | None,
    lens: Lens | None,
    maps: Mapping[str, NDArray[Any]],
    warnings: list[str],
) -> Prediction:
    """The prediction for one view of a model of one network."""
    unit, source = variant.unit, None
    if variant.needs_focal and lens is None:
        warnings = [*warnings, NO_FOCAL]
    elif variant.canonical_focal is not None and lens is not None:
        values = _finite(values * np.float32(lens.focal / variant.canonical_focal))
        unit, source = Unit.METERS, lens.source
    elif lens is not None:
        warnings = [
            *warnings,
            f"{lens.source} does not change the depth of {variant.model_id}; only the camera uses it.",
        ]
    return Prediction(Depth(values, unit), camera, maps, source, warnings)


def _finite(values: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise InferenceError(
            "The network returned values that are not finite: try another image or precision."
        )
    return values


def _cameras(scene: RawOutputs) -> tuple[list[Camera | None], list[list[str]]]:
    """Camera and warnings of each view: from the rays if the graph has them, else the decoder's."""
    views = len(scene.depth)
    if scene.intrinsics is None or scene.extrinsics is None:
        return [None] * views, [[] for _ in range(views)]
    decoded = [Camera(*each) for each in zip(scene.intrinsics, scene.extrinsics, strict=True)]
    if scene.rays is None or scene.ray_confidence is None:
        return list(decoded), [[] for _ in range(views)]
    height, width = scene.depth.shape[1:]
    found = cameras_from_rays(scene.rays, scene.ray_confidence, width, height)
    lost = ["The rays determine no camera; the camera decoder's is returned."]
    return (
        [ours or theirs for ours, theirs in zip(found, decoded, strict=True)],
        [[] if camera is not None else lost for camera in found],
    )


def _nested(
    anyview: NDArray[np.float32],
    metric: NDArray[np.float32],
    maps: Mapping[str, NDArray[Any]],
    variant: Variant,
    cameras: Sequence[Camera | None],
    lenses: Sequence[Lens | None],
    warnings: list[list[str]],
) -> list[Prediction]:
    assert variant.canonical_focal is not None
    known = [camera for camera in cameras if camera is not None]
    assert len(known) == len(anyview)
    aligned = align(
        anyview,
        maps["confidence"],
        np.stack([camera.extrinsics for camera in known]),
        metric,
        maps["sky"],
        focal=[camera.focal for camera in known],
        canonical_focal=variant.canonical_focal,
    )
    unit = variant.unit if aligned.metric else Unit.RELATIVE
    predictions = []
    for i, (camera, lens) in enumerate(zip(known, lenses, strict=True)):
        source = lens.source if lens is not None else PREDICTED
        view = {name: values[i] for name, values in maps.items()}
        view |= {"confidence": aligned.confidence[i], "sky": ~is_ground(maps["sky"][i])}
        predictions.append(
            Prediction(
                Depth(aligned.depth[i], unit),
                camera._replace(extrinsics=aligned.extrinsics[i]),
                view,
                source if aligned.metric else None,
                [*warnings[i], *aligned.warnings],
            )
        )
    return predictions


def resize_prediction(
    prediction: Prediction, width: int, height: int, maps: Collection[str] = MAPS
) -> Prediction:
    """``prediction`` for its image resized to ``width`` x ``height`` pixels.

    Parameters
    ----------
    maps : Collection[str]
        The members of :data:`MAPS` to keep; the others are left out, so that no time is spent on them.
    """
    was_height, was_width = prediction.depth.values.shape
    kept = {name: values for name, values in prediction.maps.items() if name in maps}
    if (was_height, was_width) == (height, width):
        return replace(prediction, maps=kept)
    camera = prediction.camera
    return replace(
        prediction,
        depth=replace(prediction.depth, values=resize_map(prediction.depth.values, width, height)),
        camera=camera and resize_camera(camera, width / was_width, height / was_height),
        maps={name: resize_map(values, width, height) for name, values in kept.items()},
    )


def resize_map(values: NDArray[Any], width: int, height: int) -> NDArray[Any]:
    """A map [H, W], float32 or bool, resized to [height, width], within its own range.

    Bicubic if either side grows, so that edges stay sharp; else the mean of the pixels that one pixel
    covers, so that every pixel counts.
    """
    if values.dtype == np.bool_:
        return resize_map(values.astype(np.float32), width, height) >= 0.5
    grows = height > values.shape[0] or width > values.shape[1]
    kind = cv2.INTER_CUBIC if grows else cv2.INTER_AREA
    resized = np.asarray(cv2.resize(values, (width, height), interpolation=kind))
    # A cubic overshoots at edges.
    return np.clip(resized, values.min(), values.max(), out=resized)
