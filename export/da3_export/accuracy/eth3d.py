"""ETH3D: photos of a DSLR camera, known depth of the distorted ones, and COLMAP's cameras."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_export.accuracy.samples import (
    Sample,
    Size,
    Source,
    Truth,
    existing,
    files_below,
    lines_of,
    photo_of,
    rows_of,
)
from da3_export.photos import find_photos
from da3_runtime.errors import SettingError
from da3_runtime.postprocess.poses import rotation

RAW, UNDISTORTED = "dslr_images", "dslr_images_undistorted"
_CALIBRATIONS = {RAW: "dslr_calibration_jpg", UNDISTORTED: "dslr_calibration_undistorted"}


class Colmap(NamedTuple):
    """A camera of COLMAP's cameras.txt, and a pose of its images.txt.

    Attributes
    ----------
    size : Size
        Height and width in pixels.
    params : NDArray[np.float64]
        fx, fy, cx, cy; then k1, k2, p1, p2, k3, k4, sx1, sy1 of the model THIN_PRISM_FISHEYE.
    extrinsics : NDArray[np.float64]
        World to camera, [3, 4].
    """

    size: Size
    params: NDArray[np.float64]
    extrinsics: NDArray[np.float64]


def eth3d(source: Source) -> list[Sample]:
    """The photos of all scenes below a folder: the distorted ones, or else the undistorted ones."""
    samples = []
    for scene in sorted(
        {path.parents[2] for path in files_below(source.path, f"ground_truth_depth/{RAW}/*")}
    ):
        kind = next((each for each in (RAW, UNDISTORTED) if (scene / "images" / each).is_dir()), None)
        if kind is None:
            raise SettingError(f"{scene.name}/images/{RAW} is missing: put the photos there.")
        cameras = {each: _colmap(scene / folder) for each, folder in _CALIBRATIONS.items()}
        for photo in find_photos(scene / "images" / kind):
            depth = existing(source, scene / "ground_truth_depth" / RAW / photo.name)
            raw, own = (cameras[each].get(photo.name) for each in (RAW, kind))
            if kind == UNDISTORTED and (raw is None or own is None):
                raise SettingError(
                    f"{scene.name}: depth belongs to the distorted photos, so undistorted ones need "
                    f"cameras.txt and images.txt in {' and in '.join(_CALIBRATIONS.values())}."
                )
            samples.append(
                Sample(
                    photo.relative_to(source.path).as_posix(),
                    (photo, depth),
                    partial(photo_of, photo),
                    partial(_eth3d_depth, depth, raw, own if kind == UNDISTORTED else None),
                    None if own is None else float(own.params[:2].mean()),
                    None if own is None else scene.relative_to(source.path).as_posix(),
                    None if own is None else own.extrinsics,
                )
            )
    return samples


def _eth3d_depth(path: Path, camera: Colmap | None, undistorted: Colmap | None, size: Size) -> Truth:
    """A map of bare FP32 numbers, row by row, as large as the distorted photo."""
    height, width = size if camera is None else camera.size
    values = np.fromfile(path, "<f4")
    if values.size != height * width:
        raise SettingError(
            f"{path.name} holds {values.size} FP32 numbers, its photo has {width} x {height} pixels: "
            "give the photos in their own size, or with their cameras.txt and images.txt."
        )
    depth = values.reshape(height, width).astype(np.float64)
    if camera is None or undistorted is None:
        return depth
    x, y = _distorted_pixels(undistorted, camera)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    row, column = (np.where(inside, each, 0).astype(np.int64) for each in (y, x))
    return np.where(inside, depth[row, column], 0.0)


def _distorted_pixels(undistorted: Colmap, camera: Colmap) -> tuple[Truth, Truth]:
    """Where each pixel of an undistorted photo is in the distorted one, x and y, [H, W].

    Formulas of ETH3D's documentation (THIN_PRISM_FISHEYE). (0, 0) is the corner of a photo.
    """
    height, width = undistorted.size
    fx, fy, cx, cy = undistorted.params[:4]
    u, v = np.meshgrid((np.arange(width) + 0.5 - cx) / fx, (np.arange(height) + 0.5 - cy) / fy)
    if len(camera.params) > 4:
        k1, k2, p1, p2, k3, k4, sx1, sy1 = camera.params[4:12]
        radius = np.maximum(np.hypot(u, v), 1e-12)
        u, v = (each * np.arctan(radius) / radius for each in (u, v))
        square = u * u + v * v
        radial = 1 + square * (k1 + square * (k2 + square * (k3 + square * k4)))
        u, v = (
            u * radial + 2 * p1 * u * v + p2 * (square + 2 * u * u) + sx1 * square,
            v * radial + 2 * p2 * u * v + p1 * (square + 2 * v * v) + sy1 * square,
        )
    fx, fy, cx, cy = camera.params[:4]
    return u * fx + cx, v * fy + cy


def _colmap(folder: Path) -> dict[str, Colmap]:
    """The cameras of a folder of COLMAP's text files by photo; none if the files are missing."""
    if not (folder / "images.txt").is_file() or not (folder / "cameras.txt").is_file():
        return {}
    file = folder / "cameras.txt"
    try:
        cameras = {}
        for number, model, width, height, *params in rows_of(file):
            if model not in ("PINHOLE", "THIN_PRISM_FISHEYE"):
                raise SettingError(f"{file.name}: camera model {model} is not one of ETH3D's.")
            cameras[number] = ((int(height), int(width)), np.array(params, np.float64))
        file = folder / "images.txt"
        found = {}
        # Every second line lists points of the photo above, and may be empty.
        for line in [line for line in lines_of(file) if not line.startswith("#")][::2]:
            if line.strip():
                _, w, x, y, z, *position, camera, name = line.split()
                pose = np.column_stack((rotation(*map(float, (x, y, z, w))), np.array(position, float)))
                found[Path(name).name] = Colmap(*cameras[camera], pose)
    except (ValueError, KeyError, ZeroDivisionError):
        raise SettingError(f"{folder.name}/{file.name} is not a text file of COLMAP.") from None
    return found
