"""A folder of rendered scenes: photos with exact depth, for ``da3-export evaluate`` and distillation."""

from __future__ import annotations

import io
import json
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from da3_export.accuracy.datasets import ABOUT_NAME, DEPTH_ENDINGS
from da3_export.accuracy.metrics import Accuracy, accuracy
from da3_export.util.progress import Progress
from da3_runtime.util.files import write_atomically
from tools.nano.scenes import Scene, render

HELD_OUT_SEED = 1_000_000  # far from every seed that training uses
SIZES = ((378, 504), (504, 378), (252, 336), (336, 504))  # heights and widths that photos have
LEAST_VALID = 0.2  # share of valid pixels that a scene must have
_ROWS = 32  # of the baseline's profile
_PROFILE_SCENES = 200


def held_out(count: int, seed: int = HELD_OUT_SEED) -> list[Scene]:
    """The scenes 0 to ``count`` of a seed whose depth is known over enough of the image."""
    scenes = (render(seed, i, *SIZES[i % len(SIZES)]) for i in range(count))
    return [scene for scene in scenes if scene.valid.mean() > LEAST_VALID]


def known_depth(scene: Scene) -> NDArray[np.float32]:
    """Depth [H, W] of a scene in meters, zero where it does not count."""
    return np.where(scene.valid, scene.depth, np.float32(0))


def render_folder(folder: Path, count: int, seed: int = HELD_OUT_SEED) -> None:
    """Write scenes to ``folder``: NNNNN.png, NNNNN.depth.npz, and facts about them in about.json.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress("scenes", 1)
    baseline = []
    profile = row_profile()
    with progress.step("render", count) as advance:
        for index in range(count):
            # One at a time, as a few thousand do not fit into memory.
            scene = render(seed, index, *SIZES[index % len(SIZES)])
            if scene.valid.mean() > LEAST_VALID:
                depth = known_depth(scene)
                baseline.append(accuracy(by_row(profile, *depth.shape), depth))
                _write(folder, f"{index:05}", scene.rgb, depth)
            advance(str(index))
    mean = Accuracy(*np.mean(baseline, axis=0).tolist())
    about = {
        "scenes": f"rendered by tools.nano, seed {seed}",
        "count": len(baseline),
        "baseline": {"how": "mean by row", "abs_rel": mean.abs_rel, "delta1": mean.delta1},
    }
    write_atomically(folder / ABOUT_NAME, (json.dumps(about, indent=1) + "\n").encode())


def _write(folder: Path, stem: str, rgb: NDArray[np.uint8], depth: NDArray[np.float32]) -> None:
    packed = io.BytesIO()
    np.savez_compressed(packed, depth=depth)
    write_atomically(folder / (stem + DEPTH_ENDINGS[0]), packed.getvalue())
    write_atomically(folder / f"{stem}.png", bytes(cv2.imencode(".png", rgb[..., ::-1])[1]))


def row_profile(seed: int = 0) -> NDArray[np.float64]:
    """Mean over scenes of the logarithm of depth over its median, by row from top to bottom.

    It is the baseline: all that can be known of the depth without looking at the image.
    """
    total, count = np.zeros(_ROWS), np.zeros(_ROWS)
    for index in range(_PROFILE_SCENES):
        scene = render(seed, index, 4 * _ROWS, 4 * _ROWS)
        if not scene.valid.any():
            continue
        logs = np.log(np.where(scene.valid, scene.depth, 1))
        logs -= np.log(np.median(scene.depth[scene.valid]))
        total += np.where(scene.valid, logs, 0).reshape(_ROWS, -1).sum(1)
        count += scene.valid.reshape(_ROWS, -1).sum(1)
    return total / np.maximum(count, 1)


def by_row(profile: NDArray[np.float64], height: int, width: int) -> NDArray[np.float32]:
    """The baseline's depth [H, W], the same for every image of that size."""
    at = (np.arange(height) + 0.5) / height * _ROWS - 0.5
    depth = np.exp(np.interp(at, np.arange(_ROWS), profile)).astype(np.float32)
    return np.repeat(depth[:, None], width, axis=1)
