"""Windows of a film are joined by the similarity between their worlds."""

import cv2
import numpy as np
import pytest

from da3_runtime.postprocess.join import (
    IDENTITY,
    Shared,
    between_cameras,
    composed,
    inverted,
    join_windows,
    moved_cameras,
    robust_mean,
    weighted_median,
)
from da3_runtime.postprocess.poses import Similarity, inverse
from tools.nano.scenes import LAYOUTS, render_views

VIEWS = 5


def random_similarity(rng):
    turn = rng.normal(size=3)
    turn *= rng.uniform(0, 3) / np.linalg.norm(turn)
    return Similarity(cv2.Rodrigues(turn)[0], 3 * rng.normal(size=3), np.exp(rng.uniform(-2, 2)))


def rendered(index):
    """Views of a scene of exact geometry; depth is 0 in the sky."""
    scenes = render_views(5, index, VIEWS, 84, 112)
    return Shared(
        np.stack([np.where(scene.sky, np.float32(0), scene.depth) for scene in scenes]),
        None,
        np.stack([scene.intrinsics for scene in scenes]),
        np.stack([scene.extrinsics for scene in scenes]),
    )


def seen_from(shared, place):
    """The same frames in a world from which ``place`` leads to theirs, in 32 bits as a network's."""
    back = inverted(place)
    return shared._replace(
        depth=shared.depth * np.float32(back.scale),
        extrinsics=moved_cameras(shared.extrinsics, back).astype(np.float32),
    )


def errors(found, true):
    """Of scale, as a share; of rotation, in radians; of translation, as a share of its length."""
    turn = cv2.Rodrigues(found.rotation.T @ true.rotation)[0]
    moved = np.linalg.norm(found.translation - true.translation) / np.linalg.norm(true.translation)
    return abs(np.log(found.scale / true.scale)), float(np.linalg.norm(turn)), moved


@pytest.mark.parametrize("index", range(2 * len(LAYOUTS)))
def test_a_similarity_between_exact_windows_is_found(index):
    earlier, true = rendered(index), random_similarity(np.random.default_rng(index))
    join = join_windows(earlier, seen_from(earlier, true))
    assert max(errors(join.similarity, true)) < 1e-5
    assert join.depth_error < 1e-6
    assert join.center_error < 1e-5
    assert join.rotation_error < 1e-3
    assert join.inliers > 0.9


@pytest.mark.parametrize("index", range(2 * len(LAYOUTS)))
def test_a_fifth_of_wrong_pixels_and_cameras_changes_little(index):
    rng = np.random.default_rng(index)
    earlier, true = rendered(index), random_similarity(rng)
    later = seen_from(earlier, true)
    noise = np.exp(rng.normal(0, 0.002, later.depth.shape))
    is_wrong = rng.random(later.depth.shape) < 0.2
    noise[is_wrong] *= np.exp(rng.uniform(0.1, 2, is_wrong.sum()))  # all wrong in one direction
    cameras = later.extrinsics.copy()
    cameras[1] = moved_cameras(cameras[1:2], random_similarity(rng))[0]
    depth = (later.depth * noise).astype(np.float32)
    join = join_windows(earlier, later._replace(depth=depth, extrinsics=cameras))
    assert max(errors(join.similarity, true)) < 1e-2
    assert 0.7 < join.inliers < 0.9


def test_pixels_without_weight_take_no_part():
    earlier, true = rendered(0), random_similarity(np.random.default_rng(0))
    later = seen_from(earlier, true)
    depth, weight = later.depth.copy(), np.ones_like(later.depth)
    depth[:, :70], weight[:, :70] = 7, 0
    join = join_windows(earlier, later._replace(depth=depth, weight=weight))
    assert max(errors(join.similarity, true)) < 1e-5


def test_the_errors_of_a_join_are_those_of_its_windows():
    rng = np.random.default_rng(0)
    earlier = rendered(0)
    turned = moved_cameras(earlier.extrinsics, IDENTITY)
    for index in range(VIEWS):
        turned[index] = cv2.Rodrigues(rng.normal(0, np.radians(1), 3))[0] @ turned[index]
    depth = earlier.depth * np.exp(rng.normal(0, 0.05, earlier.depth.shape)).astype(np.float32)
    join = join_windows(earlier, earlier._replace(depth=depth, extrinsics=turned))
    # Half of what is normal lies within 0.6745 standard deviations.
    assert join.depth_error == pytest.approx(0.6745 * 0.05, rel=0.1)
    assert 0.5 < join.rotation_error < 4


def test_frames_of_sky_are_joined_by_their_cameras():
    earlier, true = rendered(0), random_similarity(np.random.default_rng(0))._replace(scale=1.0)
    sky = np.zeros_like(earlier.depth)
    join = join_windows(earlier._replace(weight=sky), seen_from(earlier, true))
    assert join.inliers == 0
    assert max(errors(join.similarity, true)) < 1e-5


def test_similarities_compose_and_move_cameras():
    rng = np.random.default_rng(0)
    one, other = random_similarity(rng), random_similarity(rng)
    points = rng.normal(size=(9, 3))
    np.testing.assert_allclose(composed(one, other).of(points), one.of(other.of(points)))
    np.testing.assert_allclose(inverted(one).of(one.of(points)), points)
    cameras = rendered(0).extrinsics.astype(np.float64)
    moved = moved_cameras(cameras, one)
    np.testing.assert_allclose(inverse(moved)[:, :, 3], one.of(inverse(cameras)[:, :, 3]), atol=1e-5)
    # What a camera sees is the same, but for scale.
    before = points @ cameras[0, :, :3].T + cameras[0, :, 3]
    after = one.of(points) @ moved[0, :, :3].T + moved[0, :, 3]
    np.testing.assert_allclose(after, one.scale * before, atol=1e-5)


def test_a_camera_between_two_is_on_the_way_from_one_to_the_other():
    cameras = moved_cameras(rendered(0).extrinsics, IDENTITY)[:2]
    np.testing.assert_allclose(between_cameras(*cameras, 0), cameras[0], atol=1e-6)
    np.testing.assert_allclose(between_cameras(*cameras, 1), cameras[1], atol=1e-6)
    centers = inverse(np.stack([*cameras, between_cameras(*cameras, 0.25)]))[:, :, 3]
    np.testing.assert_allclose(centers[2], 0.75 * centers[0] + 0.25 * centers[1], atol=1e-6)


def test_a_robust_mean_ignores_what_is_far_off():
    rng = np.random.default_rng(0)
    values = rng.normal(2, 0.1, (500, 2))
    values[:150] = 40
    mean, shares = robust_mean(values, np.ones(500))
    np.testing.assert_allclose(mean, 2, atol=0.02)
    assert not shares[:150].any()
    assert weighted_median(np.array([5.0, 1, 9]), np.array([1.0, 1, 0])) == 3
