"""Points -> a binary PLY file."""

from __future__ import annotations

import numpy as np

from da3_runtime.postprocess.points import Cloud

_TYPES = {"f4": "float", "f8": "double", "u1": "uchar"}
# 32 bits are too few where the world's origin is this many times as far away as most of the points.
_FAR = 100.0


def ply(cloud: Cloud, unit: str) -> bytes:
    """A binary PLY file: x, y, z, red, green, blue and, if the model predicts it, confidence.

    Positions are in the world of the extrinsics, in ``unit``: float, or double far from its origin.
    """
    is_far = np.abs(cloud.origin).max() > _FAR * np.median(np.abs(cloud.xyz).max(axis=1))
    fields = [(name, "<f8" if is_far else "<f4") for name in ("x", "y", "z")]
    fields += [(name, "u1") for name in ("red", "green", "blue")]
    if cloud.confidence is not None:
        fields.append(("confidence", "<f4"))
    vertices = np.empty(len(cloud.xyz), dtype=fields)
    for axis, name in enumerate(("x", "y", "z")):
        vertices[name] = cloud.xyz[:, axis] + cloud.origin[axis]
    for channel, name in enumerate(("red", "green", "blue")):
        vertices[name] = cloud.colors[:, channel]
    if cloud.confidence is not None:
        vertices["confidence"] = cloud.confidence
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment unit {unit}; x right, y down, z forward",
        f"element vertex {len(vertices)}",
        *(f"property {_TYPES[kind.removeprefix('<')]} {name}" for name, kind in fields),
        "end_header\n",
    ]
    return b"".join(("\n".join(header).encode(), vertices.view(np.uint8).data))
