"""The parity report: errors of every artefact against the reference, as ``parity.json`` holds them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version

import onnxruntime as ort

from da3_export.parity.cases import Case
from da3_export.parity.reference import Reference
from da3_export.parity.subjects import SUBJECTS, Subject
from da3_export.parity.tolerances import (
    ORDER,
    Statistics,
    Tolerance,
    order_error,
    relative_errors,
)
from da3_export.util.progress import aligned
from da3_runtime.network_io import RawOutputs
from da3_runtime.store.manifest import Parity
from da3_runtime.variants import Head

SCHEMA_VERSION = 2
# What the reference depends on.
_PACKAGES = ("torch", "depth-anything-3", "numpy")


@dataclass(frozen=True)
class Row:
    """One line of the report: errors of one output of one subject on one case.

    The first fields after ``arithmetic`` are the case's. ``margin`` is :attr:`Reference.margin`, None
    without a choice of the reference view. ``forced`` is :attr:`Reference.is_forced`.
    """

    graph: str
    artefact: str
    arithmetic: str
    height: int
    width: int
    batch: int
    views: int
    known: bool
    margin: float | None
    forced: bool
    output: str
    mean: float
    p999: float
    max: float
    ok: bool

    @property
    def severity(self) -> tuple[bool, float]:
        """Sort key: a row out of tolerance is worse, then one with a larger maximum; NaN is largest."""
        return not self.ok, math.inf if math.isnan(self.max) else self.max


def compare(
    subject: Subject,
    case: Case,
    outputs: RawOutputs,
    reference: Reference,
    graph: str = "model",
    sdt: bool = False,
    bounds: Mapping[str, Tolerance] | None = None,
) -> list[Row]:
    """Rows of one subject on one case. NaN and infinity are out of tolerance.

    Parameters
    ----------
    sdt : bool
        Whether the graph has an SDT head.
    bounds : Mapping[str, Tolerance] | None
        Tolerances of some of the outputs, instead of the subject's.
    """
    rows = []
    allowed = subject.bounds(sdt) | dict(bounds or {})
    margin = reference.margin if math.isfinite(reference.margin) else None
    choice = (margin, reference.is_forced)
    found = relative_errors(outputs, reference.outputs)
    if subject.is_coarse:
        found[ORDER] = order_error(outputs.depth, reference.outputs.depth)
    for output, errors in found.items():
        measured = Statistics.of(errors)
        ok = allowed[output].allows(measured)
        rows.append(
            Row(graph, subject.artefact, subject.arithmetic, *case, *choice, output, *measured, ok)
        )
    return rows


@dataclass(frozen=True)
class Report:
    """Parity of one engine folder.

    Attributes
    ----------
    model, head : str
        The engine.
    checkpoint_sha256 : str
        Digest of the checkpoint that it was built from.
    artefacts : dict[str, str]
        Digest of every artefact in the folder, by ``GRAPH NAME``.
    parity : dict[str, Parity]
        Whether each artefact is verified, now or by an earlier measurement, by ``GRAPH NAME``.
    rows : list[Row]
        The measured errors.
    not_checked : dict[str, str]
        Why an artefact could not be measured here, and how far the project has run its kind, by
        ``GRAPH NAME``.
    method : str
        Version of the way to measure (:data:`da3_export.freshness.PARITY_VERSION`).
    seconds : float
        Wall clock of the build or measurement.
    """

    model: str
    head: str
    checkpoint_sha256: str
    artefacts: dict[str, str]
    parity: dict[str, Parity]
    rows: list[Row]
    not_checked: dict[str, str]
    method: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every measured row is within tolerance. It says nothing about :attr:`not_checked`."""
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
        """Text of ``parity.json``."""
        measured = {(row.artefact, row.arithmetic) for row in self.rows}
        tolerances = {
            f"{subject.artefact} {subject.arithmetic}": {
                output: asdict(bound) for output, bound in subject.bounds(self.head == Head.SDT).items()
            }
            for subjects in SUBJECTS.values()
            for subject in subjects
            if (subject.artefact, subject.arithmetic) in measured
        }
        content = {
            "schema_version": SCHEMA_VERSION,
            "ok": self.ok,
            **asdict(self),
            "reference": "upstream modules, PyTorch eager, FP32, CPU",
            "tolerances": tolerances,
            "versions": {
                **{package: version(package) for package in _PACKAGES},
                # From the module: the build for CUDA is a package of another name.
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
            where = str(Case(row.height, row.width, row.batch, row.views, row.known))
            verdict = "ok" if row.ok else "OUT OF TOLERANCE"
            subject = (row.graph, row.artefact, row.arithmetic)
            lines.append((*subject, row.output, where, *errors, verdict))
        text = [aligned(lines)]
        text += [
            f"{name}: {self.parity[name]}, not measured here because {reason}"
            for name, reason in self.not_checked.items()
        ]
        return "\n".join(text)
