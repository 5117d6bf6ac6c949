"""Measure engines: upstream's modules first, then every artefact against them."""

from __future__ import annotations

import time
from pathlib import Path

from da3_export import freshness
from da3_export.claims import experience_with
from da3_export.onnx_to_plan import LIBRARIES
from da3_export.parity import cases
from da3_export.parity.cases import Case, case_cameras, case_images
from da3_export.parity.eager_bf16 import eager_bounds
from da3_export.parity.plans import load_plan, plan_subject, unmeasurable
from da3_export.parity.reference import Reference, run_reference
from da3_export.parity.report import Report, Row, compare
from da3_export.parity.subjects import BF16, SUBJECTS, Runner, Subject, onnx_runner
from da3_export.parity.upstream import load_upstream
from da3_export.settings import BuildSettings
from da3_export.util.progress import Advance, Progress
from da3_export.weights import Weights
from da3_runtime.errors import ManifestError
from da3_runtime.network.load import feature_width, load_sdt
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.engine_weights import engine_checkpoint, engine_sdt
from da3_runtime.store.find_engine import local_engine
from da3_runtime.store.manifest import (
    MANIFEST_NAME,
    PARITY_NAME,
    Artefact,
    Kind,
    Manifest,
    Parity,
    verified_path,
)
from da3_runtime.util.files import write_atomically
from da3_runtime.variants import Graph, Head, Series, Variant


class GraphParity:
    """Measures the artefacts of one graph.

    Parameters
    ----------
    variant, graph : Variant, Graph
        The network.
    weights : Weights
        What it was made from.
    progress : Progress
        Where each measurement is one step.

    Attributes
    ----------
    rows : list[Row]
        The errors measured so far.
    verdicts : dict[str, bool]
        Whether a measured artefact is within tolerance, by ``GRAPH NAME``.
    not_checked : dict[str, str]
        Why an artefact could not be measured here, and how far the project has run its kind, by
        ``GRAPH NAME``.
    """

    def __init__(self, variant: Variant, graph: Graph, weights: Weights, progress: Progress) -> None:
        self.rows: list[Row] = []
        self.verdicts: dict[str, bool] = {}
        self.not_checked: dict[str, str] = {}
        self._variant = variant
        self._graph = graph
        self._weights = weights
        self._sdt = weights.sdt_of(graph)
        self._progress = progress
        self._cases = cases.all_cases(variant.above_half_billion, graph.series is Series.ANYVIEW)
        self._references: dict[Case, Reference] = {}

    def run_reference(self) -> None:
        """Run upstream's modules on every case; the other methods compare with the outputs.

        Raises
        ------
        CheckpointError
            If the weights do not fit.
        """
        with self._progress.step(f"{self._graph.key}: reference", len(self._cases)) as advance:
            upstream = load_upstream(self._variant, self._graph, self._weights.checkpoint.path)
            sdt = load_sdt(feature_width(self._graph), self._sdt) if self._sdt else None
            for case in self._cases:
                images = case_images(case)
                self._references[case] = run_reference(
                    upstream, images, self._graph, sdt, case_cameras(case)
                )
                advance(str(case))

    def measure_onnx(self, kind: Kind, path: Path) -> None:
        """Measure an ONNX file in each arithmetic of its kind, or note why it cannot run here."""
        reason = unmeasurable(kind)
        if reason is not None:
            self._skip(kind, kind, reason)
            return
        for subject in SUBJECTS[kind]:
            name = f"{self._graph.key}: parity {kind} ({subject.arithmetic})"
            with self._progress.step(name, len(subject.cases(self._cases))) as advance:
                self._compare(kind, subject, onnx_runner(path, subject), advance)

    def measure_plan(self, folder: EngineFolder, plan: Artefact) -> None:
        """Measure one of a folder's plans on this machine's GPU, or note why it cannot be measured.

        Raises
        ------
        InferenceError
            If the plan can be loaded and fails.
        """
        reason = unmeasurable(plan.kind)
        if reason is not None:
            self._skip(plan.name, plan.kind, reason)
            return
        subject = plan_subject(plan.kind)
        name = f"{self._graph.key}: parity {plan.name}"
        with self._progress.step(name, len(subject.cases(self._cases))) as advance:
            backend = load_plan(folder, self._graph, plan)
            if isinstance(backend, str):
                self._skip(plan.name, plan.kind, backend)
                return
            try:
                self._compare(plan.name, subject, backend.run, advance)
            finally:
                backend.close()

    def _skip(self, name: str, kind: Kind, reason: str) -> None:
        self.not_checked[f"{self._graph.key} {name}"] = f"{reason}. {experience_with(kind)}".rstrip()

    def _compare(self, name: str, subject: Subject, run: Runner, advance: Advance) -> None:
        rows: list[Row] = []
        bounds = None
        if subject is BF16:
            bounds = eager_bounds(
                self._variant,
                self._graph,
                self._weights.checkpoint.path,
                self._sdt,
                self._references,
            )
        for case in subject.cases(self._cases):
            reference, images = self._references[case], case_images(case)
            outputs = run(images, reference.conditions(subject.is_coarse))
            has_sdt = self._sdt is not None
            rows += compare(subject, case, outputs, reference, self._graph.key, has_sdt, bounds)
            advance(str(case))
        self.rows += rows
        key = f"{self._graph.key} {name}"
        self.verdicts[key] = bool(rows) and all(row.ok for row in rows) and self.verdicts.get(key, True)


def measure_engine(settings: BuildSettings) -> Report:
    """Measure the engine that the settings name again; rewrite its report, and parity in its manifest.

    Raises
    ------
    ManifestError, ArtefactError
        If no engine was built, or it is damaged.
    CheckpointError
        If the weights that it was built from cannot be found.
    """
    folder = local_engine(settings)
    variant, head, manifest = folder.variant, folder.head, folder.manifest
    if manifest is None:
        raise ManifestError(
            f"No engine was built for {variant.model_id} with head {head}; run 'make engines' first."
        )
    weights = Weights(
        engine_checkpoint(folder, settings),
        engine_sdt(folder, settings) if head is Head.SDT else None,
        manifest.source,
        manifest.head_source,
    )
    files = {
        graph: [
            (entry, verified_path(folder.path, entry))
            for entry in manifest.graphs[graph.key].artefacts.values()
        ]
        for graph in (*variant.graphs, *variant.ray_graphs)
        if graph.key in manifest.graphs
    }
    steps = sum(steps_to_measure(entry.kind) for entries in files.values() for entry, _ in entries)
    progress = Progress(f"{variant.model_id}/{head}", len(files) + steps)
    start = time.perf_counter()
    measured = []
    for graph, entries in files.items():
        measuring = GraphParity(variant, graph, weights, progress)
        measured.append(measuring)
        measuring.run_reference()
        for entry, file in entries:
            if entry.kind in LIBRARIES:
                measuring.measure_plan(folder, entry)
            else:
                measuring.measure_onnx(entry.kind, file)
    report = make_report(measured, manifest, time.perf_counter() - start)
    write_atomically(folder.path / PARITY_NAME, report.to_json().encode())
    verified = manifest.with_parity(report.parity)
    if verified != manifest:
        write_atomically(folder.path / MANIFEST_NAME, verified.to_json().encode())
    return report


def steps_to_measure(kind: Kind) -> int:
    """How many steps of progress an artefact of ``kind`` takes on this machine."""
    if unmeasurable(kind) is not None:
        return 0
    return 1 if kind in LIBRARIES else len(SUBJECTS[kind])


def make_report(measured: list[GraphParity], manifest: Manifest, seconds: float) -> Report:
    """The report of an engine whose graphs were measured.

    An artefact that could not be measured now keeps the parity that its manifest entry has.
    """
    verdicts = {name: is_ok for graph in measured for name, is_ok in graph.verdicts.items()}
    parity = {
        f"{key} {name}": entry.parity
        for key, graph in manifest.graphs.items()
        for name, entry in graph.artefacts.items()
    }
    parity |= {name: Parity.VERIFIED if is_ok else Parity.UNVERIFIED for name, is_ok in verdicts.items()}
    return Report(
        model=manifest.model,
        head=manifest.head,
        checkpoint_sha256=manifest.source.sha256,
        artefacts=manifest.digests(),
        parity=parity,
        rows=[row for graph in measured for row in graph.rows],
        not_checked={name: why for graph in measured for name, why in graph.not_checked.items()},
        method=str(freshness.PARITY_VERSION),
        seconds=round(seconds, 1),
    )
