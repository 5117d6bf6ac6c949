"""Errors of depth and of cameras, against their definitions written with Python's own numbers."""

import math
import statistics
from itertools import combinations

import numpy as np
import pytest

from da3_export.accuracy.metrics import Alignment, accuracy, fit, pose_auc, pose_errors

TRUTH = np.array([[1, 2, 4, 8, np.inf, 0, -1, np.nan]])


def test_accuracy_by_hand():
    depth = np.array([[3, 6, 12, 24, 1, 1, 1, 1]], np.float32)
    assert accuracy(depth, TRUTH) == (0, 0, 0, 1, 1, 1, 0)
    as_is = accuracy(depth, TRUTH, Alignment.NONE)
    assert as_is.abs_rel == pytest.approx(2)
    assert as_is.delta3 == 0
    assert as_is.rmse == pytest.approx(np.sqrt((4 + 16 + 64 + 256) / 4))
    assert as_is.log10 == pytest.approx(math.log10(3))
    assert as_is.silog == pytest.approx(0, abs=1e-5)
    got = accuracy(np.array([[1, 2, 4, 16, 1, 1, 1, 1]], np.float32), TRUTH)
    assert got.abs_rel == pytest.approx(0.25)
    assert (got.delta1, got.delta2, got.delta3) == (0.75, 0.75, 0.75)
    assert got.rmse == pytest.approx(4)
    assert got.silog == pytest.approx(100 * math.log(2) * math.sqrt(3) / 4)


def by_definition(depth, truth, alignment, farthest):
    """The same errors, pixel by pixel, with Python's floats."""
    pairs = [
        (float(d), float(t))
        for d, t in zip(depth.ravel(), truth.ravel(), strict=True)
        if math.isfinite(t) and t > 0
    ]
    scale, shift = 1.0, 0.0
    if alignment == "median":
        scale = statistics.median(t for _, t in pairs) / statistics.median(d for d, _ in pairs)
    if alignment == "least-squares":  # Cramer's rule for the normal equations
        n, sd, st = len(pairs), sum(d for d, _ in pairs), sum(t for _, t in pairs)
        sdd, sdt = sum(d * d for d, _ in pairs), sum(d * t for d, t in pairs)
        scale = (n * sdt - sd * st) / (n * sdd - sd * sd)
        shift = (sdd * st - sd * sdt) / (n * sdd - sd * sd)
    sums = [0.0] * 6
    logs = []
    for d, t in pairs:
        d = min(max(d * scale + shift, 0.001), farthest)
        logs.append(math.log(d) - math.log(t))
        sums[0] += abs(d - t) / t
        sums[1] += (d - t) ** 2
        sums[2] += abs(math.log10(d) - math.log10(t))
        for power in (1, 2, 3):
            sums[2 + power] += d < 1.25**power * t and t < 1.25**power * d
    abs_rel, square, log10, *deltas = (each / len(pairs) for each in sums)
    mean_square = sum(e * e for e in logs) / len(logs)
    return (
        abs_rel,
        math.sqrt(square),
        log10,
        *deltas,
        100 * math.sqrt(mean_square - (sum(logs) / len(logs)) ** 2),
    )


@pytest.mark.parametrize("alignment", list(Alignment))
@pytest.mark.parametrize("farthest", [np.inf, 10.0])
def test_accuracy_follows_the_definitions(alignment, farthest):
    rng = np.random.default_rng(1)
    truth = rng.uniform(0.5, 12, (7, 9))
    truth[rng.random(truth.shape) < 0.2] = 0
    depth = np.abs(0.4 * truth + rng.normal(0, 0.8, truth.shape) + 0.1).astype(np.float32)
    assert accuracy(depth, truth, alignment, farthest) == pytest.approx(
        by_definition(depth, truth, alignment.value, farthest), rel=1e-6
    )


def test_least_squares_finds_scale_and_shift_in_depth():
    depth = np.array([[1.0, 2.0, 5.0]])
    assert fit(depth, 3 * depth + 0.5, Alignment.LEAST_SQUARES) == pytest.approx((3, 0.5))
    assert accuracy(depth, 3 * depth + 0.5, Alignment.LEAST_SQUARES).abs_rel == pytest.approx(0)
    assert fit(np.ones((1, 3)), depth, Alignment.LEAST_SQUARES) == pytest.approx((0, 8 / 3))


def test_depth_that_a_fit_makes_negative_counts_as_nearest():
    depth, truth = np.array([[1.0, 2.0, 3.0, 10.0]]), np.array([[1.0, 1.0, 1.0, 40.0]])
    scale, shift = fit(depth, truth, Alignment.LEAST_SQUARES)
    assert scale + shift < 0
    errors = accuracy(depth, truth, Alignment.LEAST_SQUARES)
    assert np.isfinite(errors).all()
    assert errors.log10 >= math.log10(1 / 0.001) / 4


def turned(vector, quaternion):
    """A vector turned by a unit quaternion (w, x, y, z), in Python's floats."""
    w, *axis = quaternion
    cross = lambda a, b: [a[i - 2] * b[i - 1] - a[i - 1] * b[i - 2] for i in range(3)]  # noqa: E731
    first = cross(axis, vector)
    second = cross(axis, first)
    return [v + 2 * (w * f + s) for v, f, s in zip(vector, first, second, strict=True)]


def random_cameras(rng, count):
    """Unit quaternions, positions, and the same cameras as world to camera [S, 3, 4]."""
    quaternions = rng.normal(size=(count, 4))
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    positions = rng.normal(size=(count, 3))
    matrices = np.zeros((count, 3, 4))
    for index, (quaternion, position) in enumerate(zip(quaternions, positions, strict=True)):
        matrices[index, :, :3] = np.transpose([turned(e, quaternion) for e in np.eye(3)])
        matrices[index, :, 3] = -matrices[index, :, :3] @ position
    return quaternions.tolist(), positions.tolist(), matrices


def angle_between(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return math.degrees(math.acos(max(-1.0, min(1.0, dot / math.hypot(*a) / math.hypot(*b)))))


def product(a, b):
    """A times b, quaternions (w, x, y, z)."""
    (p, *u), (q, *v) = a, b
    cross = [u[i - 2] * v[i - 1] - u[i - 1] * v[i - 2] for i in range(3)]
    dot = sum(x * y for x, y in zip(u, v, strict=True))
    return [p * q - dot, *(p * y + q * x + c for x, y, c in zip(u, v, cross, strict=True))]


def test_pose_errors_follow_the_definition():
    rng = np.random.default_rng(2)
    found, truth = (random_cameras(rng, 4) for _ in range(2))
    wanted = []
    for i, j in combinations(range(4), 2):
        turns, ways = [], []
        for quaternions, positions, _ in (found, truth):
            w, x, y, z = quaternions[i]
            turns.append(product(quaternions[j], (w, -x, -y, -z)))
            between = [a - b for a, b in zip(positions[i], positions[j], strict=True)]
            ways.append(turned(between, quaternions[j]))
        (w, x, y, z), other = turns
        apart = product((w, -x, -y, -z), other)
        rotation = math.degrees(2 * math.acos(min(1.0, abs(apart[0]))))
        wanted.append(max(rotation, angle_between(*ways)))
    assert pose_errors(found[2], truth[2]) == pytest.approx(wanted, abs=1e-6)


def test_pose_errors_by_hand():
    still = np.tile(np.eye(3, 4), (2, 1, 1))
    still[1, 0, 3] = 1
    angle = math.radians(10)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moved, rotated = still.copy(), still.copy()
    moved[1, :2, 3] = 7 * turn @ (1, 0)  # the length does not count
    rotated[1, :2, :2] = turn
    assert pose_errors(moved, still) == pytest.approx([10])
    assert pose_errors(rotated, still) == pytest.approx([10])
    assert pose_errors(still, still) == pytest.approx([0])
    assert pose_errors(rotated, rotated * [1, 1, 1, 0]) == pytest.approx([0])  # no true direction
    back = still.copy()
    back[1, 0, 3] = -1
    assert pose_errors(back, still) == pytest.approx([180])


def test_the_auc_is_the_area_under_the_recall_curve():
    assert pose_auc([0, 2.5, 10], 5) == pytest.approx(0.5)
    assert pose_auc([0, 0], 5) == 1
    assert pose_auc([90, 5], 5) == 0
    errors = np.random.default_rng(4).uniform(0, 40, 30).tolist()
    steps = 100_000
    area = sum(
        sum(error <= (step + 0.5) / steps * 15 for error in errors) for step in range(0, steps, 50)
    )
    assert pose_auc(errors, 15) == pytest.approx(area / 30 / (steps / 50), abs=1e-3)
