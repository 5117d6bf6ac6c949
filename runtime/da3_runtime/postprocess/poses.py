"""Known cameras of a scene: their encodings for the network, and the scale that they give its depth.

What upstream does around its network, in NumPy (``_normalize_extrinsics``, ``CameraEnc`` and
``_align_to_input_extrinsics_intrinsics``). Extrinsics are world to camera, [S, 3, 4].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import SettingError
from da3_runtime.network_io import POSE_ENCODING
from da3_runtime.postprocess.camera import Camera
from da3_runtime.postprocess.depth import Depth, Prediction
from da3_runtime.variants import Unit

# Least median distance between the cameras and the first one by which they are divided.
LEAST_MEDIAN = 0.1
# Cameras that are closer together than this share of their distance from the world's origin, or of one,
# stand at one place as far as FP32 can tell.
_ONE_PLACE = 1e-5
# From this many views on, views whose cameras fit badly take no part in the scale (upstream's
# ransac_view_thresh), found with upstream's number of samples and its seed.
RANSAC_VIEWS = 10
_RANSAC_SAMPLES, _RANSAC_SEED = 10, 42

NEAR_CAMERAS = (
    f"The given cameras are less than {LEAST_MEDIAN} apart (median), which the network takes for small "
    "distances: give them in a smaller unit."
)
NO_SCALE = (
    "The network placed all cameras at one point, so the depth could not be brought to the unit of the "
    "given cameras: depth and cameras are the network's own."
)

Floats = NDArray[np.float64]


def inverse(extrinsics: NDArray[np.floating]) -> Floats:
    """Camera to world from world to camera, or the other way round, [S, 3, 4]."""
    rotation = np.swapaxes(extrinsics[:, :, :3], 1, 2).astype(np.float64)
    return np.concatenate((rotation, -rotation @ extrinsics[:, :, 3:]), axis=2)


def relative_to(extrinsics: NDArray[np.floating], index: int) -> Floats:
    """The same cameras in the frame of one of them."""
    to_world = inverse(extrinsics)[index]
    rotation = extrinsics[:, :, :3].astype(np.float64)
    translation = rotation @ to_world[:, 3] + extrinsics[:, :, 3]
    return np.concatenate((rotation @ to_world[:, :3], translation[:, :, None]), axis=2)


def normalized(extrinsics: NDArray[np.floating]) -> Floats:
    """The same cameras as the network takes them: relative to the first, in their median distance.

    The distance is that of the cameras from the first one, which is one of them: of an even number the
    lower middle, and at least :data:`LEAST_MEDIAN`.
    """
    relative = relative_to(extrinsics, 0)
    distances = np.sort(np.linalg.norm(relative[:, :, 3], axis=1))
    relative[:, :, 3] /= max(float(distances[(len(distances) - 1) // 2]), LEAST_MEDIAN)
    return relative


def encode_poses(
    extrinsics: NDArray[np.floating], intrinsics: NDArray[np.floating], height: int, width: int
) -> NDArray[np.float32]:
    """Encodings of known cameras, as the network's input ``poses`` takes them.

    Parameters
    ----------
    extrinsics : NDArray[np.floating]
        [S, 3, 4], :func:`normalized`.
    intrinsics : NDArray[np.floating]
        [S, 3, 3], in pixels of the network's input of ``height`` x ``width``.

    Returns
    -------
    NDArray[np.float32]
        [S, 9]: translation (camera to world), quaternion with the scalar last, vertical and horizontal
        field of view in radians.
    """
    poses = inverse(extrinsics)
    focal = intrinsics[:, (1, 0), (1, 0)]
    encoding = np.empty((len(poses), POSE_ENCODING), np.float32)
    encoding[:, :3] = poses[:, :, 3]
    encoding[:, 3:7] = [quaternion(pose[:, :3]) for pose in poses]
    encoding[:, 7:] = 2 * np.arctan(np.array([height, width]) / 2 / focal)
    return encoding


def quaternion(rotation: Floats) -> Floats:
    """A rotation matrix [3, 3] as a unit quaternion [4] whose scalar, the last number, is 0 or more."""
    vector = cv2.Rodrigues(rotation)[0][:, 0]
    angle = float(np.linalg.norm(vector))
    # np.sinc(x) is sin(pi x) / (pi x): here sin(angle / 2) / angle, also for an angle of zero.
    return np.append(vector * np.sinc(angle / 2 / np.pi) / 2, np.cos(angle / 2))


def rotation(x: float, y: float, z: float, w: float) -> Floats:
    """The rotation matrix [3, 3] of a quaternion of any length; ZeroDivisionError if it has none."""
    s = 2 / (w * w + x * x + y * y + z * z)
    return np.array(
        [
            [1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)],
            [s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)],
            [s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)],
        ]
    )


def check_known(extrinsics: NDArray[np.floating]) -> list[str]:
    """Check that known cameras, [S, 3, 4], can give a scene's depth their unit.

    Returns
    -------
    list[str]
        Warnings.

    Raises
    ------
    SettingError
        If there is only one, one is not a rotation and a translation, or all stand at one place.
    """
    if len(extrinsics) < 2:
        raise SettingError("extrinsics of one photo give no scale: leave them out, or send more photos.")
    rotations = extrinsics[:, :, :3]
    identity = rotations @ np.swapaxes(rotations, 1, 2)
    is_rotation = (np.abs(identity - np.eye(3)).max(axis=(1, 2)) < 0.01) & (np.linalg.det(rotations) > 0)
    if not is_rotation.all():
        raise SettingError(
            f"extrinsics of photo {int(np.argmin(is_rotation))} must be [R | t], world to camera, and R "
            "a rotation matrix."
        )
    centers = inverse(extrinsics)[:, :, 3]
    distances = np.linalg.norm(centers - centers[0], axis=1)
    if distances.max() <= _ONE_PLACE * max(1.0, float(np.abs(centers).max())):
        raise SettingError(
            "extrinsics put all cameras at one place, which gives no scale: leave them out."
        )
    return [NEAR_CAMERAS] if np.sort(distances)[(len(distances) - 1) // 2] < LEAST_MEDIAN else []


def with_known_cameras(predictions: Sequence[Prediction], cameras: Sequence[Camera]) -> list[Prediction]:
    """The predictions of a scene's views with the given cameras, and depth in the cameras' unit.

    Two cameras, or cameras in a line, leave a turn about that line open, but not the scale. So they have
    an answer here, which upstream refuses.

    Parameters
    ----------
    cameras : Sequence[Camera]
        The known camera of each view, intrinsics in pixels of the depth map.
    """
    predicted = [each.camera for each in predictions]
    assert all(camera is not None for camera in predicted)
    found = np.stack([camera.extrinsics for camera in predicted if camera is not None])
    scale = scale_between(np.stack([camera.extrinsics for camera in cameras]), found)
    if scale <= 0:
        return [replace(each, warnings=[*each.warnings, NO_SCALE]) for each in predictions]
    return [
        replace(
            each,
            depth=Depth(each.depth.values / np.float32(scale), Unit.CAMERAS),
            camera=camera,
            focal_source=None,
        )
        for each, camera in zip(predictions, cameras, strict=True)
    ]


def scale_between(given: NDArray[np.floating], predicted: NDArray[np.floating]) -> float:
    """How many units of the ``predicted`` extrinsics one unit of the ``given`` ones is, [S, 3, 4] each.

    0 if the predicted cameras stand at one place. Upstream's ``align_poses_umeyama``.
    """
    source, target = inverse(given)[:, :, 3], inverse(predicted)[:, :, 3]
    fit = _similarity(source, target)
    if len(source) < RANSAC_VIEWS:
        return fit.scale
    # Upstream's threshold: the median distance of a fitted camera from the nearest predicted one.
    apart = np.linalg.norm(fit.of(source)[:, None] - target[None], axis=2)
    threshold = float(np.median(apart.min(axis=1)))
    rng = np.random.default_rng(_RANSAC_SEED)
    best, most, least = np.ones(len(source), bool), -1, np.inf
    for _ in range(_RANSAC_SAMPLES):
        sample = rng.choice(len(source), size=(len(source) + 1) // 2, replace=False)
        fit = _similarity(source[sample], target[sample])
        errors = np.linalg.norm(fit.of(source) - target, axis=1)
        inside = errors <= threshold
        error = float(errors[inside].mean()) if inside.any() else np.inf
        if (inside.sum(), -error) > (most, -least):
            best, most, least, best_fit = inside, int(inside.sum()), error, fit
    return _similarity(source[best], target[best]).scale if most >= 3 else best_fit.scale


class Similarity(NamedTuple):
    """A rotation [3, 3], translation [3] and scale that map points to others."""

    rotation: Floats
    translation: Floats
    scale: float

    def of(self, points: Floats) -> Floats:
        """The mapped points, [N, 3]."""
        return self.scale * points @ self.rotation.T + self.translation


def _similarity(source: Floats, target: Floats) -> Similarity:
    """The least-squares similarity from ``source`` to ``target`` points, [N, 3] (Umeyama 1991)."""
    from_mean, to_mean = source.mean(axis=0), target.mean(axis=0)
    centered = source - from_mean
    u, values, v = np.linalg.svd((target - to_mean).T @ centered / len(source))
    sign = np.array([1.0, 1.0, np.sign(np.linalg.det(u) * np.linalg.det(v))])
    rotation = u * sign @ v
    scale = float(values @ sign / (centered * centered).sum(axis=1).mean())
    return Similarity(rotation, to_mean - scale * rotation @ from_mean, scale)
