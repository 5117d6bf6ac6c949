"""One model and head: checkpoint -> ONNX -> plan -> parity report -> engine folder.

Everything is made in a staging folder and published only when every measured artefact is within its
parity tolerance. :mod:`da3_export.freshness` decides which artefacts of an earlier build are kept.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from filelock import FileLock, Timeout

from da3_export.freshness import Freshness, GraphBuild
from da3_export.onnx_fusion import fuse_onnx
from da3_export.onnx_int8 import write_int8
from da3_export.onnx_to_plan import LIBRARIES, PROFILES, build_plan, library_version, plan_here
from da3_export.parity.measure import GraphParity, make_report, steps_to_measure
from da3_export.parity.report import Report
from da3_export.publish_folder import publish_folder
from da3_export.request import Request
from da3_export.torch_to_onnx import data_of, export_onnx
from da3_export.util.memory import PeakMemory
from da3_export.util.progress import Progress
from da3_export.weights import find_weights
from da3_runtime.errors import BuildError, ManifestError, ParityError
from da3_runtime.network import precision
from da3_runtime.network.load import load_network
from da3_runtime.network_io import input_specs, output_specs
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.manifest import (
    Artefact,
    GraphEntry,
    Kind,
    Manifest,
    describe,
    read_manifest,
)
from da3_runtime.variants import PATCH, Graph

TIMING_CACHES = ".timing-cache"  # folder in ENGINE_DIR
# File names after the graph's name; the GPU of a TensorRT plan is part of it.
ENDINGS = {
    Kind.ONNX_FP32: "fp32.onnx",
    Kind.ONNX_FP16: "fp16.onnx",
    Kind.ONNX_FP16_ORT: "fp16.ort.onnx",
    Kind.ONNX_BF16: "bf16.onnx",
    Kind.ONNX_INT8: "int8.onnx",
    Kind.TENSORRT_RTX: "fp16.rtx.plan",
    Kind.TENSORRT: "fp16.{}.trt.plan",
}
ONNX_PRECISION = {
    Kind.ONNX_FP32: precision.FP32,
    Kind.ONNX_FP16: precision.FP16,
    Kind.ONNX_BF16: precision.UPSTREAM_GPU,
}


def build(request: Request) -> Manifest:
    """Build the artefacts of an engine that are missing or out of date, and publish the engine.

    Raises
    ------
    CheckpointError
        If the weights cannot be found or do not fit.
    BuildError, ParityError
        If a step fails or an artefact is out of tolerance; the engine folder stays as it was.
    """
    parent = request.folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(parent / f".{request.head}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            Progress(request.title, 0).log("another build is running; waiting for it.")
            lock.acquire()
        try:
            return _Build(request).run()
        finally:
            lock.release()
    except OSError as error:
        reason = error.strerror or "input/output error"
        raise BuildError(f"{request.title}: {reason} while writing the engine folder.") from error


class _Build:
    """One run of :func:`build`, with the lock held."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._staging = request.folder.parent / f".{request.head}.staging"
        self._old = _old_manifest(request.folder)
        self._plans = {
            kind: plan_here(kind, request.hardware_compatible, request.version_compatible)
            for kind in request.targets
            if kind in LIBRARIES
        }

    def run(self) -> Manifest:
        shutil.rmtree(self._staging, ignore_errors=True)  # left by a build that was killed
        self._staging.mkdir()
        try:
            with PeakMemory() as memory:
                built = self._run()
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
        log = Progress(self._request.title, 0).log
        if built is None:
            assert self._old is not None
            log("up to date.")
            return self._old
        manifest, report = built
        log(f"peak anonymous memory {memory} GB")
        print(report.table())
        return manifest

    def _run(self) -> tuple[Manifest, Report] | None:
        """Build and publish; None if the engine folder is up to date."""
        self._weights = find_weights(self._request, self._old, self._staging)
        self._freshness = Freshness(self._request, self._plans, self._weights, self._old)
        builds = self._freshness.graph_builds()
        for sentence in self._freshness.removed:
            Progress(self._request.title, 0).log(sentence)
        if self._freshness.is_up_to_date(builds):
            return None
        return self._make(builds)

    def _make(self, builds: list[GraphBuild]) -> tuple[Manifest, Report]:
        request = self._request
        start = time.perf_counter()
        self._progress = Progress(request.title, sum(_steps(graph_build) for graph_build in builds))
        # All ONNX first: plans take long, and a graph out of tolerance needs none.
        measured = [self._export_and_measure(graph_build) for graph_build in builds]
        self._require_parity(make_report(measured, self._manifest(builds), 0), builds)
        for graph_build in builds:
            self._build_plans(graph_build)
        manifest = self._manifest(builds)
        for graph_build, measuring in zip(builds, measured, strict=True):
            for entry in graph_build.artefacts.values():
                if entry.kind in LIBRARIES:
                    staged = (self._staging / entry.files[0].name).exists()
                    path = self._staging if staged else request.folder
                    measuring.measure_plan(
                        EngineFolder(request.variant, request.head, path, manifest), entry
                    )
        report = make_report(measured, manifest, time.perf_counter() - start)
        self._require_parity(report, builds)
        manifest = manifest.with_parity(report.parity)
        publish_folder(request.folder, self._staging, manifest, report)
        return manifest, report

    def _export_and_measure(self, graph_build: GraphBuild) -> GraphParity:
        graph = graph_build.graph
        measuring = GraphParity(self._request.variant, graph, self._weights, self._progress)
        measuring.run_reference()
        graph_build.artefacts |= graph_build.kept
        for kind in graph_build.exports:
            step = f"{graph.key}: export {kind}"
            with self._progress.step(step):
                self._export(graph_build, kind)
            graph_build.artefacts[kind] = self._artefact(graph_build, kind, step)
        for kind in graph_build.onnx:
            measuring.measure_onnx(kind, self._path_of(graph, kind))
        return measuring

    def _export(self, graph_build: GraphBuild, kind: Kind) -> None:
        graph = graph_build.graph
        path = self._staging / self._file(graph, kind)
        if kind is Kind.ONNX_FP16_ORT:
            source = self._path_of(graph, Kind.ONNX_FP16)
            if source.parent != self._staging:
                link_or_copy(data_of(source), self._staging / data_of(source).name)
            fuse_onnx(source, path)
        elif kind is not Kind.ONNX_INT8:
            self._export_network(graph, kind, path)
        elif self._freshness.is_of_this_version(graph, graph_build.artefacts.get(Kind.ONNX_FP32)):
            write_int8(self._path_of(graph, Kind.ONNX_FP32), path)
        else:
            with tempfile.TemporaryDirectory(dir=self._staging) as folder:
                source = Path(folder, self._file(graph, Kind.ONNX_FP32))
                self._export_network(graph, Kind.ONNX_FP32, source)
                write_int8(source, path)

    def _export_network(self, graph: Graph, kind: Kind, path: Path) -> None:
        network = load_network(
            self._request.variant,
            graph,
            self._weights.checkpoint.path,
            ONNX_PRECISION[kind],
            self._weights.sdt_of(graph),
            fold=True,
        )
        export_onnx(network, path)

    def _build_plans(self, graph_build: GraphBuild) -> None:
        graph = graph_build.graph
        for kind in graph_build.plans:
            onnx = self._path_of(graph, Kind.ONNX_FP16)
            plan = self._staging / self._file(graph, kind)
            timing_caches = self._request.engine_dir / TIMING_CACHES
            name = self._freshness.name(kind)
            step = f"{graph.key}: build {name}"
            with self._progress.step(step) as advance:
                build_plan(self._plans[kind], onnx, plan, timing_caches, advance)
            graph_build.artefacts[name] = self._artefact(graph_build, kind, step)

    def _artefact(self, graph_build: GraphBuild, kind: Kind, step: str) -> Artefact:
        """Manifest entry of an artefact that ``step`` made in the staging folder."""
        path = self._staging / self._file(graph_build.graph, kind)
        holder = Kind.ONNX_FP16 if kind is Kind.ONNX_FP16_ORT else kind
        data = data_of(self._staging / self._file(graph_build.graph, holder))
        plan = self._plans.get(kind)
        return Artefact(
            kind=kind,
            files=[describe(file) for file in (path, data) if file.exists()],
            precision=precision_of(kind),
            fingerprint=self._freshness.fingerprint(graph_build, kind),
            build_seconds=round(self._progress.seconds[step], 2),
            toolchain=self._freshness.toolchain(graph_build, kind),
            library="" if plan is None else library_version(kind),
            compute_capabilities=[] if plan is None else list(plan.compute_capabilities),
            version_compatible=plan is not None and plan.version_compatible,
        )

    def _manifest(self, builds: list[GraphBuild]) -> Manifest:
        variant = self._request.variant
        return Manifest(
            model=variant.model_id,
            head=self._request.head,
            licence=variant.license,
            unit=variant.unit,
            source=self._weights.source,
            head_source=self._weights.head_source,
            side_multiple=PATCH,
            profiles=PROFILES,
            graphs={
                each.graph.key: GraphEntry(
                    input_specs(each.graph.series.inputs),
                    output_specs(each.graph.outputs),
                    each.artefacts,
                )
                for each in builds
            },
        )

    def _require_parity(self, report: Report, builds: list[GraphBuild]) -> None:
        if report.ok:
            return
        kept = {f"{each.graph.key} {name}" for each in builds for name in each.kept}
        failed = {f"{row.graph} {row.artefact}" for row in report.rows if not row.ok}
        advice = "".join(
            f"\n{name} is from an earlier build; add it to TARGETS to build it again."
            for name in sorted(kept & failed)
        )
        raise ParityError(
            f"{self._request.title} is out of tolerance and was not published:\n{report.table()}{advice}"
        )

    def _file(self, graph: Graph, kind: Kind) -> str:
        target = self._plans[kind].target if kind in self._plans else ""
        return f"{graph.key}.{ENDINGS[kind].format(target)}"

    def _path_of(self, graph: Graph, kind: Kind) -> Path:
        """Where an artefact is before publishing: staged, or kept in the engine folder."""
        staged = self._staging / self._file(graph, kind)
        return staged if staged.exists() else self._request.folder / staged.name


def precision_of(kind: Kind) -> str:
    """Precision of an artefact, as its manifest says; plans are in FP16."""
    return "int8" if kind is Kind.ONNX_INT8 else ONNX_PRECISION.get(kind, precision.FP16).name


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _old_manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except ManifestError:
        return None


def _steps(graph_build: GraphBuild) -> int:
    """Steps of progress that one graph takes."""
    kept = [entry.kind for entry in graph_build.kept.values() if entry.kind in LIBRARIES]
    measured = sum(steps_to_measure(kind) for kind in (*graph_build.onnx, *graph_build.plans, *kept))
    return 1 + len(graph_build.exports) + len(graph_build.plans) + measured
