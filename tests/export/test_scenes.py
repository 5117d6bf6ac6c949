"""Rendered scenes: exact depth, and the same scene whenever it is asked for."""

import numpy as np
import pytest

from tools.nano import scenes
from tools.nano.scenes import Solid, Surface, World, render


def surface():
    return Surface(np.ones((2, 3), np.float32), "plain", 1.0, 0.0)


def solid(kind, center, half, yaw=0.0):
    return Solid(kind, np.asarray(center, np.float32), np.asarray(half, np.float32), yaw, surface())


def cast(*solids, rays):
    rays = np.asarray(rays, np.float32)
    return scenes._cast(list(solids), np.zeros(3, np.float32), rays)


FORWARD = [[0, 0, 1]]


@pytest.mark.parametrize(
    ("shape", "ray", "distance"),
    [
        (solid("sphere", (0, 0, 5), (2, 2, 2)), (0, 0, 1), 3),
        (solid("sphere", (0, 0, 5), (2, 2, 2)), (0.5, 0, 1), np.inf),
        (solid("box", (0, 0, 5), (1, 1, 2)), (0, 0, 1), 3),
        (solid("box", (0, 0, 5), (1, 1, 1), np.pi / 4), (0, 0, 1), 5 - np.sqrt(2)),
        (solid("box", (3, 0, 5), (1, 1, 1)), (0, 0, 1), np.inf),
        (solid("box", (0, 0, -5), (1, 1, 1)), (0, 0, 1), np.inf),
        (solid("pillar", (0, 0, 5), (1, 3, 1)), (0, 0, 1), 4),
        (solid("pillar", (0, 3, 5), (1, 1, 1)), (0, 0.41, 1), 2 / 0.41),  # its lid
        (solid("pillar", (0, 5, 5), (1, 1, 1)), (0, 0, 1), np.inf),
        (solid("plane", (0, 2, 0), (0, 0, 0)), (0, 0.5, 1), 4),
        (solid("plane", (0, 2, 0), (0, 0, 0)), (0, -0.5, 1), np.inf),
        (solid("room", (1, 0, 0), (3, 2, 6)), (0, 0, 1), 6),
        (solid("room", (1, 0, 0), (3, 2, 6)), (1, 0, 1), 4),
    ],
)
def test_depth_is_where_the_ray_meets_the_object(shape, ray, distance):
    got, owner = cast(shape, rays=[ray])
    assert got[0] == pytest.approx(distance, rel=1e-5)
    assert owner[0] == (-1 if np.isinf(distance) else 0)


def test_the_nearest_object_is_seen():
    far, near = solid("box", (0, 0, 9), (1, 1, 1)), solid("sphere", (0, 0, 5), (1, 1, 1))
    for order, wanted in (((far, near), 1), ((near, far), 0)):
        distance, owner = cast(*order, rays=FORWARD)
        assert (distance[0], owner[0]) == (4, wanted)


def test_a_shadow_falls_away_from_the_light_and_the_sun_lights_the_top():
    floor, block = solid("plane", (0, 1, 0), (0, 0, 0)), solid("box", (0, 0.5, 4), (0.5, 0.5, 0.5))
    sun = np.array([-1, -1, 0], np.float32) / np.sqrt(2)  # from the left, above
    white = np.ones(3, np.float32)
    world = World([floor, block], sun, False, 0.2, white, white, 0.0)
    places = np.array([[1, 1, 4], [-1, 1, 4], [0, 0, 4]], np.float32)
    rays = places / places[:, 2:]
    depth, owner = scenes._cast(world.solids, np.zeros(3, np.float32), rays)
    right, left, _ = scenes._shade(world, np.zeros(3, np.float32), rays, depth, owner, 0.001).mean(
        axis=1
    )
    assert right < 0.5 * left


@pytest.mark.parametrize("index", range(8))
def test_a_scene_is_the_same_twice_and_another_at_another_index(index):
    one, two, other = (render(3, i, 84, 112) for i in (index, index, index + 1))
    assert np.array_equal(one.rgb, two.rgb)
    assert np.array_equal(one.depth, two.depth)
    assert not np.array_equal(one.rgb, other.rgb)


def test_scenes_are_varied_and_whole():
    rendered = [render(11, i, 84, 112) for i in range(40)]
    for scene in rendered:
        assert scene.rgb.shape == (84, 112, 3)
        assert scene.rgb.dtype == np.uint8
        assert np.array_equal(scene.sky, np.isinf(scene.depth))
        assert scene.depth.min() > 0
        assert (scene.intrinsics[0, 2], scene.intrinsics[1, 2]) == (56, 42)
    sky = np.array([scene.sky.mean() for scene in rendered])
    assert (sky == 0).any()
    assert (sky > 0.2).any()
    brightness = np.array([scene.rgb.mean() for scene in rendered])
    assert brightness.std() > 15
    near = [np.median(scene.depth[scene.valid]) for scene in rendered if scene.valid.any()]
    assert max(near) > 5 * min(near)


def test_depth_is_along_the_axis_in_the_size_asked_for():
    """The ground's inverse depth is linear in the image whatever the tilt: a plane's is."""
    for index in range(30):
        scene = render(5, index, 84, 112)
        column = 1 / scene.depth[-12:, 56]
        if not scene.sky[-12:].any() and np.ptp(np.diff(column)) < 1e-4 * column.max():
            return
    pytest.fail("no scene has its ground in the lower middle")
