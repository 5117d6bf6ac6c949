"""Parity: is an engine's depth that of upstream's own modules in eager FP32?"""

from __future__ import annotations

import json
import time
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

from export.half_arithmetic import round_like_half
from runtime.backends.base import RawOutputs
from runtime.decode import decode_rgb
from runtime.errors import ParityError
from runtime.manifest import Kind

SCHEMA_VERSION = 1
SHAPES = ((364, 504), (504, 280), (504, 504), (84, 1036))
BATCHES = (1, 3)
PHOTOS = Path(__file__).resolve().parent.parent / "examples"

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


_MAPS = ("depth", "confidence")
_CAMERA = ("intrinsics", "rotation", "translation")
FP32_TOLERANCES = {
    **dict.fromkeys(_MAPS, Tolerance(max=1e-4)),
    **dict.fromkeys(_CAMERA, Tolerance(max=1e-3)),
}
FP16_TOLERANCES = dict.fromkeys((*_MAPS, *_CAMERA), Tolerance(mean=3e-3, p999=3e-2))


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
    """

    artefact: Kind
    arithmetic: str
    tolerances: dict[str, Tolerance]


FP32 = Subject(Kind.ONNX_FP32, "fp32", FP32_TOLERANCES)
FP16_WEIGHTS = Subject(Kind.ONNX_FP16, "fp16 weights", FP16_TOLERANCES)
FP16 = Subject(Kind.ONNX_FP16, "fp16", FP16_TOLERANCES)


@dataclass(frozen=True)
class Row:
    """One line of the report: one output of one subject on one case."""

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


def all_cases() -> list[Case]:
    """Every shape with every batch size."""
    return [Case(height, width, batch) for height, width in SHAPES for batch in BATCHES]


def case_images(case: Case) -> NDArray[np.uint8]:
    """Real photographs resized to the case's shape, uint8 [B, H, W, 3]."""
    photos = sorted(PHOTOS.glob("*.jpg"))
    if not photos:
        raise ParityError("Parity needs the photographs of the examples folder; there are none.")
    limits = {"max_bytes": 2**24, "max_pixels": 2**24}
    chosen = [photos[i % len(photos)] for i in range(case.batch)]
    decoded = [decode_rgb(photo.read_bytes(), **limits) for photo in chosen]
    size = (case.width, case.height)
    return np.stack(
        [np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8) for rgb in decoded]
    )


def relative_errors(outputs: RawOutputs, reference: RawOutputs) -> dict[str, NDArray[np.float64]]:
    """Relative error of every number, by output.

    Maps: |a - b| / |b|. Intrinsics: the same on fx, fy, cx, cy, the entries that are not constants.
    Rotation: |a - b|, as the entries of a rotation are at most one. Translation: |a - b| over the
    reference's length.
    """
    got = [np.asarray(value, np.float64) for value in outputs]
    want = [np.asarray(value, np.float64) for value in reference]
    depth, confidence = (np.abs(a - b) / np.abs(b) for a, b in zip(got[:2], want[:2], strict=True))
    focal_and_centre = np.s_[:, (0, 1, 0, 1), (0, 1, 2, 2)]
    a, b = got[2][focal_and_centre], want[2][focal_and_centre]
    moved = np.abs(got[3] - want[3])
    length = np.linalg.norm(want[3][:, :, 3], axis=1, keepdims=True)
    return {
        "depth": depth,
        "confidence": confidence,
        "intrinsics": np.abs(a - b) / np.abs(b),
        "rotation": moved[:, :, :3],
        "translation": moved[:, :, 3] / length,
    }


def compare(subject: Subject, case: Case, outputs: RawOutputs, reference: RawOutputs) -> list[Row]:
    """Rows of the report for one subject on one case. NaN and infinity are out of tolerance."""
    rows = []
    for output, errors in relative_errors(outputs, reference).items():
        measured = Statistics(
            float(errors.mean()), float(np.quantile(errors, 0.999)), float(errors.max())
        )
        ok = subject.tolerances[output].allows(measured)
        rows.append(Row(subject.artefact, subject.arithmetic, *case, output, *measured, ok))
    return rows


def onnx_runner(path: Path, subject: Subject) -> Runner:
    """Run an ONNX file on the CPU with the subject's arithmetic."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    source: Path | bytes = path
    if subject is FP16:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        source = round_like_half(onnx.load(str(path))).SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return lambda images: RawOutputs(*session.run(RawOutputs._fields, {"images": images}))


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
        """The row with the largest maximum for each subject and output."""
        rows: dict[tuple[str, str, str], Row] = {}
        for row in self.rows:
            key = (row.artefact, row.arithmetic, row.output)
            # "not <" rather than ">": NaN must win.
            if key not in rows or not row.max < rows[key].max:
                rows[key] = row
        return list(rows.values())

    def to_json(self) -> str:
        """The report's text."""
        tolerances = {
            f"{subject.artefact} {subject.arithmetic}": {
                output: asdict(bound) for output, bound in subject.tolerances.items()
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
                package: version(package)
                for package in ("torch", "depth-anything-3", "onnxruntime", "numpy")
            },
        }
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    def table(self) -> str:
        """The worst case of every output, as aligned text."""
        head = ("artefact", "arithmetic", "output", "worst at", "mean", "p99.9", "max", "")
        lines: list[tuple[str, ...]] = [head]
        for row in self.worst():
            errors = (f"{value:.1e}" for value in (row.mean, row.p999, row.max))
            where = f"{row.batch} x {row.height} x {row.width}"
            verdict = "ok" if row.ok else "OUT OF TOLERANCE"
            lines.append((row.artefact, row.arithmetic, row.output, where, *errors, verdict))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        text += [f"{kind}: not checked, {reason}" for kind, reason in self.not_checked.items()]
        return "\n".join(text)


class Parity:
    """Collects a report: reference outputs first, then every subject against them.

    Parameters
    ----------
    cases : list[Case]
        Input shapes to compare on.
    """

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases
        self._reference: dict[Case, RawOutputs] = {}
        self._rows: list[Row] = []
        self._start = time.perf_counter()

    def measure_reference(self, run: Runner, advance: Callable[[str], None]) -> None:
        """Run the reference on every case."""
        for case in self.cases:
            self._reference[case] = run(case_images(case))
            advance(f"{case.batch} x {case.height} x {case.width}")

    def measure(self, subject: Subject, run: Runner, advance: Callable[[str], None]) -> None:
        """Run a subject on every case and compare."""
        for case in self.cases:
            outputs = run(case_images(case))
            self._rows += compare(subject, case, outputs, self._reference[case])
            advance(f"{case.batch} x {case.height} x {case.width}")

    def report(
        self,
        model: str,
        head: str,
        checkpoint_sha256: str,
        artefacts: dict[str, str],
        not_checked: dict[str, str],
        method: str,
    ) -> Report:
        """The report of everything measured so far.

        Parameters
        ----------
        artefacts : dict[str, str]
            Digest of every artefact of the folder, by kind.
        not_checked : dict[str, str]
            Artefacts that could not be run here, with the reason.
        method : str
            Digest of the measuring code.
        """
        seconds = round(time.perf_counter() - self._start, 1)
        return Report(
            model, head, checkpoint_sha256, artefacts, self._rows, not_checked, method, seconds
        )
