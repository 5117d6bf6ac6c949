"""Parity: is an engine's depth that of upstream's own modules in eager FP32?"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from da3_export.onnx_attention import spell_out_attention
from da3_export.parity.fp16_emulation import round_like_half
from da3_export.util.progress import aligned
from da3_runtime.errors import ParityError
from da3_runtime.image.decode import decode_photo
from da3_runtime.network_io import RawOutputs
from da3_runtime.store.manifest import Kind
from da3_runtime.variants import Head

SCHEMA_VERSION = 1
SHAPES = ((364, 504), (504, 280), (504, 504), (84, 1036))
BATCHES = (1, 3)
# For models above 500 million parameters, so that the check stays affordable.
LARGE_SHAPES = ((84, 140), (140, 98), (280, 378))
LARGE_BATCHES = (1, 2)
PHOTOS = Path(__file__).resolve().parent / "samples"

Runner = Callable[[NDArray[np.uint8]], RawOutputs]


class Case(NamedTuple):
    """One input shape."""

    height: int
    width: int
    batch: int


class Statistics(NamedTuple):
    """Relative errors of one output over a batch."""

    mean: float
    p999: float
    max: float


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors allowed; None is not checked."""

    mean: float | None = None
    p999: float | None = None
    max: float | None = None

    def allows(self, measured: Statistics) -> bool:
        """Whether every checked error is finite and within its bound."""
        pairs = zip((self.mean, self.p999, self.max), measured, strict=True)
        return all(bound is None or value <= bound for bound, value in pairs)


# Confidence starts at one. Sky is zero over most of a photo, so its error is absolute where it is small.
_MAPS = ("depth", "confidence", "sky", "ray_confidence")
_CAMERA = ("intrinsics", "rotation", "translation")
# A camera that moved by less than this share of the scene's mean depth stood still, as it does where
# there is one view: a trained network's translation is then noise around zero, and so is its error.
STILL = 0.01
FP32_TOLERANCES = {
    **dict.fromkeys((*_MAPS, "rays"), Tolerance(max=1e-4)),
    **dict.fromkeys(_CAMERA, Tolerance(max=1e-3)),
}
# DySample's sampling points are FP32 coordinates of a map up to 600 pixels wide, each right to a
# ten-thousandth of a pixel; between drawn features, which differ wildly from pixel to pixel, that shows.
# da3metric-large with a drawn head at 84 x 1036: eager FP32 is itself 1.0e-4 from FP64 (99.9 %: 6.2e-5),
# ONNX Runtime 1.3e-4 from eager FP32.
SDT_FP32_TOLERANCES = {
    **FP32_TOLERANCES,
    **dict.fromkeys(_MAPS, Tolerance(p999=1e-4, max=3e-4)),
}
FP16_TOLERANCES = dict.fromkeys((*_MAPS, "rays", *_CAMERA), Tolerance(mean=3e-3, p999=3e-2))


@dataclass(frozen=True)
class Subject:
    """Something to compare with the reference.

    Attributes
    ----------
    artefact : Kind
        What it runs.
    arithmetic : str
        ``fp32``; ``fp16 weights``: FP16 stored values with FP32 arithmetic, as ONNX Runtime's CPU
        provider runs an FP16 graph; ``fp16``: every FP16 value rounded where the graph makes it.
    tolerances : dict[str, Tolerance]
        By output.
    sdt_tolerances : dict[str, Tolerance] | None
        The same for a graph with an SDT head, where they differ.
    every_case : bool
        Whether it is measured on every input shape, or on the first only.
    """

    artefact: Kind
    arithmetic: str
    tolerances: dict[str, Tolerance]
    sdt_tolerances: dict[str, Tolerance] | None = None
    every_case: bool = True

    def bounds(self, sdt: bool) -> dict[str, Tolerance]:
        """Tolerances by output, for a graph with or without an SDT head."""
        return self.sdt_tolerances if sdt and self.sdt_tolerances else self.tolerances

    def cases(self, cases: list[Case]) -> list[Case]:
        """Those of ``cases`` that it is measured on."""
        return cases if self.every_case else cases[:1]


FP32 = Subject(Kind.ONNX_FP32, "fp32", FP32_TOLERANCES, SDT_FP32_TOLERANCES)
# Shows that the file itself runs, and how much the arithmetic adds; nobody serves it this way.
FP16_WEIGHTS = Subject(Kind.ONNX_FP16, "fp16 weights", FP16_TOLERANCES, every_case=False)
FP16 = Subject(Kind.ONNX_FP16, "fp16", FP16_TOLERANCES)


@dataclass(frozen=True)
class Row:
    """One line of the report: one output of one subject on one case."""

    graph: str
    artefact: str
    arithmetic: str
    height: int
    width: int
    batch: int
    output: str
    mean: float
    p999: float
    max: float
    ok: bool

    @property
    def severity(self) -> tuple[bool, float]:
        """What rows are compared by: out of tolerance first, then the maximum; NaN is the largest."""
        return not self.ok, math.inf if math.isnan(self.max) else self.max


def all_cases(large: bool) -> list[Case]:
    """Every shape with every batch size; fewer and smaller ones for large models.

    The largest is measured with one image, and with the larger batch on the small ones.
    """
    if not large:
        return [Case(height, width, batch) for height, width in SHAPES for batch in BATCHES]
    *small, (height, width) = LARGE_SHAPES
    return [Case(h, w, b) for h, w in small for b in LARGE_BATCHES] + [Case(height, width, 1)]


def case_images(case: Case) -> NDArray[np.uint8]:
    """Real photographs resized to the case's shape, uint8 [B, H, W, 3]."""
    photos = sorted(PHOTOS.glob("*.jpg"))
    if not photos:
        raise ParityError("The photographs that parity is measured on are not installed.")
    limits = {"max_bytes": 2**24, "max_pixels": 2**24}
    chosen = [photos[i % len(photos)] for i in range(case.batch)]
    decoded = [decode_photo(photo.read_bytes(), **limits).rgb for photo in chosen]
    size = (case.width, case.height)
    return np.stack(
        [np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8) for rgb in decoded]
    )


def relative_errors(outputs: RawOutputs, reference: RawOutputs) -> dict[str, NDArray[np.float64]]:
    """Relative error of every number, by output.

    Depth and confidences: |a - b| / |b|. Sky: |a - b| / max(|b|, 1), as it is zero over most of a photo.
    Rays: |a - b| over the ray's length, direction and origin together. Intrinsics: |a - b| / |b| on fx,
    fy, cx, cy, the entries that are not constants. Rotation: |a - b|, as the entries of a rotation are
    at most one. Translation: |a - b| over the reference's length, or :data:`STILL`'s where that is more.
    """
    errors = {}
    for name in _MAPS:
        got, want = getattr(outputs, name), getattr(reference, name)
        if want is not None:
            want = want.astype(np.float64)
            size = np.maximum(np.abs(want), 1) if name == "sky" else np.abs(want)
            errors[name] = np.abs(got - want) / size
    if reference.rays is not None:
        assert outputs.rays is not None
        rays = reference.rays.astype(np.float64)
        errors["rays"] = np.abs(outputs.rays - rays) / np.linalg.norm(rays, axis=-1, keepdims=True)
    if reference.intrinsics is not None:
        assert outputs.intrinsics is not None
        focal_and_centre = np.s_[:, (0, 1, 0, 1), (0, 1, 2, 2)]
        want = reference.intrinsics[focal_and_centre].astype(np.float64)
        errors["intrinsics"] = np.abs(outputs.intrinsics[focal_and_centre] - want) / np.abs(want)
    if reference.extrinsics is not None:
        assert outputs.extrinsics is not None
        pose = reference.extrinsics.astype(np.float64)
        moved = np.abs(outputs.extrinsics - pose)
        length = np.linalg.norm(pose[:, :, 3], axis=1, keepdims=True)
        scene = reference.depth.mean(axis=(1, 2), dtype=np.float64)[:, None]
        errors["rotation"] = moved[:, :, :3]
        errors["translation"] = moved[:, :, 3] / np.maximum(length, STILL * scene)
    return errors


def compare(
    subject: Subject,
    case: Case,
    outputs: RawOutputs,
    reference: RawOutputs,
    graph: str = "model",
    sdt: bool = False,
) -> list[Row]:
    """Rows of the report for one subject on one case. NaN and infinity are out of tolerance.

    ``sdt`` says that the graph has an SDT head.
    """
    rows = []
    for output, errors in relative_errors(outputs, reference).items():
        measured = Statistics(
            float(errors.mean()), float(np.quantile(errors, 0.999)), float(errors.max())
        )
        ok = subject.bounds(sdt)[output].allows(measured)
        rows.append(Row(graph, subject.artefact, subject.arithmetic, *case, output, *measured, ok))
    return rows


def onnx_runner(path: Path, subject: Subject) -> Runner:
    """Run an ONNX file on the CPU with the subject's arithmetic."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if subject is FP16:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".half.", suffix=".onnx") as rounded:
            # Beside the original, whose weights it may refer to.
            model = onnx.load(str(path), load_external_data=False)
            spell_out_attention(model)
            rounded.write(round_like_half(model).SerializeToString())
            rounded.flush()
            session = ort.InferenceSession(rounded.name, options, providers=["CPUExecutionProvider"])
    else:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: NDArray[np.uint8]) -> RawOutputs:
        values = session.run(names, {"images": images})
        return RawOutputs.of(names, values)

    return run


@dataclass(frozen=True)
class Report:
    """The parity report, as ``parity.json`` holds it."""

    model: str
    head: str
    checkpoint_sha256: str
    artefacts: dict[str, str]
    rows: list[Row]
    not_checked: dict[str, str]
    method: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every row is within tolerance."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    def worst(self) -> list[Row]:
        """The worst row of each subject and output."""
        rows: dict[tuple[str, ...], Row] = {}
        for row in self.rows:
            key = (row.graph, row.artefact, row.arithmetic, row.output)
            if key not in rows or row.severity > rows[key].severity:
                rows[key] = row
        return list(rows.values())

    def to_json(self) -> str:
        """The report's text."""
        tolerances = {
            f"{subject.artefact} {subject.arithmetic}": {
                output: asdict(bound) for output, bound in subject.bounds(self.head == Head.SDT).items()
            }
            for subject in (FP32, FP16_WEIGHTS, FP16)
        }
        content = {
            "schema_version": SCHEMA_VERSION,
            "ok": self.ok,
            **asdict(self),
            "reference": "upstream modules, PyTorch eager, FP32, CPU",
            "tolerances": tolerances,
            "versions": {
                **{package: version(package) for package in ("torch", "depth-anything-3", "numpy")},
                # Its build for CUDA is a package of another name.
                "onnxruntime": ort.__version__,
            },
        }
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    def table(self) -> str:
        """The worst case of every output, as aligned text."""
        head = ("graph", "artefact", "arithmetic", "output", "worst at", "mean", "p99.9", "max", "")
        lines: list[tuple[str, ...]] = [head]
        for row in self.worst():
            errors = (f"{value:.1e}" for value in (row.mean, row.p999, row.max))
            where = f"{row.batch} x {row.height} x {row.width}"
            verdict = "ok" if row.ok else "OUT OF TOLERANCE"
            subject = (row.graph, row.artefact, row.arithmetic)
            lines.append((*subject, row.output, where, *errors, verdict))
        text = [aligned(lines)]
        text += [f"{file}: not checked, {reason}" for file, reason in self.not_checked.items()]
        return "\n".join(text)


class Parity:
    """Measures one graph: reference outputs first, then every subject against them.

    Parameters
    ----------
    graph : str
        Name of the graph.
    cases : list[Case]
        Input shapes to compare on.
    sdt : bool
        Whether it has an SDT head.
    """

    def __init__(self, graph: str, cases: list[Case], sdt: bool) -> None:
        self.graph = graph
        self.sdt = sdt
        self.cases = cases
        self.rows: list[Row] = []
        self._reference: dict[Case, RawOutputs] = {}

    def measure_reference(self, run: Runner, advance: Callable[[str], None]) -> None:
        """Run the reference on every case."""
        for case in self.cases:
            self._reference[case] = run(case_images(case))
            advance(f"{case.batch} x {case.height} x {case.width}")

    def measure(self, subject: Subject, run: Runner, advance: Callable[[str], None]) -> None:
        """Run a subject on its cases and compare."""
        for case in subject.cases(self.cases):
            outputs = run(case_images(case))
            self.rows += compare(subject, case, outputs, self._reference[case], self.graph, self.sdt)
            advance(f"{case.batch} x {case.height} x {case.width}")
