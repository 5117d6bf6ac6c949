"""Photos with known depth, read from public data sets as they are unpacked, or from a plain folder.

The layouts are those of the data sets' own pages and of the projects that report figures on them.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_export.accuracy.eth3d import RAW, UNDISTORTED, eth3d
from da3_export.accuracy.metrics import NEAREST, is_known
from da3_export.accuracy.samples import (
    Sample,
    Size,
    Source,
    Truth,
    existing,
    files_below,
    lines_of,
    rows_of,
    sample_of,
    truth_of,
)
from da3_export.photos import DEPTH_IMAGE_ENDINGS, find_photos
from da3_runtime.errors import SettingError
from da3_runtime.image.decode import Photo
from da3_runtime.postprocess.poses import inverse, rotation
from da3_runtime.util.extras import is_installed

# The first that exists beside NAME.jpg is its depth in a plain folder.
DEPTH_ENDINGS = (".depth.npz", ".npz", ".npy", ".depth.png", ".pfm", *DEPTH_IMAGE_ENDINGS[1:])
ABOUT_NAME = "about.json"  # description of a plain folder; copied into the figures


class Crop(NamedTuple):
    """The part of a photo that counts, as shares of its height and width."""

    top: float
    bottom: float
    left: float
    right: float


@dataclass(frozen=True)
class DataSet:
    """A row of :data:`DATA_SETS`.

    Attributes
    ----------
    find : Callable[[Source], list[Sample]]
        Lists the samples; reads no image.
    layout : str
        What the folder must hold.
    farthest : float
        Known depths beyond it do not count, and other depths beyond it count as it.
    crop : Crop | None
        The part of a photo that counts.
    any_size : bool
        Whether photos may be smaller or larger than their depth, which are compared at the depth's size.
    """

    find: Callable[[Source], list[Sample]]
    layout: str
    farthest: float = math.inf
    crop: Crop | None = None
    any_size: bool = False


def _folder(source: Source) -> list[Sample]:
    samples, alone = [], []
    photos = find_photos(source.path)
    for photo in photos:
        candidates = [photo.with_name(photo.stem + ending) for ending in DEPTH_ENDINGS]
        depth = next((path for path in candidates if path.is_file()), None)
        if depth is None:
            alone.append(photo)
            continue
        if depth.name.endswith(".depth.png") and source.depth_scale is None:
            raise SettingError(
                f"{depth.name}: a PNG of depth needs --depth-scale, the depth of one step "
                "(0.001 for millimeters)."
            )
        samples.append(sample_of(source, photo, depth, partial(truth_of, depth, source.depth_scale)))
    if alone:
        stem = alone[0].stem
        raise SettingError(
            f"{len(alone)} of {len(photos)} photos have no depth file, {alone[0].name} first; "
            f"put {' or '.join(stem + ending for ending in DEPTH_ENDINGS)} beside it."
        )
    return samples


# The 654 test photos of 1449, one bit each, lowest first: testNdxs of its splits.mat, less one.
_NYU_TEST = base64.b64decode(
    "A+ET+P9ngH0AePgHAABw8D0BAAfA/fj//8MPOAAAAAKAwMEfgD/gHPB/AMD8DwCAPxwAPADgB/8A4PMfAAAA+P0/HAdw/P8H"
    "fMADfBgfAD8YhsP4+eEzB/4x+DzAAMD///8HgA8+cAD/Pw4/cAAAAAAOcOB4AAfAc/4BwAcPDnCAY4AZAwD8j//+HnD8x4D/"
    "P37m/IAP/48PPgfA4/8B/PB/5w8GAM8PHA+YAYB//sE/8OAB/wE="
)
_NYU_FOCAL = (518.857901 + 519.469611) / 2  # of the toolbox's camera_params.m, color camera
_NYU_MAT = "nyu_depth_v2_labeled.mat"
_EIGEN_NYU = Crop(45 / 480, 471 / 480, 41 / 640, 601 / 640)


def nyu_test_indices(count: int) -> list[int]:
    """Indices of the test photos, from 0, among the first ``count`` of the labeled data set."""
    bits = np.unpackbits(np.frombuffer(_NYU_TEST, np.uint8), bitorder="little")
    return [int(index) for index in np.flatnonzero(bits[:count])]


def _nyu(source: Source, depths: str = "depths") -> list[Sample]:
    mat = source.path / _NYU_MAT if source.path.is_dir() else source.path
    if mat.is_file():
        return _nyu_mat(mat, depths)
    samples = []
    for depth in files_below(source.path, "sync_depth_*.png"):
        stem = depth.stem.replace("sync_depth_", "rgb_")
        photo = existing(source, *(depth.with_name(stem + ending) for ending in (".jpg", ".png")))
        read = partial(truth_of, depth, 1 / 1000)
        samples.append(replace(sample_of(source, photo, depth, read), focal_px=_NYU_FOCAL))
    return samples


def _nyu_mat(mat: Path, depths: str) -> list[Sample]:
    if not is_installed("h5py"):
        raise SettingError('h5py is not installed: pip install "da3-export[datasets]".')
    photos = _read_h5(mat, "images")
    if photos.ndim != 4 or photos.shape[0] != _read_h5(mat, depths).shape[0]:
        raise SettingError(f"{mat.name}: 'images' must be [N, 3, W, H] and '{depths}' [N, W, H].")

    def photo(index: int) -> Photo:
        return Photo(np.ascontiguousarray(_read_h5(mat, "images", index).T), None)

    def truth(index: int, _: Size) -> Truth:
        return _read_h5(mat, depths, index).T.astype(np.float64)

    return [
        Sample(f"{index:05}", (mat,), partial(photo, index), partial(truth, index), _NYU_FOCAL)
        for index in nyu_test_indices(photos.shape[0])
    ]


def _read_h5(path: Path, name: str, index: int | None = None) -> NDArray[np.generic]:
    """One item of an array of an HDF5 file, or an empty array of the whole array's shape."""
    import h5py

    try:
        with h5py.File(path) as file:
            array = file[name]
            return np.broadcast_to(np.uint8(0), array.shape) if index is None else array[index]
    except (OSError, KeyError, AttributeError):
        raise SettingError(
            f"{path.name} has no readable array '{name}': give the labeled data set's .mat file of "
            "version 7.3 (HDF5)."
        ) from None


_KITTI_NAME = re.compile(r"(\d{4}_\d\d_\d\d_drive_\d{4}_sync)\S*\s*(?:\S*/)?(\d{10})\b")
# Of each day's calib_cam_to_cam.txt: P_rect_02.
_KITTI_FOCAL = {
    "2011_09_26": 721.5377,
    "2011_09_28": 707.0493,
    "2011_09_29": 718.3351,
    "2011_09_30": 707.0912,
    "2011_10_03": 718.856,
}
_GARG_KITTI = Crop(0.40810811, 0.99189189, 0.03594771, 0.96405229)
_EIGEN_KITTI = Crop(0.3324324, 0.91351351, 0.0359477, 0.96405229)


def _kitti(source: Source) -> list[Sample]:
    """Photos that have annotated depth: those of the list, or all."""
    photos = {
        (path.parents[2].name, path.stem): path
        for ending in (".jpg", ".png")
        for path in files_below(source.path, f"image_02/data/*{ending}")
    }
    depths = {
        (path.parents[3].name, path.stem): path
        for path in files_below(source.path, "proj_depth/groundtruth/image_02/*.png")
    }
    keys = sorted(photos.keys() & depths.keys())
    if source.split is not None:
        lines = [line for line in lines_of(source.split) if line.strip()]
        listed = [_KITTI_NAME.search(line) for line in lines]
        keys = [(found[1], found[2]) for found in listed if found is not None]
        if len(keys) != len(lines):
            raise SettingError(
                f"{source.split.name}, line {listed.index(None) + 1}: give a drive such as "
                "2011_09_26_drive_0002_sync and ten digits of a photo."
            )
        for key, line in zip(keys, lines, strict=True):
            if key not in photos:
                raise SettingError(
                    f"{source.split.name} lists a photo that is missing: "
                    f"{key[0]}/image_02/data/{key[1]}.png."
                )
            if key not in depths and "groundtruth" in line:
                raise SettingError(
                    f"{source.split.name} lists depth that is missing: "
                    f"{key[0]}/proj_depth/groundtruth/image_02/{key[1]}.png."
                )
        # 45 of the 697 photos have no annotated depth: a list says None, or names no depth.
        keys = [key for key in keys if key in depths]
    return [
        replace(
            sample_of(source, photos[key], depths[key], partial(truth_of, depths[key], 1 / 256)),
            focal_px=_KITTI_FOCAL.get(key[0][:10]),
        )
        for key in keys
    ]


_DIODE_FOCAL = (886.81 + 927.06) / 2  # of the data set's intrinsics.txt


def _diode(source: Source) -> list[Sample]:
    samples = []
    for depth in files_below(source.path, "*_depth.npy"):
        stem = depth.name.removesuffix("_depth.npy")
        photo = existing(source, depth.with_name(f"{stem}.png"))
        mask = existing(source, depth.with_name(f"{stem}_depth_mask.npy"))
        sample = sample_of(source, photo, depth, partial(_diode_depth, depth, mask))
        samples.append(replace(sample, files=(*sample.files, mask), focal_px=_DIODE_FOCAL))
    return samples


def _diode_depth(path: Path, mask: Path, _: Size) -> Truth:
    depth, valid = (_read_npy(each).squeeze() for each in (path, mask))
    if depth.ndim != 2 or depth.shape != valid.shape:
        raise SettingError(f"{path.name} and {mask.name} must be maps of one size.")
    return np.where(valid > 0, depth, 0).astype(np.float64)


def _read_npy(path: Path) -> NDArray[np.floating]:
    try:
        return np.asarray(np.load(path, allow_pickle=False), np.float64)
    except (OSError, ValueError):
        raise SettingError(f"{path.name} is not an .npy file of numbers.") from None


# Of the data set's page, color camera; other names get its default for ROS.
_TUM_FOCAL = {
    "freiburg1": (517.3 + 516.5) / 2,
    "freiburg2": (520.9 + 521.0) / 2,
    "freiburg3": (535.4 + 539.2) / 2,
}
_TUM_DEFAULT_FOCAL = 525.0
_TUM_APART = 0.02  # seconds between two things that belong together, as in the data set's associate.py


def _tum(source: Source) -> list[Sample]:
    samples = []
    for file in files_below(source.path, "rgb.txt"):
        folder = file.parent
        name = folder.resolve().name
        depths = _Timed.read(existing(source, folder / "depth.txt"))
        track = folder / "groundtruth.txt"
        poses = _Timed.read(track) if track.is_file() else None
        known = (focal for camera, focal in _TUM_FOCAL.items() if camera in name)
        focal = next(known, _TUM_DEFAULT_FOCAL)
        for time, (photo_name, *_) in zip(*_Timed.read(file), strict=True):
            near = depths.nearest(time)
            if near is None:
                continue
            photo, depth = (existing(source, folder / each) for each in (photo_name, near[0]))
            pose = None if poses is None else poses.nearest(time)
            samples.append(
                replace(
                    sample_of(source, photo, depth, partial(truth_of, depth, 1 / 5000)),
                    focal_px=focal,
                    scene=None if pose is None else folder.relative_to(source.path).as_posix(),
                    extrinsics=None if pose is None else _tum_pose(pose),
                )
            )
    return samples


class _Timed(NamedTuple):
    """Lines that begin with a time in seconds, by time, and their other words."""

    times: NDArray[np.float64]
    words: list[list[str]]

    @classmethod
    def read(cls, path: Path) -> _Timed:
        try:
            rows = sorted((float(time), words) for time, *words in rows_of(path) if words)
        except ValueError:
            raise SettingError(f"{path.name}: each line must begin with a time in seconds.") from None
        return cls(np.array([time for time, _ in rows]), [words for _, words in rows])

    def nearest(self, time: float) -> list[str] | None:
        """The words of the line nearest in time; None if none is near enough."""
        after = int(np.searchsorted(self.times, time))
        near = [at for at in (after - 1, after) if 0 <= at < len(self.times)]
        best = min(near, key=lambda at: abs(self.times[at] - time), default=None)
        return None if best is None or abs(self.times[best] - time) > _TUM_APART else self.words[best]


def _tum_pose(words: list[str]) -> NDArray[np.float64]:
    """World to camera [3, 4], from tx ty tz qx qy qz qw of the camera in the world."""
    try:
        x, y, z, *quaternion = map(float, words)
        pose = np.column_stack((rotation(*quaternion), (x, y, z)))
    except (ValueError, TypeError, ZeroDivisionError):
        raise SettingError("groundtruth.txt: a line must be: time tx ty tz qx qy qz qw.") from None
    return np.asarray(inverse(pose[None])[0])


_KITTI_LAYOUT = "DRIVE/image_02/data/*.png and DRIVE/proj_depth/groundtruth/image_02/*.png"
_NYU_LAYOUT = f"{_NYU_MAT}, or rgb_*.jpg or .png with sync_depth_*.png"
DATA_SETS = {
    "folder": DataSet(_folder, f"photos NAME.jpg, each with NAME{', NAME'.join(DEPTH_ENDINGS)}"),
    "nyu": DataSet(_nyu, _NYU_LAYOUT, 10, _EIGEN_NYU),
    "nyu-raw": DataSet(partial(_nyu, depths="rawDepths"), _NYU_LAYOUT, 10, _EIGEN_NYU),
    "kitti": DataSet(_kitti, _KITTI_LAYOUT, 80, _GARG_KITTI),
    "kitti-garg": DataSet(_kitti, _KITTI_LAYOUT, 80, _GARG_KITTI),
    "kitti-eigen": DataSet(_kitti, _KITTI_LAYOUT, 80, _EIGEN_KITTI),
    "eth3d": DataSet(
        eth3d,
        f"SCENE/images/{RAW} or {UNDISTORTED}, and SCENE/ground_truth_depth/{RAW}",
        any_size=True,
    ),
    "diode": DataSet(_diode, "NAME.png, NAME_depth.npy and NAME_depth_mask.npy"),
    "tum": DataSet(_tum, "rgb.txt, depth.txt and, for cameras, groundtruth.txt"),
}


def find_samples(name: str, source: Source) -> tuple[DataSet, list[Sample]]:
    """A data set by its name, and its samples.

    Raises
    ------
    SettingError
        If the name is unknown, an option does not belong to it, or a file is missing.
    """
    if name not in DATA_SETS:
        raise SettingError(f"--dataset {name!r} is not one of: {', '.join(DATA_SETS)}.")
    if source.depth_scale is not None:
        if name != "folder":
            raise SettingError(
                f"--depth-scale: the data set {name} has a scale of its own; leave it out."
            )
        if not 0 < source.depth_scale < math.inf:
            raise SettingError("--depth-scale must be above 0, such as 0.001 for millimeters.")
    if source.split is not None and not name.startswith("kitti"):
        raise SettingError(f"--split is KITTI's; leave it out for {name}.")
    row = DATA_SETS[name]
    if not source.path.exists():
        raise SettingError(f"{source.path} does not exist: give the folder of the data set {name}.")
    samples = row.find(source)
    if not samples:
        raise SettingError(
            f"{str(source.path)!r} is not a folder with photos in it that have known depth. The data "
            f"set {name} needs {row.layout}."
        )
    return row, samples


def read_sample(sample: Sample, row: DataSet, focal_px: float | None = None) -> tuple[Photo, Truth]:
    """A photo and its known depth [H, W], 0 where it does not count.

    Parameters
    ----------
    focal_px : float | None
        Focal length in pixels of the photo, instead of the data set's or EXIF's.

    Raises
    ------
    SettingError
        If a file cannot be read, the sizes differ, or no depth is known.
    """
    photo = sample.photo()
    truth = sample.truth(photo.rgb.shape[:2])
    (height, width), (rows, columns) = photo.rgb.shape[:2], truth.shape
    fits = (rows, columns) == (height, width)
    if not fits and not (row.any_size and abs(width * rows - height * columns) <= max(width, columns)):
        raise SettingError(
            f"{sample.depth_name} is {columns} x {rows} pixels, {Path(sample.name).name} (upright) is "
            f"{width} x {height}: give both in one size."
        )
    counts = is_known(truth)
    if row.farthest < math.inf:
        counts &= (truth > NEAREST) & (truth < row.farthest)
    if row.crop is not None:
        top, bottom = (int(share * rows) for share in row.crop[:2])
        left, right = (int(share * columns) for share in row.crop[2:])
        inside = np.zeros_like(counts)
        inside[top:bottom, left:right] = True
        counts &= inside
    if not counts.any():
        limit = f" below {row.farthest:g} m in the part that counts" if row.crop else ""
        raise SettingError(
            f"{sample.depth_name} has no valid pixel: none is positive and finite{limit}."
        )
    focal = focal_px or (sample.focal_px and sample.focal_px * width / columns) or photo.focal_px
    return photo._replace(focal_px=focal), np.where(counts, truth, 0.0)
