"""Points and cameras -> a GLB file, glTF 2.0 in one binary.

glTF's axes are x right, y up and z backward; those of depth and extrinsics are x right, y down and z
forward. The root node turns one into the other, so that below it all numbers are those of the world.
Source: the glTF 2.0 specification of the Khronos Group, sections 3 and 4.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from da3_runtime.postprocess.camera import Camera
from da3_runtime.postprocess.depth import Seen
from da3_runtime.postprocess.points import Cloud, camera_of
from da3_runtime.postprocess.poses import inverse

# Numbers of the specification: types of components and buffers, and modes of primitives.
_UNSIGNED_INT, _FLOAT = 5125, 5126
_VERTICES, _INDICES = 34962, 34963
_POINTS, _LINES = 0, 1
_MAGIC, _JSON, _BIN = 0x46546C67, 0x4E4F534A, 0x004E4942
_TURN = np.diag([1.0, -1.0, -1.0])
# The edges of a camera's pyramid: from its center to the four corners, and around them.
_EDGES = np.array([[0, 1], [0, 2], [0, 3], [0, 4], [1, 2], [2, 3], [3, 4], [4, 1]], dtype=np.uint32)
_CAMERA_SIZE = 0.1  # height of a pyramid, as a share of the points' median distance
_UNLIT = "KHR_materials_unlit"


def glb(cloud: Cloud, views: Sequence[Seen], names: Sequence[str], unit: str, cameras: bool) -> bytes:
    """A GLB file of points, and of a node with a pyramid of lines for each camera.

    Parameters
    ----------
    cloud : Cloud
        The points.
    views : Sequence[Seen]
        The photos that they are from.
    names : Sequence[str]
        Name of each photo, which becomes that of its camera. What is no Unicode becomes a question mark.
    unit : str
        Unit of the numbers, noted in ``extras`` of the root node.
    cameras : bool
        Whether to draw the cameras.
    """
    file = _File()
    points = file.mesh(
        "points",
        {"POSITION": file.positions(cloud.xyz), "COLOR_0": file.colors(cloud.colors)},
        mode=_POINTS,
    )
    nodes: list[dict[str, Any]] = [{"name": "points", "mesh": points}]
    if cameras:
        size = _CAMERA_SIZE * float(np.median(np.linalg.norm(cloud.xyz, axis=1)))
        nodes += [
            _camera_node(file, view, name.encode(errors="replace").decode(), cloud.origin, size)
            for view, name in zip(views, names, strict=True)
        ]
    root = {
        "name": "scene",
        "rotation": [1, 0, 0, 0],  # half a turn around x
        "translation": (_TURN @ cloud.origin).tolist(),
        "children": list(range(1, len(nodes) + 1)),
        "extras": {"unit": unit},
    }
    return file.content([root, *nodes])


class _File:
    """The binary buffer of a GLB file and the tables that refer to it."""

    def __init__(self) -> None:
        self._parts: list[memoryview] = []
        self._tables: dict[str, list[dict[str, Any]]] = {
            name: [] for name in ("bufferViews", "accessors", "meshes", "materials", "cameras")
        }
        self.add("materials", {"name": "unlit", "extensions": {_UNLIT: {}}})

    def add(self, table: str, row: dict[str, Any]) -> int:
        """Add a row to a table; returns its index."""
        self._tables[table].append(row)
        return len(self._tables[table]) - 1

    def positions(self, xyz: NDArray[np.float32]) -> int:
        """An accessor of positions [N, 3]."""
        bounds = {"min": xyz.min(axis=0).tolist(), "max": xyz.max(axis=0).tolist()}
        return self._accessor(xyz, _FLOAT, "VEC3", _VERTICES, **bounds)

    def colors(self, rgb: NDArray[np.uint8]) -> int:
        """An accessor of colors [N, 3].

        The specification wants them linear. Eight bits are too few for dark colors then, and trimesh 5.2
        misreads 16 bits, so they are float.
        """
        return self._accessor(_LINEAR[rgb], _FLOAT, "VEC3", _VERTICES)

    def indices(self, values: NDArray[np.uint32]) -> int:
        """An accessor of indices."""
        return self._accessor(values.ravel(), _UNSIGNED_INT, "SCALAR", _INDICES)

    def _accessor(
        self, values: NDArray[Any], component: int, kind: str, target: int, **more: object
    ) -> int:
        offset = sum(map(len, self._parts))
        self._parts.append(np.ascontiguousarray(values).view(np.uint8).ravel().data)
        view = {"buffer": 0, "byteOffset": offset, "byteLength": values.nbytes, "target": target}
        row = {
            "bufferView": self.add("bufferViews", view),
            "componentType": component,
            "count": len(values),
            "type": kind,
        }
        return self.add("accessors", {**row, **more})

    def mesh(self, name: str, attributes: dict[str, int], mode: int, indices: int | None = None) -> int:
        """A mesh of one primitive."""
        primitive = {"attributes": attributes, "mode": mode, "material": 0}
        if indices is not None:
            primitive["indices"] = indices
        return self.add("meshes", {"name": name, "primitives": [primitive]})

    def content(self, nodes: list[dict[str, Any]]) -> bytes:
        """The bytes of the file, with these nodes, of which the first is the root."""
        size = sum(map(len, self._parts))
        document = {
            "asset": {"version": "2.0", "generator": "da3-runtime"},
            "extensionsUsed": [_UNLIT],
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": nodes,
            **{name: rows for name, rows in self._tables.items() if rows},
            "buffers": [{"byteLength": size}],
        }
        text = json.dumps(document, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 4)
        total = 12 + 8 + len(text) + 8 + size
        return b"".join(
            (
                struct.pack("<III", _MAGIC, 2, total),
                struct.pack("<II", len(text), _JSON),
                text,
                struct.pack("<II", size, _BIN),
                *self._parts,
            )
        )


def _linear_levels() -> NDArray[np.float32]:
    """The linear value, 0 to 1, of each sRGB level (IEC 61966-2-1)."""
    levels = np.arange(256) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return linear.astype(np.float32)


_LINEAR = _linear_levels()


def _camera_node(
    file: _File, view: Seen, name: str, origin: NDArray[np.float64], size: float
) -> dict[str, Any]:
    """A node at a photo's camera, which looks along -z as every camera of glTF, with its lines."""
    camera = camera_of(view)
    height, width = view.image.shape[:2]
    corners = np.array([[0, 0, 1], [width, 0, 1], [width, height, 1], [0, height, 1]], dtype=np.float64)
    rays = corners @ np.linalg.inv(camera.intrinsics.astype(np.float64)).T
    pyramid = np.vstack([np.zeros(3), rays * size]) @ _TURN
    mesh = file.mesh(
        f"camera {name}",
        {"POSITION": file.positions(pyramid.astype(np.float32))},
        mode=_LINES,
        indices=file.indices(_EDGES),
    )
    lens = {"type": "perspective", "perspective": _lens(camera, width, height)}
    pose = np.eye(4)
    to_world = inverse(camera.extrinsics[None])[0]
    pose[:3, :3] = to_world[:, :3] @ _TURN
    pose[:3, 3] = to_world[:, 3] - origin
    return {
        "name": name,
        "camera": file.add("cameras", lens),
        "mesh": mesh,
        "matrix": pose.T.ravel().tolist(),  # column after column
    }


def _lens(camera: Camera, width: int, height: int) -> dict[str, float]:
    """A camera's lens as glTF describes it, which has no principal point."""
    fx, fy = float(camera.intrinsics[0, 0]), float(camera.intrinsics[1, 1])
    return {
        "yfov": 2 * math.atan(height / 2 / fy),
        "aspectRatio": width * fy / (height * fx),
        "znear": 0.01,
    }
