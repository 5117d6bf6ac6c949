"""Cameras and lenses: intrinsics and extrinsics, and what resizing an image does to them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

EXIF = "exif"


class Camera(NamedTuple):
    """Intrinsics and pose of one image, predicted by a network or known before it runs.

    Attributes
    ----------
    intrinsics : NDArray[np.float32]
        [3, 3], in pixels of one size of the image.
    extrinsics : NDArray[np.floating]
        [3, 4], world to camera; the translation has the depth's unit. float32, but float64 for a known
        camera, whose world may be as large as a country.
    """

    intrinsics: NDArray[np.float32]
    extrinsics: NDArray[np.floating]

    @property
    def focal(self) -> float:
        """Mean of fx and fy in pixels."""
        return mean_focal(self.intrinsics)

    def as_lists(self) -> dict[str, list[list[float]]]:
        """Both matrices as lists of rows, rounded to six decimal places."""
        return {name: matrix.astype(float).round(6).tolist() for name, matrix in self._asdict().items()}


def mean_focal(intrinsics: NDArray[np.float32]) -> float:
    """Mean of fx and fy of intrinsics [3, 3]."""
    return float(intrinsics[0, 0] + intrinsics[1, 1]) / 2


def resize_intrinsics(
    intrinsics: NDArray[np.float32], factor_x: float, factor_y: float
) -> NDArray[np.float32]:
    """Intrinsics [3, 3] after the image is resized by these factors; (0, 0) is the image's corner."""
    return intrinsics * np.array([[factor_x], [factor_y], [1.0]], dtype=np.float32)


def move_center(intrinsics: NDArray[np.float32], right: float, down: float) -> NDArray[np.float32]:
    """Intrinsics [3, 3] with the principal point moved by these pixels, as cropping an image does."""
    moved = intrinsics.copy()
    moved[:2, 2] += (right, down)
    return moved


def resize_camera(camera: Camera, factor_x: float, factor_y: float) -> Camera:
    """``camera`` after its image is resized by these factors."""
    return camera._replace(intrinsics=resize_intrinsics(camera.intrinsics, factor_x, factor_y))


class Lens(NamedTuple):
    """Intrinsics known before the network runs.

    Attributes
    ----------
    intrinsics : NDArray[np.float32]
        [3, 3], in pixels of one size of the image; (0, 0) is the image's corner.
    source : str
        Their source: the name of a request's field, or :data:`EXIF`.
    """

    intrinsics: NDArray[np.float32]
    source: str

    @property
    def focal(self) -> float:
        """Mean of fx and fy in pixels."""
        return mean_focal(self.intrinsics)

    def resized(self, factor_x: float, factor_y: float) -> Lens:
        """The lens after the image is resized by these factors."""
        return self._replace(intrinsics=resize_intrinsics(self.intrinsics, factor_x, factor_y))

    def moved(self, right: float, down: float) -> Lens:
        """The lens with its principal point moved by these pixels."""
        return self._replace(intrinsics=move_center(self.intrinsics, right, down))

    def camera(self, predicted: Camera | None) -> Camera:
        """The camera with these intrinsics and the predicted pose; without one, the world's axes."""
        pose = np.eye(3, 4, dtype=np.float32) if predicted is None else predicted.extrinsics
        return Camera(self.intrinsics, pose)


def given_lens(
    width: int,
    height: int,
    focal_length_px: float | None = None,
    intrinsics: NDArray[np.float32] | None = None,
) -> Lens | None:
    """The lens that a caller states for a ``width`` x ``height`` image; None if the caller states none.

    The focal length takes precedence over the intrinsics [3, 3]. Both are in pixels of the image.
    """
    if focal_length_px is not None:
        return centered_lens(focal_length_px, width, height, "focal_length_px")
    return None if intrinsics is None else Lens(intrinsics, "intrinsics")


def centered_lens(focal_px: float, width: int, height: int, source: str) -> Lens:
    """A lens with square pixels and the center of a ``width`` x ``height`` image as principal point."""
    rows = [[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1]]
    return Lens(np.array(rows, dtype=np.float32), source)
