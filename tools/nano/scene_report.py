"""How well da3-nano finds the cameras and depths of rendered scenes, for every way to run it here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_export.accuracy.metrics import Alignment, accuracy
from da3_export.accuracy.ways import Run, ways_to_run
from da3_export.settings import BuildSettings
from da3_export.util.progress import Progress, aligned
from da3_runtime.image.preprocess import model_input
from da3_runtime.network_io import Conditions, RawOutputs
from da3_runtime.postprocess.camera import resize_intrinsics
from da3_runtime.postprocess.depth import resize_map
from da3_runtime.postprocess.poses import (
    encode_poses,
    inverse,
    normalized,
    relative_to,
    scale_between,
)
from da3_runtime.variants import Head, find_variant
from tools.nano.render import HELD_OUT_SEED, LEAST_VALID, known_depth
from tools.nano.scenes import Scene, render_views

VIEWS = 4
COUNTS = (1, 2, 4)  # of the views that are run together
SIZES = ((252, 336), (336, 252))
NEAR, FAR = 5, 15  # degrees within which a rotation or a direction counts

Figures = dict[str, float | str]


class Found(NamedTuple):
    """What the network found in some views of a scene.

    Attributes
    ----------
    depth : NDArray[np.float32]
        [S, H, W], at the size of the images.
    extrinsics : NDArray[np.float64]
        [S, 3, 4].
    focal : NDArray[np.float64]
        fx in pixels of the images, [S].
    """

    depth: NDArray[np.float32]
    extrinsics: NDArray[np.float64]
    focal: NDArray[np.float64]


def held_out_scenes(count: int) -> list[list[Scene]]:
    """The first ``count`` scenes that training never uses, with enough known depth in every view."""
    scenes: list[list[Scene]] = []
    index = 0
    while len(scenes) < count:
        views = render_views(HELD_OUT_SEED, index, VIEWS, *SIZES[index % len(SIZES)])
        if min(view.valid.mean() for view in views) > LEAST_VALID:
            scenes.append(views)
        index += 1
    return scenes


def report(settings: BuildSettings, scenes: Sequence[Sequence[Scene]]) -> list[Figures]:
    """Figures of every way to run every head here, one row each, after a row of no motion at all."""
    progress = Progress("scenes", 0)
    rows: list[Figures] = [_still(scenes)]
    for head in Head:
        for how, run, _ in ways_to_run(replace(settings, head=head), progress):
            progress.log(f"{head}, {how}: {len(scenes)} scenes")
            rows.append({"head": head.value, "how": how, **_figures(run, scenes)})
    return rows


def _still(scenes: Sequence[Sequence[Scene]]) -> Figures:
    """The errors of cameras that are said not to turn."""
    angles = [
        angle
        for views in scenes
        for angle in _rotation_errors(np.tile(np.eye(3, 4), (len(views), 1, 1)), _poses(views))
    ]
    return {"head": "", "how": "no turn", **_shares("rotation", angles)}


def _figures(run: Run, scenes: Sequence[Sequence[Scene]]) -> Figures:
    rotations: list[float] = []
    directions: list[float] = []
    focals: list[float] = []
    depths: dict[str, list[float]] = {}
    for views in scenes:
        poses = _poses(views)
        alone = _run(run, [[view] for view in views])
        for count in COUNTS:
            some, truth = views[:count], poses[:count]
            (found,) = _run(run, [some])
            errors = {f"abs_rel_{count}": _abs_rel(some, found.depth)}
            if count > 1:
                singles = np.concatenate([each.depth for each in alone[:count]])
                errors[f"abs_rel_{count}_alone"] = _abs_rel(some, singles)
                (known,) = _run(run, [some], truth)
                for name, each in (("", found), ("_known", known)):
                    scale = max(scale_between(truth, each.extrinsics), 1e-9)
                    errors[f"abs_rel_{count}_in_unit{name}"] = _abs_rel(some, each.depth, 1 / scale)
            if count == VIEWS:
                rotations += _rotation_errors(found.extrinsics, truth)
                directions += _direction_errors(found.extrinsics, truth)
                focals += [
                    abs(math.log(focal / view.intrinsics[0, 0]))
                    for focal, view in zip(found.focal, some, strict=True)
                ]
            for name, error in errors.items():
                depths.setdefault(name, []).append(error)
    return {
        **_shares("rotation", rotations),
        **_shares("direction", directions),
        "focal": round(float(np.median(focals)), 4),
        # A scale may be far off, so the mean says nothing.
        **{
            name: round(float(np.median(e) if "unit" in name else np.mean(e)), 4)
            for name, e in depths.items()
        },
    }


def _run(
    run: Run, scenes: Sequence[Sequence[Scene]], poses: NDArray[np.float64] | None = None
) -> list[Found]:
    """Run scenes as one batch; ``poses`` are the known cameras of the only one."""
    longest = find_variant("da3-nano").processing_res
    images = np.stack([[model_input(view.rgb, longest)[0, 0] for view in views] for views in scenes])
    height, width = scenes[0][0].depth.shape
    across, down = images.shape[3] / width, images.shape[2] / height
    conditions = Conditions.none(*images.shape[:2])
    conditions.reference[:] = 0
    if poses is not None:
        lenses = [resize_intrinsics(view.intrinsics, across, down) for view in scenes[0]]
        conditions.poses[0] = encode_poses(normalized(poses), np.stack(lenses), *images.shape[2:4])
    (raw,) = run(images, conditions).values()
    return [_found(raw.scene(index), width, height, across) for index in range(len(scenes))]


def _found(raw: RawOutputs, width: int, height: int, across: float) -> Found:
    assert raw.intrinsics is not None
    assert raw.extrinsics is not None
    depth = np.stack([resize_map(each, width, height) for each in raw.depth])
    focal = raw.intrinsics[:, 0, 0].astype(np.float64) / across
    return Found(depth, raw.extrinsics.astype(np.float64), focal)


def _poses(views: Sequence[Scene]) -> NDArray[np.float64]:
    """The true cameras, relative to the first, [S, 3, 4]."""
    return relative_to(np.stack([view.extrinsics for view in views]), 0)


def _abs_rel(views: Sequence[Scene], depth: NDArray[np.float32], scale: float | None = None) -> float:
    """Mean |d - t| / t over all views; without a scale, their common median is the truth's."""
    truth = np.stack([known_depth(view) for view in views])
    scaled = depth if scale is None else depth * np.float32(scale)
    alignment = Alignment.MEDIAN if scale is None else Alignment.NONE
    return accuracy(scaled, truth, alignment).abs_rel


def _rotation_errors(found: NDArray[np.float64], truth: NDArray[np.float64]) -> list[float]:
    """Angle between found and true rotation of each view but the first, in degrees."""
    turns = relative_to(found, 0)[1:, :, :3] @ np.swapaxes(truth[1:, :, :3], 1, 2)
    cosines = (np.trace(turns, axis1=1, axis2=2) - 1) / 2
    return list(np.degrees(np.arccos(np.clip(cosines, -1, 1))))


def _direction_errors(found: NDArray[np.float64], truth: NDArray[np.float64]) -> list[float]:
    """Angle between found and true direction from the first camera to each other, in degrees."""
    ways = [inverse(relative_to(each, 0))[1:, :, 3] for each in (found, truth)]
    a, b = (way / np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 1e-9) for way in ways)
    return list(np.degrees(np.arccos(np.clip((a * b).sum(axis=1), -1, 1))))


def _shares(name: str, angles: Sequence[float]) -> Figures:
    values = np.asarray(angles)
    return {
        f"{name}_median": round(float(np.median(values)), 2),
        f"{name}_within_{NEAR}": round(float((values < NEAR).mean()), 3),
        f"{name}_within_{FAR}": round(float((values < FAR).mean()), 3),
    }


def table(rows: Sequence[Figures]) -> str:
    """The rows as aligned text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [tuple(str(row.get(name, "")) for name in names) for row in rows]
    return aligned([tuple(names), *lines])
