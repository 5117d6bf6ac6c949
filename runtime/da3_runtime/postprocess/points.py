"""Depth and cameras of one or several photos -> colored points in one world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import OutputError, SettingError
from da3_runtime.postprocess.camera import Camera
from da3_runtime.postprocess.depth import Seen
from da3_runtime.postprocess.poses import inverse

MAX_POINTS = 2**24
_SEED = 0
_NEIGHBOURHOOD = np.ones((3, 3), dtype=np.uint8)


@dataclass(frozen=True)
class PointOptions:
    """Which pixels become points.

    Attributes
    ----------
    confidence : float
        Percentile of the confidence of all photos, 0 to 100; pixels below it are left out.
    sky : bool
        Whether to keep the pixels that the model takes for sky.
    edge : float
        Pixels at an edge of depth are left out: those whose 3 x 3 neighbourhood has depths that differ
        by more than this share of their own depth. 0 keeps them all.
    most : int
        Largest number of points, at least 1. Of more, a random choice remains, the same each time.
    """

    confidence: float = 40.0  # upstream's default
    sky: bool = False
    edge: float = 0.1
    most: int = 1_000_000  # upstream's default

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises
        ------
        SettingError
            If a number is outside its range.
        """
        ranges = (
            ("points_confidence", self.confidence, 0, 100),
            ("points_edge", self.edge, 0, 100),
            ("points_max", self.most, 1, MAX_POINTS),
        )
        for name, value, low, high in ranges:
            if not low <= value <= high:
                raise SettingError(f"{name} must be from {low} to {high}, not {value}.")


DEFAULT_POINTS = PointOptions()


@dataclass(frozen=True, eq=False)
class Cloud:
    """Points of several photos: photo after photo, row after row.

    Attributes
    ----------
    xyz : NDArray[np.float32]
        [N, 3], in the unit of depth, on the axes of the extrinsics' world, relative to ``origin``.
    origin : NDArray[np.float64]
        [3], the center of the first photo's camera in the world. Relative to it 32 bits are enough, even
        where a world is as large as a country.
    colors : NDArray[np.uint8]
        [N, 3], RGB.
    confidence : NDArray[np.float32] | None
        [N]; None if the model predicts no confidence.
    pixels : NDArray[np.float32]
        [N, 2], the center of each point's pixel, x and y; (0, 0) is the corner of the network's input.
    counts : list[int]
        Number of points of each photo.
    """

    xyz: NDArray[np.float32]
    origin: NDArray[np.float64]
    colors: NDArray[np.uint8]
    confidence: NDArray[np.float32] | None
    pixels: NDArray[np.float32]
    counts: list[int]


def camera_of(seen: Seen) -> Camera:
    """The camera of a photo, with intrinsics in pixels of the network's input.

    Raises
    ------
    OutputError
        If it has none.
    """
    if seen.model.camera is None:
        raise OutputError(
            "Points need a camera, and this model finds none: send focal_length_px or intrinsics, or "
            "choose a model that finds the camera."
        )
    return seen.model.camera


def cloud_of(views: Sequence[Seen], options: PointOptions, least: float | None = None) -> Cloud:
    """The points of all photos.

    A point is the depth of a pixel times the ray through its center, K^-1 [x + 0.5, y + 0.5, 1], moved
    from its camera to the world.

    Parameters
    ----------
    least : float | None
        Least confidence of a point, in place of that at the percentile of ``options``.

    Raises
    ------
    OutputError
        If a photo has no camera, or no pixel remains.
    """
    cameras = [camera_of(view) for view in views]
    chosen = _thinned(_kept(views, options, least), options.most)
    if not any(len(indices) for indices in chosen):
        raise OutputError(
            "No pixel remains as a point: send a smaller points_confidence, points_edge 0, or "
            "points_sky true."
        )
    poses = inverse(np.stack([camera.extrinsics for camera in cameras]))
    origin = poses[0, :, 3]
    parts = [_part(*each, origin) for each in zip(views, cameras, poses, chosen, strict=True)]
    confidence = [part.confidence for part in parts if part.confidence is not None]
    return Cloud(
        np.concatenate([part.xyz for part in parts]),
        origin,
        np.concatenate([part.colors for part in parts]),
        np.concatenate(confidence) if len(confidence) == len(parts) else None,
        np.concatenate([part.pixels for part in parts]),
        [len(indices) for indices in chosen],
    )


def joined_clouds(clouds: Sequence[Cloud], confidence: bool) -> Cloud:
    """Several clouds of one world as one, with the origin of the first.

    Parameters
    ----------
    confidence : bool
        Whether to keep confidence; every cloud needs it then.
    """
    origin = clouds[0].origin
    known = [each.confidence for each in clouds if each.confidence is not None] if confidence else []
    return Cloud(
        np.concatenate([each.xyz + (each.origin - origin).astype(np.float32) for each in clouds]),
        origin,
        np.concatenate([each.colors for each in clouds]),
        np.concatenate(known) if known else None,
        np.concatenate([each.pixels for each in clouds]),
        [count for each in clouds for count in each.counts],
    )


def _part(
    view: Seen,
    camera: Camera,
    pose: NDArray[np.float64],
    indices: NDArray[np.intp],
    origin: NDArray[np.float64],
) -> Cloud:
    """The points of one photo's pixels at these flat indices; ``pose`` [3, 4] is camera to world."""
    rows, columns = np.divmod(indices, view.image.shape[1])
    pixels = np.stack([columns, rows], axis=1).astype(np.float32) + np.float32(0.5)
    # From pixels to the world's axes in one step: R^T K^-1.
    to_world = (pose[:, :3] @ np.linalg.inv(camera.intrinsics.astype(np.float64))).astype(np.float32)
    rays = pixels @ to_world[:, :2].T + to_world[:, 2]
    depth = view.model.depth.values.ravel()[indices]
    moved = (pose[:, 3] - origin).astype(np.float32)
    xyz = np.asarray(depth[:, None] * rays + moved, dtype=np.float32)
    confidence = view.model.maps.get("confidence")
    return Cloud(
        xyz,
        origin,
        view.image.reshape(-1, 3)[indices],
        None if confidence is None else confidence.ravel()[indices],
        pixels,
        [len(indices)],
    )


def _kept(views: Sequence[Seen], options: PointOptions, least: float | None) -> list[NDArray[np.bool_]]:
    """The mask [h, w] of the pixels of each photo that may become points."""
    masks = []
    for view in views:
        depth, sky = view.model.depth.values, view.model.maps.get("sky")
        mask = depth > 0
        if sky is not None and not options.sky:
            mask &= ~sky
        if options.edge:
            low, high = cv2.erode(depth, _NEIGHBOURHOOD), cv2.dilate(depth, _NEIGHBOURHOOD)
            mask &= high - low <= np.float32(options.edge) * depth
        masks.append(mask)
    confidence = [view.model.maps.get("confidence") for view in views]
    known = [values[mask] for values, mask in zip(confidence, masks, strict=True) if values is not None]
    if least is None and options.confidence > 0 and any(values.size for values in known):
        least = np.percentile(np.concatenate(known), options.confidence)
    if least is not None:
        for mask, values in zip(masks, confidence, strict=True):
            if values is not None:
                mask &= values >= least
    return masks


def _thinned(masks: Sequence[NDArray[np.bool_]], most: int) -> list[NDArray[np.intp]]:
    """The flat indices of at most ``most`` pixels of all masks, for each mask, in their order."""
    indices = [np.flatnonzero(mask) for mask in masks]
    total = sum(len(each) for each in indices)
    if total <= most:
        return indices
    lottery = np.random.default_rng(_SEED).choice(total, most, replace=False, shuffle=False)
    is_chosen = np.zeros(total, dtype=np.bool_)
    is_chosen[lottery] = True
    ends = np.cumsum([len(each) for each in indices])
    parts = np.split(is_chosen, ends[:-1])
    return [each[part] for each, part in zip(indices, parts, strict=True)]
