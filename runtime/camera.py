"""The camera that a network says took the photo."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Camera(NamedTuple):
    """Lens and pose of one image.

    Attributes
    ----------
    intrinsics : NDArray[np.float32]
        [3, 3], in pixels of one size of the image.
    extrinsics : NDArray[np.float32]
        [3, 4], world to camera; the translation has the depth's unit.
    """

    intrinsics: NDArray[np.float32]
    extrinsics: NDArray[np.float32]

    @property
    def focal(self) -> float:
        """Mean of fx and fy in pixels."""
        return mean_focal(self.intrinsics)

    def as_lists(self) -> dict[str, list[list[float]]]:
        """Its matrices as rows of numbers, to six places."""
        return {name: matrix.astype(float).round(6).tolist() for name, matrix in self._asdict().items()}


def mean_focal(intrinsics: NDArray[np.float32]) -> float:
    """Mean of fx and fy of intrinsics [3, 3]."""
    return float(intrinsics[0, 0] + intrinsics[1, 1]) / 2


def resize_intrinsics(
    intrinsics: NDArray[np.float32], factor_x: float, factor_y: float
) -> NDArray[np.float32]:
    """Intrinsics [3, 3] for the same image resized by these factors; (0, 0) is the image's corner."""
    return intrinsics * np.array([[factor_x], [factor_y], [1.0]], dtype=np.float32)


def resize_camera(camera: Camera, factor_x: float, factor_y: float) -> Camera:
    """``camera`` for the same image resized by these factors."""
    return camera._replace(intrinsics=resize_intrinsics(camera.intrinsics, factor_x, factor_y))
