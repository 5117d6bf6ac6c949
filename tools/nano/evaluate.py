"""How good a model's depth is on rendered scenes it has never seen, backend by backend."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from da3_export.parity.report import FP16, onnx_runner
from da3_export.settings import BuildSettings
from da3_export.util.progress import Progress, aligned
from da3_runtime.backends import BACKENDS
from da3_runtime.errors import DA3Error, InferenceError
from da3_runtime.image.decode import decode_photo
from da3_runtime.image.preprocess import model_input
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.network_io import RawOutputs
from da3_runtime.output.preview import gray_preview
from da3_runtime.postprocess.depth import prediction_of, resize_prediction
from da3_runtime.store.manifest import Kind
from da3_runtime.variants import Head, find_variant
from tools.nano.scenes import Scene, render

HELD_OUT_SEED = 1_000_000
SIZES = ((378, 504), (504, 378), (252, 336), (336, 504))
DELTA = 1.25
_ROWS = 32  # of the baseline's profile
_PROFILE_SCENES = 200
_SHOWN = 0  # index of the scene that the picture shows
_FP16 = "fp16 graph, rounded"

Map = NDArray[np.float32]
Run = Callable[[NDArray[np.uint8]], dict[str, RawOutputs]]
Estimate = Callable[[NDArray[np.uint8]], Map]


class Accuracy(NamedTuple):
    """Errors after median scaling, over the pixels whose depth is known.

    Attributes
    ----------
    abs_rel : float
        Mean |d - t| / t.
    delta1 : float
        Share of pixels where neither of d and t is over 1.25 times the other.
    """

    abs_rel: float
    delta1: float


@dataclass(frozen=True)
class Figures:
    """One way of running one head, over all scenes."""

    head: str
    how: str
    abs_rel: float
    delta1: float
    scenes: int


def accuracy(depth: Map, scene: Scene) -> Accuracy:
    """Accuracy of a depth map [H, W] of any scale for a scene of that size."""
    d, t = depth[scene.valid].astype(np.float64), scene.depth[scene.valid].astype(np.float64)
    d *= np.median(t) / np.median(d)
    ratio = np.maximum(d / t, t / d)
    return Accuracy(float(np.mean(np.abs(d - t) / t)), float(np.mean(ratio < DELTA)))


def held_out(count: int, seed: int = HELD_OUT_SEED) -> list[Scene]:
    """Scenes in the sizes photos have."""
    return [render(seed, i, *SIZES[i % len(SIZES)]) for i in range(count)]


def row_profile(seed: int = 0) -> NDArray[np.float64]:
    """Mean over scenes of the logarithm of depth over its median, by row, top to bottom.

    What there is to know without looking at the image: the baseline.
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


def evaluate(settings: BuildSettings, count: int) -> list[Figures]:
    """Figures of every backend that can run here for both heads, and of the baseline.

    Raises
    ------
    DA3Error
        If a head's engine folder cannot be read.
    """
    variant = find_variant(settings.model_id)
    progress = Progress(variant.model_id, 0)
    scenes = [scene for scene in held_out(count) if scene.valid.mean() > 0.2]
    profile = row_profile()
    figures = [_figures("", "mean by row", lambda rgb: by_row(profile, rgb), scenes)]
    for head in Head:
        for how, estimate in _ways(replace(settings, head=head), progress):
            progress.say(f"{head}, {how}")
            figures.append(_figures(head, how, estimate, scenes))
    return figures


def _ways(settings: BuildSettings, progress: Progress) -> list[tuple[str, Estimate]]:
    """Every way to run an engine here: its backends, and its FP16 graph with FP16 arithmetic."""
    variant = find_variant(settings.model_id)
    ways: list[tuple[str, Estimate]] = []
    for cls in reversed(BACKENDS):
        try:
            loaded = load_backend(replace(settings, backend=cls.name))
        except DA3Error as error:
            progress.say(f"{settings.head}, {cls.name}: not run: {error}")
            continue

        ways.append((f"{cls.name} {loaded.backend.precision}", _estimate(loaded.run, settings)))
        folder = loaded.folder
    if ways and folder.manifest is not None and len(variant.graphs) == 1:
        (graph,) = variant.graphs
        rounded = onnx_runner(folder.artefact(graph, Kind.ONNX_FP16), FP16)
        ways.append((_FP16, _estimate(lambda images: {graph.name: rounded(images)}, settings)))
    return ways


def _estimate(run: Run, settings: BuildSettings) -> Estimate:
    """Image -> depth of its size, with whatever runs the model."""
    variant = find_variant(settings.model_id)
    longest = settings.processing_res or variant.processing_res

    def estimate(rgb: NDArray[np.uint8]) -> Map:
        prediction = prediction_of(run(model_input(rgb, longest)), 0, variant)
        return resize_prediction(prediction, rgb.shape[1], rgb.shape[0]).depth.values

    return estimate


def _figures(head: str, how: str, estimate: Estimate, scenes: list[Scene]) -> Figures:
    measured = [accuracy(estimate(scene.rgb), scene) for scene in scenes]
    mean = np.mean(measured, axis=0)
    if not np.isfinite(mean).all():
        raise InferenceError(f"{head}, {how}: a depth is not finite.")
    return Figures(head, how, float(mean[0]), float(mean[1]), len(scenes))


def by_row(profile: NDArray[np.float64], rgb: NDArray[np.uint8]) -> Map:
    """The baseline's depth [H, W] for an image: :func:`row_profile`, whatever the image shows."""
    height, width = rgb.shape[:2]
    at = (np.arange(height) + 0.5) / height * _ROWS - 0.5
    depth = np.exp(np.interp(at, np.arange(_ROWS), profile)).astype(np.float32)
    return np.repeat(depth[:, None], width, axis=1)


def table(figures: list[Figures]) -> str:
    """The figures as aligned text."""
    lines = [("head", "run as", "AbsRel", "delta1")]
    lines += [(f.head or "-", f.how, f"{f.abs_rel:.4f}", f"{f.delta1:.4f}") for f in figures]
    return aligned(lines)


def to_json(figures: list[Figures], model: str) -> str:
    """The figures with the machine, versions and commit that gave them."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    packages = ("torch", "numpy", "depth-anything-3")
    content = {
        "model": model,
        "device": f"{platform.machine()} CPU",
        "versions": {
            **{package: version(package) for package in packages},
            "onnxruntime": onnxruntime.__version__,
        },
        "commit": commit,
        "held_out_seed": HELD_OUT_SEED,
        "figures": [asdict(f) for f in figures],
    }
    return json.dumps(content, indent=1) + "\n"


def scene_picture(settings: BuildSettings) -> bytes:
    """JPEG of a held-out scene beside its true inverse depth and both heads'."""
    scene = render(HELD_OUT_SEED, _SHOWN, *SIZES[0])
    truth = gray_preview(np.where(scene.valid, scene.depth, np.float32(1e6)))
    return _side_by_side(settings, scene.rgb, [truth])


def photo_picture(settings: BuildSettings, path: Path) -> bytes:
    """JPEG of a photo beside both heads' inverse depth."""
    rgb = decode_photo(path.read_bytes(), max_bytes=2**26, max_pixels=2**26).rgb
    return _side_by_side(settings, rgb, [])


def _side_by_side(
    settings: BuildSettings, rgb: NDArray[np.uint8], pictures: list[NDArray[np.uint8]]
) -> bytes:
    for head in Head:
        estimate = _estimate(load_backend(replace(settings, head=head)).run, settings)
        pictures.append(gray_preview(estimate(rgb)))
    panels = [rgb[..., ::-1], *(cv2.cvtColor(p, cv2.COLOR_GRAY2BGR) for p in pictures)]
    return bytes(cv2.imencode(".jpg", np.hstack(panels), [cv2.IMWRITE_JPEG_QUALITY, 90])[1])
