"""Cameras of a film -> a text file of poses, in the format of the TUM RGB-D benchmark."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from da3_runtime.postprocess.poses import inverse, quaternion


def tum(seconds: Sequence[float], extrinsics: NDArray[np.floating], unit: str) -> str:
    """One line for each camera: seconds, its center x y z, its rotation as a quaternion x y z w.

    The pose is camera to world, with x right, y down and z forward. Source: the benchmark's page "File
    Formats" (Sturm et al. 2012).

    Parameters
    ----------
    extrinsics : NDArray[np.floating]
        [N, 3, 4], world to camera.
    unit : str
        Unit of the centers, noted in the first line.
    """
    lines = [f"# timestamp tx ty tz qx qy qz qw; unit {unit}; x right, y down, z forward"]
    for time, pose in zip(seconds, inverse(extrinsics), strict=True):
        numbers = (*pose[:, 3], *quaternion(pose[:, :3]))
        lines.append(" ".join([f"{time:.6f}", *(f"{number:.9g}" for number in numbers)]))
    return "\n".join(lines) + "\n"
