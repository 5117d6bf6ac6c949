"""Rays -> camera: the pose and intrinsics that best explain the any-view model's ray map.

Follows upstream's ``get_extrinsic_from_camray``. Confidence-weighted RANSAC and a weighted refit find a
homography from the image plane to the ray directions. It is split into a rotation and a lower triangular
matrix. (The inverse of an intrinsics matrix is upper triangular, so the split is exact for a principal
point in the center.) Upstream samples with PyTorch's global random state. Here the seed is fixed, so the
same photo gives the same camera, in any batch.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.postprocess.camera import Camera

# Constants of get_params_for_ransac, camray_to_caminfo and compute_optimal_rotation_intrinsics_batch.
ITERATIONS = 100
SAMPLE = 8  # points of one hypothesis
CANDIDATES = 0.3  # share of the points, the most confident ones, that samples are taken from
INLIER_DISTANCE = 0.2
MAX_REFIT = 8000
REFIT_SHARE = 0.95  # of the inliers, the most confident ones, that a refit's points are taken from
MIN_Z = 1e-4
MAX_CONDITION = 1e6  # of a homography; above it the rays are nearly parallel, or in one plane
MIN_INLIERS = 4  # a homography has eight unknowns, a point two equations

_SEED = 0

Array = NDArray[np.float64]


class Samples(NamedTuple):
    """The random choices of one estimate.

    Attributes
    ----------
    hypotheses : NDArray[np.int64]
        [iterations, SAMPLE], positions among the candidates, which are in the order of the map.
    refit : NDArray[np.int64]
        A permutation of at least as many numbers as a refit has inliers to choose from.
    """

    hypotheses: NDArray[np.int64]
    refit: NDArray[np.int64]


@functools.lru_cache(maxsize=8)
def seeded_samples(points: int) -> Samples:
    """The samples for ray maps of ``points`` points; equal in every call."""
    generator = np.random.default_rng(_SEED)
    count = candidate_count(points)
    rows = [generator.choice(count, SAMPLE, replace=False) for _ in range(ITERATIONS)]
    samples = Samples(np.stack(rows), generator.permutation(points))
    for array in samples:
        array.setflags(write=False)
    return samples


def candidate_count(points: int) -> int:
    """How many of ``points`` points, the most confident ones, may enter a hypothesis."""
    return max(SAMPLE, int(points * CANDIDATES))


def cameras_from_rays(
    rays: NDArray[np.float32],
    confidence: NDArray[np.float32],
    width: int,
    height: int,
    samples: Samples | None = None,
) -> list[Camera | None]:
    """The cameras of a batch of images.

    Parameters
    ----------
    rays : NDArray[np.float32]
        [B, h, w, 6]: direction, then origin.
    confidence : NDArray[np.float32]
        [B, h, w], 0 or more.
    width, height : int
        Size in pixels of the images; the intrinsics are in these pixels.
    samples : Samples | None
        Random choices for every image; None for :func:`seeded_samples`.

    Returns
    -------
    list[Camera | None]
        One for each image; None if its rays determine no camera.
    """
    samples = samples or seeded_samples(confidence[0].size)
    return [_camera(*image, width, height, samples) for image in zip(rays, confidence, strict=True)]


def _camera(
    rays: NDArray[np.float32],
    confidence: NDArray[np.float32],
    width: int,
    height: int,
    samples: Samples,
) -> Camera | None:
    rows, columns = confidence.shape
    plane = image_plane(rows, columns)
    directions = rays[..., :3].reshape(-1, 3)
    usable = np.abs(directions[:, 2]) > MIN_Z
    weights = np.where(usable, confidence.reshape(-1), 0).astype(np.float32)
    total = float(weights.sum(dtype=np.float64))
    if np.count_nonzero(weights) < candidate_count(weights.size) or not np.isfinite(total):
        return None
    # Unusable points keep their direction undivided, as in upstream; their weight is zero.
    z = np.where(usable, directions[:, 2], 1).astype(np.float32)
    target = directions[:, :2] / z[:, None]
    try:
        homography = _ransac(plane, target, weights, samples)
        if homography is None:
            return None
        rotation, lens = split(homography)
    except np.linalg.LinAlgError:
        return None
    origin = weights.astype(np.float64) @ rays[..., 3:].reshape(-1, 3) / total
    with np.errstate(divide="ignore", invalid="ignore"):
        lens /= lens[2, 2]
        # On a plane two units wide and high around the center.
        focal = 1 / lens[(0, 1), (0, 1)]
    half = np.array([width, height]) / 2
    intrinsics = np.eye(3)
    intrinsics[(0, 1), (0, 1)] = focal * half
    intrinsics[:2, 2] = (lens[2, :2] + 1) * half
    extrinsics = np.column_stack((rotation.T, -rotation.T @ origin))
    if not (np.isfinite(intrinsics).all() and np.isfinite(extrinsics).all() and (focal > 0).all()):
        return None
    return Camera(intrinsics.astype(np.float32), extrinsics.astype(np.float32))


def image_plane(rows: int, columns: int) -> NDArray[np.float32]:
    """Pixel centers of a map spread over [-1, 1] x [-1, 1], float32 [rows * columns, 2], x then y."""
    y = (2 * np.arange(rows, dtype=np.float32) + 1) / rows - 1
    x = (2 * np.arange(columns, dtype=np.float32) + 1) / columns - 1
    return np.stack(np.broadcast_arrays(x[None, :], y[:, None]), axis=-1).reshape(-1, 2)


def _ransac(
    source: NDArray[np.float32],
    target: NDArray[np.float32],
    weights: NDArray[np.float32],
    samples: Samples,
) -> Array | None:
    """The homography [3, 3] from source to target, or None if no hypothesis has enough inliers."""
    order = np.argsort(-weights, kind="stable")
    # Not by confidence: rounding may exchange two points that have almost the same, and then every
    # hypothesis with one of them would be another.
    candidates = np.sort(order[: candidate_count(order.size)])
    chosen = candidates[samples.hypotheses]
    hypotheses = fit_homographies(source[chosen], target[chosen], weights[chosen])
    inliers = _best_inliers(hypotheses.astype(np.float32), source, target, weights)
    if inliers is None:
        return None
    kept = order[inliers[order]]
    if kept.size > MAX_REFIT:
        pool = max(int(kept.size * REFIT_SHARE), MAX_REFIT)
        kept = kept[samples.refit[samples.refit < pool][:MAX_REFIT]]
    fit: Array = fit_homographies(source[kept][None], target[kept][None], weights[kept][None])[0]
    return fit if np.isfinite(fit).all() and np.linalg.cond(fit) < MAX_CONDITION else None


def fit_homographies(source: NDArray[Any], target: NDArray[Any], weights: NDArray[Any]) -> Array:
    """Weighted direct linear transform: homographies [n, 3, 3] from points [n, k, 2] to [n, k, 2].

    Each solution is the smallest right singular vector of a system A, [2k, 9], scaled so that its last
    entry is 1. A has two rows for every point, multiplied by the root of its weight. The vector is
    computed as the smallest eigenvector of A^T A, [9, 9], which is as accurate in double precision.
    """
    root = np.sqrt(weights.astype(np.float64))[..., None]
    ones = np.ones_like(root)
    homogeneous = np.concatenate((source, ones), axis=-1) * root
    zeros = np.zeros_like(homogeneous)
    u, v = target[..., :1].astype(np.float64), target[..., 1:].astype(np.float64)
    across = np.concatenate((-homogeneous, zeros, u * homogeneous), axis=-1)
    down = np.concatenate((zeros, -homogeneous, v * homogeneous), axis=-1)
    system = np.concatenate((across, down), axis=-2)
    smallest = np.linalg.eigh(system.swapaxes(-1, -2) @ system)[1][..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        fits: Array = (smallest / smallest[:, -1:]).reshape(-1, 3, 3)
    return fits


def _best_inliers(
    hypotheses: NDArray[np.float32],
    source: NDArray[np.float32],
    target: NDArray[np.float32],
    weights: NDArray[np.float32],
) -> NDArray[np.bool_] | None:
    """Inliers [k] of the hypothesis whose inliers weigh most; None if all have too few."""
    homogeneous = np.concatenate((source, np.ones_like(source[:, :1])), axis=1).T
    best, best_score = None, 0.0
    for hypothesis in hypotheses:
        if not np.isfinite(hypothesis).all():
            continue
        x, y, z = hypothesis @ homogeneous
        # |p / z - t| < d, without the division by z.
        x -= target[:, 0] * z
        y -= target[:, 1] * z
        z *= np.float32(INLIER_DISTANCE)
        inliers = x * x + y * y < z * z
        score = float(weights[inliers].sum())
        if score > best_score and np.count_nonzero(inliers) >= MIN_INLIERS:
            best, best_score = inliers, score
    return best


def split(homography: Array) -> tuple[Array, Array]:
    """A homography as rotation [3, 3] times lower triangular matrix [3, 3] with a positive diagonal.

    It is a QL decomposition: QR with the order of the axes reversed. The sign of a homography is
    arbitrary; the split uses the sign that makes the determinant positive.
    """
    if np.linalg.det(homography) < 0:
        homography = -homography
    q, r = np.linalg.qr(homography[:, ::-1])
    rotation, lens = q[:, ::-1], r[::-1, ::-1]
    sign = np.where(np.diag(lens) < 0, -1.0, 1.0)
    return rotation * sign, lens * sign[:, None]
