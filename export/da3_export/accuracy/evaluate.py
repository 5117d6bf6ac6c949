"""How accurate a model is on a data set, for every way to run it here; a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, NamedTuple, Self

import cv2
import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from da3_export.accuracy import VIEWS
from da3_export.accuracy.datasets import DataSet, find_samples, read_sample
from da3_export.accuracy.metrics import (
    Accuracy,
    Alignment,
    accuracy,
    fit,
    pose_auc,
    pose_errors,
)
from da3_export.accuracy.samples import Sample, Source
from da3_export.accuracy.ways import EAGER_FP32, Run, Way, ways_to_run
from da3_export.settings import BuildSettings
from da3_export.util import interruption
from da3_export.util.progress import Progress
from da3_runtime import __version__
from da3_runtime.errors import SettingError
from da3_runtime.image.decode import Photo
from da3_runtime.image.preprocess import bounded_size, model_input
from da3_runtime.inference.scene import common_crops
from da3_runtime.output.run_manifest import compare_settings
from da3_runtime.postprocess.camera import EXIF, centered_lens
from da3_runtime.postprocess.depth import Depth, prediction_of, predictions_of, resize_prediction
from da3_runtime.util.files import locked
from da3_runtime.variants import Head, Series, Unit, find_variant

RESULTS_NAME = "results.jsonl"
AUC_DEGREES = (5, 15, 30)
_WORST = 4
_CASE_SIDE = 360  # pixels of the longest side of its images

Record = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What is measured.

    Attributes
    ----------
    data_set : str
        Name in :data:`DATA_SETS`.
    source : Source
        Where it is.
    alignment : Alignment | None
        How depth is fitted; None for the median, or for nothing if every depth is in meters.
    focal_length_px : float | None
        Focal length in pixels of the photos, instead of the data set's or EXIF's.
    photos : int | None
        At most so many photos, spread evenly; None for all.
    views : int
        Views of a scene that are run together for its cameras, spread evenly; below 2 for none.
    out : Path | None
        Folder for the results; a run with the same request goes on from there.
    """

    data_set: str
    source: Source
    alignment: Alignment | None = None
    focal_length_px: float | None = None
    photos: int | None = None
    views: int = VIEWS
    out: Path | None = None


@dataclass(frozen=True)
class Figures:
    """Accuracy of one way to run one head.

    Attributes
    ----------
    head, how, digest : str
        The head, the backend with its precision, and the digest of what it ran.
    errors : dict[str, float]
        Means over all photos of the fields of :class:`Accuracy`; of scenes ``auc5``, ``auc15`` and
        ``auc30`` over the pairs of views.
    scaling : str
        The :class:`Alignment`.
    photos, pairs : int
        How many photos, and pairs of views, were measured.
    difference : dict[str, float]
        Each error minus eager's of the same head; empty if eager did not run.
    """

    head: str
    how: str
    digest: str
    errors: dict[str, float]
    scaling: str
    photos: int
    pairs: int
    difference: dict[str, float]


class Case(NamedTuple):
    """A photo [h, w, 3], known and aligned depth [h, w], all made small, and the mean relative error."""

    name: str
    rgb: NDArray[Any]
    truth: NDArray[Any]
    depth: NDArray[Any]
    abs_rel: float


class Evaluation(NamedTuple):
    """What a run found.

    Attributes
    ----------
    settings : Record
        What the figures depend on beside the ways to run.
    figures : list[Figures]
        A row for each way to run each head.
    factor : float
        Median over photos of the factor from depth to known depth, of the first way to run.
    worst : list[Case]
        The photos with the largest mean relative error, of the first way to run.
    """

    settings: Record
    figures: list[Figures]
    factor: float
    worst: list[Case]


class Results:
    """The lines of ``results.jsonl``: settings, ways to run, and each photo's and scene's figures.

    A line is written when a photo is measured, and an incomplete last line is removed, so that a killed
    run can go on.

    Raises
    ------
    SettingError
        If the file cannot be written, another run writes to it, or a line is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, path = folder, folder / RESULTS_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = locked(path)
            data = path.read_bytes()
            os.truncate(path, data.rfind(b"\n") + 1)
        except BlockingIOError:
            raise SettingError(f"--out {folder}: another run writes to it; wait for its end.") from None
        except OSError as error:
            raise SettingError(f"--out {folder}: {error.strerror}.") from None
        self._records: dict[tuple[str, ...], Record] = {}
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                self._records[_key(record)] = record
            except (ValueError, TypeError, KeyError):
                raise SettingError(
                    f"--out {folder}: line {number} of {RESULTS_NAME} is damaged; remove the line."
                ) from None
        self._photos = {key[3] for key in self._records if key[0] == "photo"}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def get(self, kind: str, *key: str) -> Record | None:
        """The record of a kind and key; None if there is none."""
        return self._records.get((kind, *key, *[""] * (3 - len(key))))

    def add(self, record: Record) -> None:
        """Write a record."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        self._records[_key(record)] = record

    def has_photo(self, name: str) -> bool:
        """Whether a photo was measured in any way."""
        return name in self._photos

    def compare(self, kind: str, facts: Mapping[str, object], *key: str) -> None:
        """Raise SettingError if the file has other facts of this kind and key."""
        compare_settings(self._folder, self.get(kind, *key) or {}, facts)

    def keep(self, kind: str, facts: Mapping[str, object], *key: str) -> None:
        """Write facts that must stay as they are; raises as :meth:`compare`."""
        self.compare(kind, facts, *key)
        if self.get(kind, *key) is None:
            head, how = (*key, "", "")[:2]
            self.add({"kind": kind, "head": head, "how": how, "name": "", **facts})


def _key(record: Record) -> tuple[str, ...]:
    return tuple(str(record[field]) for field in ("kind", "head", "how", "name"))


def evaluate(
    settings: BuildSettings, request: Request, heads: Sequence[Head] = tuple(Head)
) -> Evaluation:
    """Accuracy of a model on a data set.

    Runs every backend that can run here with every head whose weights exist, and the FP16 graph with
    FP16 arithmetic. Every photo is read once before anything runs, unless an earlier run measured it.

    Parameters
    ----------
    settings : BuildSettings
        The model, where its engines are, and the size to run it at.
    request : Request
        What is measured.
    heads : Sequence[Head]
        The heads to run.

    Raises
    ------
    SettingError
        If a file of the data set is missing or cannot be used, or the folder of results has results of
        another request, of other weights or of another engine.
    BackendUnavailableError
        If no backend can run the model here.
    """
    variant = find_variant(settings.model_id)
    progress = Progress(variant.model_id, 0)
    row, samples = find_samples(request.data_set, request.source)
    samples = _spread(samples, request.photos)
    # A scene's name, and its views.
    scenes = _scenes(samples, request.views) if variant.graphs[0].series is Series.ANYVIEW else {}
    facts = _facts(settings, request, samples)
    with ExitStack() as stack:
        out = request.out or Path(stack.enter_context(TemporaryDirectory()))
        results = stack.enter_context(Results(out))
        results.compare("settings", facts)
        # A fault in the last file must not cost a run over all others.
        unread = [sample for sample in samples if not results.has_photo(sample.name)]
        if unread:
            progress.log(f"{request.data_set}: reading {len(unread)} photos and their depth")
        for sample in unread:
            interruption.check()
            read_sample(sample, row)
        results.keep("settings", facts)
        ways: list[tuple[Head, str, str]] = []  # name and digest: the network itself must not be kept
        worst: list[Case] = []
        factor = 1.0
        for head in heads:
            for way in ways_to_run(replace(settings, head=head), progress):
                results.keep("way", {f"digest of {head}, {way.name}": way.digest}, head, way.name)
                run = _Measured(settings, request, row, head, way, results, progress)
                run.photos(samples)
                run.scenes(scenes)
                if not ways:
                    records = run.records(samples)
                    factor = float(np.median([record["factor"] for record in records]))
                    worst = run.worst(samples, _alignment(request, records))
                ways.append((head, way.name, way.digest))
        if not ways:
            raise SettingError(
                f"Nothing can run {variant.model_id} here: build its engine with 'make engines', or "
                "give WEIGHTS for PyTorch eager."
            )
        figures = _figures(request, results, ways, samples, scenes)
    return Evaluation(facts, figures, factor, worst)


def _spread(samples: list[Sample], count: int | None) -> list[Sample]:
    """At most ``count`` of some samples, spread evenly from the first to the last."""
    if count is None or count >= len(samples):
        return samples
    return [samples[round(at)] for at in np.linspace(0, len(samples) - 1, count)]


def _scenes(samples: list[Sample], views: int) -> dict[str, list[Sample]]:
    scenes: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.scene is not None:
            scenes.setdefault(sample.scene, []).append(sample)
    if views < 2:
        return {}
    return {name: _spread(all_, views) for name, all_ in scenes.items() if len(all_) > 1}


def _facts(settings: BuildSettings, request: Request, samples: Iterable[Sample]) -> Record:
    """What the figures depend on beside the ways to run, as JSON."""
    digest = hashlib.sha256()
    for sample in samples:
        try:
            sizes = [path.stat().st_size for path in sample.files]
        except OSError as error:
            raise SettingError(f"{sample.name} cannot be read: {error.strerror}.") from None
        digest.update(json.dumps([sample.name, sizes]).encode())
    variant = find_variant(settings.model_id)
    return {
        "model": variant.model_id,
        "dataset": request.data_set,
        "files_digest": digest.hexdigest(),
        "depth_scale": request.source.depth_scale,
        "focal_length_px": request.focal_length_px,
        "views": request.views,
        "processing_res": settings.processing_res or variant.processing_res,
        "device": _device(),
        "versions": {
            "da3-export": __version__,
            **{package: version(package) for package in ("torch", "numpy")},
            # From the module: the build for CUDA is a package of another name.
            "onnxruntime": onnxruntime.__version__,
        },
    }


def _device() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.machine()} CPU{gpu}"


class _Measured(NamedTuple):
    """One way to run one head, and where its figures go."""

    settings: BuildSettings
    request: Request
    row: DataSet
    head: Head
    way: Way
    results: Results
    progress: Progress

    def photos(self, samples: Sequence[Sample]) -> None:
        """Measure the photos that are not measured yet."""
        key = ("photo", self.head, self.way.name)
        missing = [sample for sample in samples if self.results.get(*key, sample.name) is None]
        done, title = len(samples) - len(missing), f"{self.head}, {self.way.name}"
        self.progress.log(f"{title}: {len(samples)} photos" + f", {done} of an earlier run" * (done > 0))
        for number, sample in enumerate(missing, start=1):
            interruption.check()
            truth, depth, _ = self._depth(sample)
            self._add(
                "photo",
                sample.name,
                unit=depth.unit.value,
                factor=fit(depth.values, truth, Alignment.MEDIAN)[0],
                **{
                    each.value: accuracy(depth.values, truth, each, self.row.farthest)._asdict()
                    for each in Alignment
                },
            )
            if number % max(len(missing) // 10, 10) == 0:
                self.progress.log(f"{title}: {done + number}")

    def scenes(self, scenes: Mapping[str, Sequence[Sample]]) -> None:
        """Measure the cameras of the scenes that are not measured yet."""
        for name, views in scenes.items():
            if self.results.get("scene", self.head, self.way.name, name) is None:
                interruption.check()
                truth = np.stack([view.extrinsics for view in views if view.extrinsics is not None])
                found = _cameras(self.way.run, self.settings, views)
                self._add("scene", name, errors=pose_errors(found, truth))

    def records(self, samples: Sequence[Sample]) -> list[Record]:
        """The records of the photos."""
        found = [self.results.get("photo", self.head, self.way.name, each.name) for each in samples]
        return [record for record in found if record is not None]

    def worst(self, samples: Sequence[Sample], alignment: Alignment) -> list[Case]:
        """The photos with the largest mean relative error, run again."""
        errors = [record[alignment]["abs_rel"] for record in self.records(samples)]
        cases = []
        for index in sorted(range(len(samples)), key=lambda i: -errors[i])[:_WORST]:
            truth, depth, photo = self._depth(samples[index])
            scale, shift = fit(depth.values, truth, alignment)
            size = bounded_size(truth.shape[1], truth.shape[0], _CASE_SIDE)
            # Nearest pixels, as a mean of known and unknown depths means nothing.
            rgb, known, fitted = (
                np.asarray(cv2.resize(each, size, interpolation=cv2.INTER_NEAREST))
                for each in (photo.rgb, truth, depth.values * scale + shift)
            )
            cases.append(Case(samples[index].name, rgb, known, fitted, errors[index]))
        return cases

    def _depth(self, sample: Sample) -> tuple[NDArray[np.float64], Depth, Photo]:
        photo, truth = read_sample(sample, self.row, self.request.focal_length_px)
        return truth, _estimate(self.way.run, self.settings)(photo, truth.shape), photo

    def _add(self, kind: str, name: str, **facts: object) -> None:
        key = {"kind": kind, "head": self.head.value, "how": self.way.name, "name": name}
        self.results.add({**key, **facts})


def _estimate(run: Run, settings: BuildSettings) -> Callable[[Photo, tuple[int, int]], Depth]:
    """A function that gives a photo's depth at a size (height, width), as ``run`` computes it."""
    variant = find_variant(settings.model_id)
    longest = settings.processing_res or variant.processing_res

    def estimate(photo: Photo, size: tuple[int, int]) -> Depth:
        height, width = photo.rgb.shape[:2]
        images = model_input(photo.rgb, longest)
        lens = None
        if photo.focal_px is not None and variant.needs_focal:
            lens = centered_lens(photo.focal_px, width, height, EXIF)
            lens = lens.resized(images.shape[3] / width, images.shape[2] / height)
        prediction = prediction_of(run(images, None), 0, variant, lens)
        return resize_prediction(prediction, size[1], size[0]).depth

    return estimate


def _cameras(run: Run, settings: BuildSettings, views: Sequence[Sample]) -> NDArray[np.floating]:
    """The cameras that a scene's views are found to have, world to camera, [S, 3, 4]."""
    variant = find_variant(settings.model_id)
    longest = settings.processing_res or variant.processing_res
    inputs = [model_input(view.photo().rgb, longest)[0, 0] for view in views]
    crops = common_crops([(image.shape[1], image.shape[0]) for image in inputs])
    images = np.stack([crop.of(image) for crop, image in zip(crops, inputs, strict=True)])[None]
    predictions = predictions_of(run(images, None), 0, variant, [None] * len(views))
    cameras = [each.camera for each in predictions]
    return np.stack([camera.extrinsics for camera in cameras if camera is not None])


def _alignment(request: Request, records: Iterable[Record]) -> Alignment:
    """The wanted alignment, or the one for the unit of the depths."""
    if request.alignment is not None:
        return request.alignment
    metric = all(record["unit"] == Unit.METERS for record in records)
    return Alignment.NONE if metric else Alignment.MEDIAN


def _figures(
    request: Request,
    results: Results,
    ways: Sequence[tuple[Head, str, str]],
    samples: Sequence[Sample],
    scenes: Iterable[str],
) -> list[Figures]:
    figures: list[Figures] = []
    records = {
        (head, name): [results.get("photo", head, name, sample.name) or {} for sample in samples]
        for head, name, _ in ways
    }
    alignment = _alignment(request, [record for each in records.values() for record in each])
    for head, name, digest in ways:
        photos = records[head, name]
        found = [results.get("scene", head, name, scene) or {} for scene in scenes]
        pairs = [error for record in found for error in record["errors"]]
        rows = [Accuracy(**record[alignment]) for record in photos]
        errors = dict(zip(Accuracy._fields, np.mean(rows, axis=0).tolist(), strict=True))
        if pairs:
            errors |= {f"auc{degrees}": pose_auc(pairs, degrees) for degrees in AUC_DEGREES}
        eager = next((f.errors for f in figures if (f.head, f.how) == (head, EAGER_FP32)), None)
        eager = errors if name == EAGER_FP32 else eager
        figures.append(
            Figures(
                head.value,
                name,
                digest,
                errors,
                alignment.value,
                len(photos),
                len(pairs),
                {each: errors[each] - eager[each] for each in errors} if eager else {},
            )
        )
    return figures
