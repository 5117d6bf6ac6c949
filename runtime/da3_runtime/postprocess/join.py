"""Two overlapping windows of a film -> the similarity between their worlds.

The network sees a long film in windows. Each has a world of its own: other axes, another origin,
another scale. The frames that two windows share have a depth and a camera in both, which determine the
similarity x -> s R x + t from the later world to the earlier one:

- s: the ratio of the two depths of a pixel is s wherever neither is wrong;
- R: each shared camera gives one rotation, camera to the earlier world times later world to camera;
- t: each shared camera's center gives one translation, and so does each pixel's point.

Every one of them is a mean of many observations, some of which are wrong. It is found by iteratively
reweighted least squares with Tukey's biweight (Beaton and Tukey 1974; constant 4.685 as in Holland and
Welsch 1977), from a median as start, which is right as long as fewer than half are wrong.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from da3_runtime.postprocess.poses import Floats, Similarity, inverse

_TUKEY = 4.685  # times the standard deviation: 95 % efficient where errors are normal
_MEDIAN_TO_DEVIATION = 1 / 0.6745
_ROUNDS = 50
# A step this small beside the width of the biweight is the last one.
_CONVERGED = 1e-4
_LEAST_TURN = 1e-9  # radians
_PIXELS = 2048  # of each shared frame that are compared
_FEWEST_PIXELS = 16
IDENTITY = Similarity(np.eye(3), np.zeros(3), 1.0)


class Shared(NamedTuple):
    """The shared frames as one window sees them.

    Attributes
    ----------
    depth : NDArray[np.float32]
        [K, h, w], in the window's unit.
    weight : NDArray[np.floating] | None
        [K, h, w], how far each depth counts: confidence, 0 for sky. None if all count alike.
    intrinsics, extrinsics : NDArray[np.floating]
        [K, 3, 3] in pixels of the depth; [K, 3, 4], world to camera.
    """

    depth: NDArray[np.float32]
    weight: NDArray[np.floating] | None
    intrinsics: NDArray[np.floating]
    extrinsics: NDArray[np.floating]


class Join(NamedTuple):
    """How two windows fit together.

    Attributes
    ----------
    similarity : Similarity
        From the later window's world to the earlier one's.
    depth_error : float
        Weighted median over the shared pixels of |log(depth / other depth)|, scale removed: 0.01 means
        that the two depths of a pixel differ by 1 %.
    rotation_error : float
        Median over the shared frames of the angle between the two rotations of a camera, in degrees.
    center_error : float
        Median distance between the two centers of a camera, as a share of the median depth.
    inliers : float
        Share of the weight of the shared pixels that took part in the scale, 0 to 1.
    """

    similarity: Similarity
    depth_error: float
    rotation_error: float
    center_error: float
    inliers: float


def join_windows(earlier: Shared, later: Shared) -> Join:
    """The similarity from the later window's world to the earlier one's, and how well it fits.

    Where hardly any pixel counts, such as in frames of sky, the scale is 1 and the cameras alone give
    the rest; ``inliers`` is 0 then.
    """
    frames, height, width = earlier.depth.shape
    step = max(1, math.isqrt(height * width // _PIXELS))
    rows, columns = np.mgrid[step // 2 : height : step, step // 2 : width : step]
    near, far = (window.depth[:, rows, columns].astype(np.float64) for window in (earlier, later))
    weight = _common_weight(earlier, later, frames, rows, columns)
    weight[(near <= 0) | (far <= 0)] = 0
    counts = weight > 0
    has_pixels = np.count_nonzero(counts) >= _FEWEST_PIXELS
    depth_error, inliers, scale = 0.0, 0.0, 1.0
    kept = np.zeros_like(weight)
    if has_pixels:
        ratios = np.log(near[counts] / far[counts])
        center, shares = robust_mean(ratios[:, None], weight[counts])
        scale, kept[counts] = float(np.exp(center[0])), weight[counts] * shares
        depth_error = weighted_median(np.abs(ratios - center[0]), weight[counts])
        inliers = float(weight[counts][shares > 0].sum() / weight[counts].sum())
    rotation, rotation_error = _rotation(earlier.extrinsics, later.extrinsics)
    centers = [inverse(window.extrinsics)[:, :, 3] for window in (earlier, later)]
    moves = centers[0] - scale * centers[1] @ rotation.T
    observed, weights = [moves], [np.ones(frames)]
    if has_pixels:
        pixels = np.stack([columns + 0.5, rows + 0.5, np.ones_like(rows)], axis=-1)
        points = _points(near, earlier, pixels) - scale * _points(far, later, pixels) @ rotation.T
        # An error of depth grows with depth, and so does that of its point. A frame's points count
        # as much as its camera.
        share = np.where(counts, kept / np.where(counts, near * scale * far, 1), 0)
        share /= np.maximum(share.sum(axis=(1, 2), keepdims=True), 1e-300)
        observed.append(points[counts])
        weights.append(share[counts])
    translation, _ = robust_mean(np.concatenate(observed), np.concatenate(weights))
    apart = np.linalg.norm(moves - translation, axis=1)
    size = weighted_median(near[counts], weight[counts]) if has_pixels else 1.0
    return Join(
        Similarity(rotation, translation, scale),
        depth_error,
        rotation_error,
        float(np.median(apart)) / size,
        inliers,
    )


def _common_weight(
    earlier: Shared, later: Shared, frames: int, rows: NDArray[np.intp], columns: NDArray[np.intp]
) -> Floats:
    """The geometric mean of the two windows' weights, [K, h, w]."""
    weight = np.ones((frames, *rows.shape))
    for window in (earlier, later):
        if window.weight is not None:
            weight *= np.sqrt(window.weight[:, rows, columns].astype(np.float64))
    return weight


def _points(depth: Floats, window: Shared, pixels: NDArray[np.floating]) -> Floats:
    """The points [K, h, w, 3] of a window's pixels in its world: R^T (depth K^-1 [x, y, 1] - t)."""
    poses = inverse(window.extrinsics)
    rays = pixels[None] @ np.swapaxes(np.linalg.inv(window.intrinsics.astype(np.float64)), 1, 2)[:, None]
    turned = (depth[..., None] * rays) @ np.swapaxes(poses[:, None, :, :3], 2, 3)
    return np.asarray(turned + poses[:, None, None, :, 3])


def _rotation(earlier: NDArray[np.floating], later: NDArray[np.floating]) -> tuple[Floats, float]:
    """The mean rotation from the later world to the earlier one, and the median angle from it.

    A robust mean on the tangent space (Hartley et al., Rotation Averaging, 2013, section 5), which
    starts at the observed rotation with the least sum of angles to the others.
    """
    observed = np.swapaxes(earlier[:, :, :3], 1, 2).astype(np.float64) @ later[:, :, :3]
    traces = np.einsum("aij,bij->ab", observed, observed)
    angles = np.arccos(np.clip((traces - 1) / 2, -1, 1))
    mean = _nearest_rotation(observed[int(np.argmin(angles.sum(axis=1)))])
    for _ in range(_ROUNDS):
        steps = np.stack([_vector_of(mean.T @ each) for each in observed])
        step, _ = robust_mean(steps, np.ones(len(steps)))
        mean = mean @ cv2.Rodrigues(step)[0]
        if np.linalg.norm(step) < _LEAST_TURN:
            break
    off = [np.linalg.norm(_vector_of(mean.T @ each)) for each in observed]
    return mean, math.degrees(float(np.median(off)))


def _vector_of(rotation: Floats) -> Floats:
    return np.asarray(cv2.Rodrigues(rotation)[0][:, 0])


def _nearest_rotation(matrix: Floats) -> Floats:
    """The rotation nearest to a matrix that is one but for rounding."""
    u, _, v = np.linalg.svd(matrix)
    return np.asarray(u @ v)


def robust_mean(values: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """The mean of observations, some of which are wrong, and how far each took part.

    Parameters
    ----------
    values : NDArray[np.float64]
        [N, D].
    weights : NDArray[np.float64]
        [N], 0 or more, not all 0.

    Returns
    -------
    tuple[NDArray[np.float64], NDArray[np.float64]]
        [D], and the biweights [N], 0 to 1.
    """
    mean = np.array([weighted_median(column, weights) for column in values.T])
    shares = np.ones(len(values))
    for _ in range(_ROUNDS):
        apart = np.linalg.norm(values - mean, axis=1)
        width = _TUKEY * _MEDIAN_TO_DEVIATION * weighted_median(apart, weights)
        # Rounding of 32-bit inputs is no error.
        width = max(width, 1e-6 * float(np.linalg.norm(mean)), 1e-12)
        shares = np.maximum(1 - (apart / width) ** 2, 0) ** 2
        total = float(weights @ shares)
        if total <= 0:
            return mean, shares
        moved = (weights * shares) @ values / total
        done = np.linalg.norm(moved - mean) <= _CONVERGED * width
        mean = moved
        if done:
            break
    return mean, shares


def weighted_median(values: Floats, weights: Floats) -> float:
    """The middle of values [N] by weight [N]; between two values their mean."""
    order = np.argsort(values)
    sums = np.cumsum(weights[order])
    half = sums[-1] / 2
    low = int(np.searchsorted(sums, half * (1 - 1e-12)))
    high = int(np.searchsorted(sums, half * (1 + 1e-12)))
    return float(values[order[low]] + values[order[min(high, len(values) - 1)]]) / 2


def composed(outer: Similarity, inner: Similarity) -> Similarity:
    """The similarity that applies ``inner`` and then ``outer``."""
    return Similarity(
        outer.rotation @ inner.rotation,
        outer.scale * outer.rotation @ inner.translation + outer.translation,
        outer.scale * inner.scale,
    )


def inverted(similarity: Similarity) -> Similarity:
    """The similarity that undoes another."""
    rotation, scale = similarity.rotation.T, 1 / similarity.scale
    return Similarity(rotation, -scale * rotation @ similarity.translation, scale)


def moved_cameras(extrinsics: NDArray[np.floating], similarity: Similarity) -> Floats:
    """Cameras [S, 3, 4] of a world in the world that ``similarity`` leads to.

    A camera sees the point x at E x + e. In the other world, y = s R x + t, it sees it s times as far:
    s (E x + e) = E R^T y + s e - E R^T t.
    """
    rotation = extrinsics[:, :, :3] @ similarity.rotation.T
    moved = similarity.scale * extrinsics[:, :, 3].astype(np.float64) - rotation @ similarity.translation
    return np.concatenate((rotation, moved[:, :, None]), axis=2)


def between_cameras(one: Floats, other: Floats, share: float) -> Floats:
    """The camera [3, 4] that is ``share`` of the way from one to another: its center and its turn."""
    turn = cv2.Rodrigues(_vector_of(other[:, :3] @ one[:, :3].T) * share)[0]
    rotation = turn @ one[:, :3]
    centers = inverse(np.stack([one, other]))[:, :, 3]
    center = centers[0] + share * (centers[1] - centers[0])
    return np.column_stack([rotation, -rotation @ center])
