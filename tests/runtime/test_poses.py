"""Known cameras: their encodings are upstream's, and the depth gets their unit."""

import cv2
import numpy as np
import pytest
import torch

from da3_runtime.errors import SettingError
from da3_runtime.postprocess.camera import Camera
from da3_runtime.postprocess.depth import Depth, Prediction
from da3_runtime.postprocess.poses import (
    NEAR_CAMERAS,
    NO_SCALE,
    check_known,
    encode_poses,
    inverse,
    normalized,
    relative_to,
    scale_between,
    with_known_cameras,
)
from da3_runtime.variants import Unit


def cameras(count, seed=0, apart=3.0, turn=1.5):
    rng = np.random.default_rng(seed)
    turns = [cv2.Rodrigues(rng.normal(0, turn, 3))[0] for _ in range(count)]
    return np.concatenate((np.stack(turns), rng.normal(0, apart, (count, 3, 1))), axis=2)


def moved(extrinsics, scale, seed=1):
    """The same cameras in another world: turned, moved, and in another unit."""
    rng = np.random.default_rng(seed)
    turn, shift = cv2.Rodrigues(rng.normal(0, 1, 3))[0], rng.normal(0, 5, 3)
    poses = inverse(extrinsics)
    rotation = turn @ poses[:, :, :3]
    center = scale * poses[:, :, 3] @ turn.T + shift
    return inverse(np.concatenate((rotation, center[:, :, None]), axis=2))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("apart", [3.0, 0.01])
def test_encodings_are_those_of_upstreams_own_steps(count, apart):
    from depth_anything_3.model.utils.transform import extri_intri_to_pose_encoding
    from depth_anything_3.utils.geometry import affine_inverse

    extrinsics = cameras(count, apart=apart)
    lens = np.tile([[300.0, 0, 120], [0, 310, 80], [0, 0, 1]], (count, 1, 1))
    square = np.tile(np.eye(4), (count, 1, 1))
    square[:, :3] = extrinsics
    relative = torch.tensor(square)[None] @ affine_inverse(torch.tensor(square)[None, :1])
    distance = torch.median(affine_inverse(relative)[..., :3, 3].norm(dim=-1)).clamp(min=0.1)
    relative[..., :3, 3] /= distance
    theirs = extri_intri_to_pose_encoding(affine_inverse(relative), torch.tensor(lens)[None], (168, 252))
    ours = encode_poses(normalized(extrinsics), lens, 168, 252)
    np.testing.assert_allclose(ours, theirs[0].numpy(), atol=1e-5)


def test_relative_cameras_keep_their_distances_and_turns():
    extrinsics = cameras(4)
    relative = relative_to(extrinsics, 2)
    np.testing.assert_allclose(relative[2], np.eye(3, 4), atol=1e-12)
    centers, moved_centers = inverse(extrinsics)[:, :, 3], inverse(relative)[:, :, 3]
    for i in range(4):
        wanted = np.linalg.norm(centers[i] - centers[2])
        assert np.linalg.norm(moved_centers[i]) == pytest.approx(wanted)


@pytest.mark.parametrize("count", [2, 3, 6, 10, 15])
@pytest.mark.parametrize("scale", [0.01, 1.0, 40.0])
def test_the_scale_is_found_whatever_the_world_is(count, scale):
    given = cameras(count)
    assert scale_between(given, moved(given, scale)) == pytest.approx(scale)


def test_cameras_in_a_line_have_a_scale():
    given = np.tile(np.eye(3, 4), (4, 1, 1))
    given[:, 0, 3] = (0, 1, 2, 4)
    assert scale_between(given, moved(given, 2.5)) == pytest.approx(2.5)


def test_from_ten_views_on_a_bad_camera_does_not_change_the_scale():
    given = cameras(12)
    predicted = moved(given, 2.0)
    predicted[3, :, 3] += 60
    assert scale_between(given, predicted) == pytest.approx(2.0)
    assert abs(scale_between(given[:9], predicted[:9]) - 2.0) > 0.1


def test_from_ten_views_on_the_sampling_is_upstreams():
    """The value of upstream's align_poses_umeyama (depth-anything-3 0.1.1, evo 1.38) on the same."""
    given = cameras(12, seed=5)
    predicted = moved(given, 2.0)
    predicted[:, :, 3] += np.random.default_rng(9).normal(0, 0.4, (12, 3))
    assert scale_between(given, predicted) == pytest.approx(1.98709500826874, rel=1e-9)


def view(depth=4.0, extrinsics=None):
    camera = Camera(np.eye(3, dtype=np.float32), np.float32(extrinsics))
    values = np.full((2, 3), depth, np.float32)
    return Prediction(Depth(values, Unit.RELATIVE), camera, {}, "predicted", ["before"])


def test_the_depth_gets_the_unit_of_the_given_cameras_and_the_cameras_are_returned():
    given = cameras(3)
    known = [Camera(np.float32(np.diag([50, 50, 1])), np.float32(pose)) for pose in given]
    views = with_known_cameras([view(4.0, pose) for pose in moved(given, 0.5)], known)
    for each, camera in zip(views, known, strict=True):
        np.testing.assert_allclose(each.depth.values, 8.0, rtol=1e-5)
        assert each.depth.unit is Unit.CAMERAS
        assert each.camera is camera
        assert (each.focal_source, each.warnings) == (None, ["before"])


def test_a_network_that_sees_no_motion_keeps_its_own_cameras_and_says_so():
    still = [view(4.0, np.eye(3, 4)) for _ in range(3)]
    known = [Camera(np.eye(3, dtype=np.float32), np.float32(pose)) for pose in cameras(3)]
    for each in with_known_cameras(still, known):
        assert (each.depth.unit, each.warnings) == (Unit.RELATIVE, ["before", NO_SCALE])
        np.testing.assert_array_equal(each.camera.extrinsics, np.eye(3, 4))


@pytest.mark.parametrize(
    ("extrinsics", "message"),
    [
        (cameras(1), "extrinsics of one photo give no scale"),
        (cameras(3) * [1, 1, 1.2, 1], "extrinsics of photo 0 must be"),
        (cameras(3) * [1, 1, -1, 1], "a rotation matrix"),
        (np.tile(cameras(1), (3, 1, 1)), "all cameras at one place"),
    ],
    ids=["one", "stretched", "mirrored", "at one place"],
)
def test_cameras_that_give_no_scale_are_refused(extrinsics, message):
    with pytest.raises(SettingError, match=message):
        check_known(extrinsics)


def test_cameras_in_a_large_unit_get_a_warning():
    assert check_known(cameras(3)) == []
    assert check_known(cameras(3, apart=0.01)) == [NEAR_CAMERAS]
