"""Points and cameras -> COLMAP's binary sparse model, in a ZIP archive.

Source: COLMAP's documentation, "Output Format". Its world and camera axes, its extrinsics (world to
camera) and its pixel centers at + 0.5 are those of this package.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np

from da3_runtime.postprocess.camera import move_center, resize_intrinsics
from da3_runtime.postprocess.depth import Seen
from da3_runtime.postprocess.points import Cloud, camera_of
from da3_runtime.postprocess.poses import quaternion

FOLDER = "sparse/0"
_PINHOLE = 1
_POINT_2D = np.dtype([("x", "<f8"), ("y", "<f8"), ("point", "<i8")])
_POINT_3D = np.dtype(
    [
        ("id", "<u8"),
        ("xyz", "<f8", 3),
        ("rgb", "u1", 3),
        ("error", "<f8"),
        ("track_length", "<u8"),
        ("image", "<i4"),
        ("point_2d", "<i4"),
    ]
)


def colmap(cloud: Cloud, views: Sequence[Seen], names: Sequence[str]) -> bytes:
    """A ZIP archive of ``sparse/0/`` with cameras.bin, images.bin and points3D.bin.

    Cameras and two-dimensional points are in pixels of the whole photos, as their files have them once
    upright. The track of a point is the one pixel that it comes from. A camera's skew, which COLMAP's
    pinhole camera lacks, is left out.

    Parameters
    ----------
    cloud : Cloud
        The points.
    views : Sequence[Seen]
        The photos that they are from.
    names : Sequence[str]
        File name of each photo.
    """
    files = {
        "cameras.bin": _cameras(views),
        "images.bin": _images(cloud, views, names),
        "points3D.bin": _points(cloud),
    }
    stream = io.BytesIO()
    # Deflating numbers such as these takes seconds and saves little.
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, parts in files.items():
            # Part by part, as a whole file has a hundred megabytes.
            with archive.open(zipfile.ZipInfo(f"{FOLDER}/{name}"), "w") as file:
                for part in parts:
                    file.write(part)
    return stream.getvalue()


def _cameras(views: Sequence[Seen]) -> Iterator[bytes | memoryview]:
    yield struct.pack("<Q", len(views))
    for number, view in enumerate(views, 1):
        lens = resize_intrinsics(
            move_center(camera_of(view).intrinsics, view.left, view.top), *view.scale
        )
        yield struct.pack("<iiQQ", number, _PINHOLE, view.width, view.height)
        yield struct.pack("<4d", lens[0, 0], lens[1, 1], lens[0, 2], lens[1, 2])


def _images(cloud: Cloud, views: Sequence[Seen], names: Sequence[str]) -> Iterator[bytes | memoryview]:
    yield struct.pack("<Q", len(views))
    start = 0
    for number, (view, name, count) in enumerate(zip(views, names, cloud.counts, strict=True), 1):
        pose = camera_of(view).extrinsics.astype(np.float64)
        *vector, scalar = quaternion(pose[:, :3])
        yield struct.pack("<i7di", number, scalar, *vector, *pose[:, 3], number)
        yield os.fsencode(name) + b"\0"
        points, corner = np.empty(count, dtype=_POINT_2D), np.array([view.left, view.top])
        pixels = (cloud.pixels[start : start + count] + corner) * view.scale
        points["x"], points["y"] = pixels.T
        points["point"] = np.arange(start + 1, start + count + 1)
        yield struct.pack("<Q", count)
        yield points.view(np.uint8).data
        start += count


def _points(cloud: Cloud) -> Iterator[bytes | memoryview]:
    yield struct.pack("<Q", len(cloud.xyz))
    points = np.empty(len(cloud.xyz), dtype=_POINT_3D)
    points["id"] = np.arange(1, len(points) + 1)
    points["xyz"] = cloud.xyz + cloud.origin
    points["rgb"] = cloud.colors
    points["error"] = 0
    points["track_length"] = 1
    points["image"] = np.repeat(np.arange(1, len(cloud.counts) + 1), cloud.counts)
    points["point_2d"] = np.concatenate([np.arange(count) for count in cloud.counts])
    yield points.view(np.uint8).data
