"""How accurate a model's depth is on photos whose depth is known, for every way to run it here."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from da3_export.parity.subjects import FP16, onnx_runner
from da3_export.photos import DEPTH_PNG_ENDING, find_photos, read_photo
from da3_export.settings import BuildSettings
from da3_export.util.progress import Progress, aligned
from da3_runtime.backends import BACKENDS
from da3_runtime.backends.eager import Eager
from da3_runtime.errors import DA3Error, InferenceError, SettingError
from da3_runtime.image.decode import Photo
from da3_runtime.image.preprocess import model_input
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.network import precision
from da3_runtime.network.load import load_network
from da3_runtime.network_io import Conditions, RawOutputs, inputs_of
from da3_runtime.postprocess.camera import EXIF, centered_lens
from da3_runtime.postprocess.depth import Depth, prediction_of, resize_prediction
from da3_runtime.store.engine_weights import engine_checkpoint, engine_sdt
from da3_runtime.store.find_engine import find_engine
from da3_runtime.store.manifest import Kind
from da3_runtime.util.setting_group import AUTO
from da3_runtime.variants import Head, Unit, find_variant

DELTA = 1.25
# The first that exists beside NAME.jpg is its depth.
DEPTH_ENDINGS = (".depth.npz", ".npy", DEPTH_PNG_ENDING)
ABOUT_NAME = "about.json"  # description of a data folder; copied into the figures
EAGER_FP32 = "eager fp32"
FP16_ROUNDED = "fp16 graph, rounded"

Map = NDArray[np.float32]
Run = Callable[[NDArray[np.uint8], Conditions | None], dict[str, RawOutputs]]
Estimate = Callable[[Photo], Depth]


class Pair(NamedTuple):
    """A photo and the file of its depth."""

    photo: Path
    depth: Path


class Accuracy(NamedTuple):
    """Errors over the pixels whose depth is known.

    Attributes
    ----------
    abs_rel : float
        Mean |d - t| / t.
    delta1 : float
        Share of pixels where neither of d and t is over 1.25 times the other.
    rmse : float
        Root of the mean square of d - t, in the unit of the known depth.
    """

    abs_rel: float
    delta1: float
    rmse: float


@dataclass(frozen=True)
class Figures:
    """Accuracy of one way to run one head, as means over all photos.

    Attributes
    ----------
    head, how : str
        The head, and the backend with its precision.
    abs_rel, delta1, rmse : float
        As in :class:`Accuracy`.
    scaling : str
        ``median`` if every depth was scaled to the median of the known depth; ``none`` if every depth
        is in meters and was compared as it is.
    photos : int
        How many photos were measured.
    """

    head: str
    how: str
    abs_rel: float
    delta1: float
    rmse: float
    scaling: str
    photos: int


def find_pairs(folder: Path) -> list[Pair]:
    """Photos of a folder with their files of depth, sorted.

    Raises
    ------
    SettingError
        If the folder has no photo, or a photo has no depth.
    """
    photos = find_photos(folder)
    if not photos:
        raise SettingError(f"--data {str(folder)!r} is not a folder with photos in it.")
    pairs, alone = [], []
    for photo in photos:
        candidates = [photo.with_name(photo.stem + ending) for ending in DEPTH_ENDINGS]
        depth = next((path for path in candidates if path.is_file()), None)
        if depth is None:
            alone.append(photo)
        else:
            pairs.append(Pair(photo, depth))
    if alone:
        stem = alone[0].stem
        raise SettingError(
            f"--data: {len(alone)} of {len(photos)} photos have no depth file, {alone[0].name} first; "
            f"put {' or '.join(stem + ending for ending in DEPTH_ENDINGS)} beside it."
        )
    return pairs


def read_depth(path: Path, depth_scale: float | None = None) -> NDArray[np.float64]:
    """Known depth [H, W]; pixels that are not positive and finite have no known depth.

    Parameters
    ----------
    path : Path
        An ``.npz`` file with the array ``depth``, an ``.npy`` file or a 16-bit ``.png`` file.
    depth_scale : float | None
        Depth of one step of a PNG.

    Raises
    ------
    SettingError
        If the file cannot be read, is not a map, or is a PNG while the scale is unknown.
    """
    if path.suffix == ".png" and depth_scale is None:
        raise SettingError(
            f"{path.name}: a PNG of depth needs --depth-scale, the depth of one step "
            "(0.001 for millimeters)."
        )
    try:
        values = _read_array(path)
    except (OSError, ValueError, KeyError, cv2.error):
        raise SettingError(
            f"{path.name} is not a depth file: give an .npz with the array 'depth', an .npy or "
            "a 16-bit gray PNG."
        ) from None
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        shape = " x ".join(map(str, values.shape))
        raise SettingError(
            f"{path.name} holds {shape} {values.dtype}: depth is a map [H, W] of numbers."
        )
    return values.astype(np.float64) * (depth_scale or 1 if path.suffix == ".png" else 1)


def _read_array(path: Path) -> NDArray[np.generic]:
    if path.suffix == ".png":
        image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
        if image is None or image.dtype != np.uint16:
            raise ValueError(path.name)
        return np.asarray(image)
    loaded = np.load(path, allow_pickle=False)
    if path.suffix == ".npy":
        return np.asarray(loaded)
    with loaded:
        return np.asarray(loaded["depth"])


def accuracy(depth: Map, truth: NDArray[np.floating], scale: bool) -> Accuracy:
    """Accuracy of depth maps [..., H, W] against the known depth of the same size.

    Parameters
    ----------
    scale : bool
        Whether to scale the depth to the median of the known depth first.
    """
    known = is_known(truth)
    d, t = depth[known].astype(np.float64), truth[known].astype(np.float64)
    if scale:
        d *= np.median(t) / np.median(d)
    ratio = np.maximum(d / t, t / d)
    return Accuracy(
        float(np.mean(np.abs(d - t) / t)),
        float(np.mean(ratio < DELTA)),
        float(np.sqrt(np.mean((d - t) ** 2))),
    )


def is_known(truth: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Pixels whose depth is known, bool of the same shape."""
    return np.asarray(np.isfinite(truth) & (truth > 0))


def evaluate(
    settings: BuildSettings,
    data: Path,
    *,
    depth_scale: float | None = None,
    heads: Sequence[Head] = tuple(Head),
) -> list[Figures]:
    """Accuracy of a model on a folder of photos with known depth.

    Runs every backend that can run here with every head whose weights exist, and the FP16 graph with
    FP16 arithmetic. Depth without a unit is scaled to the median of the known depth; depth in meters is
    compared as it is.

    Parameters
    ----------
    settings : BuildSettings
        The model, where its engines are, and the size to run it at.
    data : Path
        Folder of photos. Beside NAME.jpg lies its depth: NAME.depth.npz (array ``depth``), NAME.npy or
        NAME.depth.png (16-bit).
    depth_scale : float | None
        Depth of one step of a PNG.

    Raises
    ------
    SettingError
        If the folder has no photo, or a depth file is missing, unreadable, of another size than its
        photo, or has no known depth.
    BackendUnavailableError
        If no backend can run the model here.
    """
    variant = find_variant(settings.model_id)
    progress = Progress(variant.model_id, 0)
    pairs = find_pairs(data)
    for pair in pairs:
        _read_pair(pair, depth_scale)  # a fault in the last file must not cost a run over all others
    figures: list[Figures] = []
    for head in heads:
        for how, run in ways_to_run(replace(settings, head=head), progress):
            progress.log(f"{head}, {how}: {len(pairs)} photos")
            figures.append(_figures(head, how, _estimate(run, settings), pairs, depth_scale))
    if not figures:
        raise SettingError(
            f"Nothing can run {variant.model_id} here: build its engine with 'make engines', or give "
            "WEIGHTS for PyTorch eager."
        )
    return figures


def _read_pair(pair: Pair, depth_scale: float | None) -> tuple[Photo, NDArray[np.float64]]:
    photo, truth = read_photo(pair.photo), read_depth(pair.depth, depth_scale)
    if truth.shape != photo.rgb.shape[:2]:
        (height, width), (rows, columns) = photo.rgb.shape[:2], truth.shape
        raise SettingError(
            f"{pair.depth.name} is {columns} x {rows} pixels, {pair.photo.name} (upright) is "
            f"{width} x {height}: give both in one size."
        )
    if not is_known(truth).any():
        raise SettingError(f"{pair.depth.name} has no valid pixel: none is positive and finite.")
    return photo, truth


def ways_to_run(settings: BuildSettings, progress: Progress) -> Iterator[tuple[str, Run]]:
    """Every way to run one head here: PyTorch eager, backends, the FP16 graph with FP16 arithmetic.

    Yields a name, and a function that runs a batch of scenes until the next one is asked for.
    """
    variant = find_variant(settings.model_id)
    try:
        yield EAGER_FP32, _eager_fp32(settings)
    except DA3Error as error:
        progress.log(f"{settings.head}, {EAGER_FP32}: not run: {error}")
    folder = None
    # Eager is on a CPU the same as above, and on a GPU the same as eager-cuda.
    ways = [(cls, each) for cls in reversed(BACKENDS) if cls is not Eager for each in cls.precisions]
    for cls, asked in ways:
        try:
            loaded = load_backend(replace(settings, backend=cls.name, precision=asked))
        except DA3Error as error:
            way = cls.name if asked == AUTO else f"{cls.name} {asked}"
            progress.log(f"{settings.head}, {way}: not run: {error}")
            continue
        folder = loaded.folder
        try:
            yield f"{cls.name} {loaded.backend.precision}", loaded.run
        finally:
            loaded.close()
    if folder is None or folder.manifest is None or len(variant.graphs) != 1:
        return
    (graph,) = variant.graphs
    try:
        rounded = onnx_runner(folder.artefact(graph, Kind.ONNX_FP16), FP16)
    except DA3Error as error:
        progress.log(f"{settings.head}, {FP16_ROUNDED}: not run: {error}")
        return
    yield FP16_ROUNDED, lambda images, conditions: {graph.name: rounded(images, conditions)}


def _eager_fp32(settings: BuildSettings) -> Run:
    """The networks themselves, in FP32 on the CPU, with the weights that the engine was built from."""
    folder, _ = find_engine(settings)
    checkpoint = engine_checkpoint(folder, settings)
    sdt = engine_sdt(folder, settings).path if folder.head is Head.SDT else None
    networks = {
        graph.name: load_network(
            folder.variant, graph, checkpoint.path, precision.FP32, sdt if graph.takes_sdt else None
        )
        for graph in folder.variant.graphs
    }

    def run(images: NDArray[np.uint8], conditions: Conditions | None) -> dict[str, RawOutputs]:
        outputs = {}
        with torch.inference_mode():
            for name, network in networks.items():
                inputs = inputs_of(network.graph.series.inputs, images, conditions)
                outputs[name] = network(*map(torch.from_numpy, inputs.values()))
        return {
            name: RawOutputs.of(networks[name].output_names, [tensor.numpy() for tensor in tensors])
            for name, tensors in outputs.items()
        }

    return run


def _estimate(run: Run, settings: BuildSettings) -> Estimate:
    """A function that gives a photo's depth at the photo's size, as ``run`` computes it."""
    variant = find_variant(settings.model_id)
    longest = settings.processing_res or variant.processing_res

    def estimate(photo: Photo) -> Depth:
        height, width = photo.rgb.shape[:2]
        images = model_input(photo.rgb, longest)
        lens = None
        if photo.focal_px is not None and variant.needs_focal:
            lens = centered_lens(photo.focal_px, width, height, EXIF)
            lens = lens.resized(images.shape[3] / width, images.shape[2] / height)
        prediction = prediction_of(run(images, None), 0, variant, lens)
        return resize_prediction(prediction, width, height).depth

    return estimate


def _figures(
    head: str, how: str, estimate: Estimate, pairs: list[Pair], depth_scale: float | None
) -> Figures:
    scaled, as_is, metric = [], [], True
    for pair in pairs:
        photo, truth = _read_pair(pair, depth_scale)
        depth = estimate(photo)
        metric &= depth.unit is Unit.METERS
        scaled.append(accuracy(depth.values, truth, scale=True))
        as_is.append(accuracy(depth.values, truth, scale=False))
    mean = np.mean(as_is if metric else scaled, axis=0)
    if not np.isfinite(mean).all():
        raise InferenceError(f"{head}, {how}: an error is not finite, so a depth is zero or infinite.")
    abs_rel, delta1, rmse = (round(float(value), 8) for value in mean)
    return Figures(head, how, abs_rel, delta1, rmse, "none" if metric else "median", len(pairs))


def table(figures: list[Figures]) -> str:
    """The figures as aligned text."""
    lines = [("head", "run as", "AbsRel", "delta1", "RMSE", "scaling", "photos")]
    for f in figures:
        errors = (f"{f.abs_rel:.4f}", f"{f.delta1:.4f}", f"{f.rmse:.4g}")
        lines.append((f.head, f.how, *errors, f.scaling, str(f.photos)))
    return aligned(lines)


def to_json(figures: list[Figures], model: str, data: Path) -> str:
    """The figures with the data, machine, package versions and commit that they are of."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    about = data / ABOUT_NAME
    content = {
        "model": model,
        "data": json.loads(about.read_text(encoding="utf-8")) if about.is_file() else data.name,
        "device": f"{platform.machine()} CPU",
        "versions": {
            **{package: version(package) for package in ("torch", "numpy")},
            # From the module: the build for CUDA is a package of another name.
            "onnxruntime": onnxruntime.__version__,
        },
        "commit": commit,
        "figures": [asdict(f) for f in figures],
    }
    return json.dumps(content, indent=1) + "\n"
