"""One model and head: checkpoint -> ONNX -> plan -> parity report -> engine folder.

Everything is made in a staging folder and published only when parity holds: the old manifest goes first,
the artefacts move in, the new manifest comes last. Whoever looks in between, or after a crash, finds a
folder without a manifest, which is no engine.

What a build was not asked for stays in the folder as long as it is whole and was made from the same
weights by the same sources, with whatever package versions it records: a machine without a GPU or
without TensorRT keeps the plans that others added.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from filelock import FileLock, Timeout

import da3_export.onnx_attention
import da3_export.onnx_to_plan
import da3_export.parity.fp16_emulation
import da3_export.parity.plans
import da3_export.parity.reference
import da3_export.parity.report
import da3_export.parity.upstream
import da3_export.torch_to_onnx
import da3_runtime.network.camera_decoder
import da3_runtime.network.dpt
import da3_runtime.network.dysample
import da3_runtime.network.load
import da3_runtime.network.network
import da3_runtime.network.positions
import da3_runtime.network.precision
import da3_runtime.network.sdt
import da3_runtime.network.sizes
import da3_runtime.network.vit
from da3_export.onnx_to_plan import LIBRARIES, PROFILES, Plan, build_plan, library_version, plan_here
from da3_export.parity.plans import measure_plan, unmeasurable
from da3_export.parity.reference import run_reference
from da3_export.parity.report import (
    FP16,
    FP16_WEIGHTS,
    FP32,
    Parity,
    Report,
    Subject,
    all_cases,
    onnx_runner,
)
from da3_export.parity.upstream import load_upstream
from da3_export.random_weights import seed_of, write_random_checkpoint, write_random_sdt
from da3_export.settings import BuildSettings
from da3_export.torch_to_onnx import export_onnx
from da3_export.util.memory import PeakMemory
from da3_export.util.progress import Progress
from da3_runtime.errors import (
    ArtefactError,
    BuildError,
    CheckpointError,
    ManifestError,
    ParityError,
    SettingError,
)
from da3_runtime.network import precision
from da3_runtime.network.load import feature_width, load_network, load_sdt
from da3_runtime.network_io import INPUTS, output_specs
from da3_runtime.store.checkpoint import (
    HUB,
    RANDOM_PREFIX,
    SDT_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    bundled_sdt,
    find_checkpoint,
    find_sdt,
    random_seed,
)
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.engine_weights import engine_checkpoint, engine_sdt
from da3_runtime.store.find_engine import local_engine
from da3_runtime.store.manifest import (
    CHECKPOINT_DIR,
    MANIFEST_NAME,
    PARITY_NAME,
    Artefact,
    GraphEntry,
    Kind,
    Manifest,
    Source,
    describe,
    read_manifest,
    sha256_of,
    verified_path,
)
from da3_runtime.util.files import write_atomically
from da3_runtime.variants import PATCH, Graph, Head, Variant, check_ray_pose, find_head, find_variant

DEFAULT_TARGETS = (Kind.ONNX_FP32, Kind.ONNX_FP16, Kind.TENSORRT_RTX)
TIMING_CACHES = ".timing-cache"  # in ENGINE_DIR
# File names after the graph's name; a TensorRT plan's says which GPU it is for.
ENDINGS = {
    Kind.ONNX_FP32: "fp32.onnx",
    Kind.ONNX_FP16: "fp16.onnx",
    Kind.TENSORRT_RTX: "fp16.rtx.plan",
    Kind.TENSORRT: "fp16.{}.trt.plan",
}
DATA_ENDING = ".data"  # what the exporter appends for weights that lie apart
ONNX_PRECISION = {Kind.ONNX_FP32: precision.FP32, Kind.ONNX_FP16: precision.FP16}
SUBJECTS: dict[Kind, tuple[Subject, ...]] = {
    Kind.ONNX_FP32: (FP32,),
    Kind.ONNX_FP16: (FP16_WEIGHTS, FP16),
}
HEAD_SEED = 0  # of an SDT head that nobody trained
# Whose source decides what an artefact contains. A plan also depends on the ONNX it is made from.
NETWORK_SOURCES: tuple[ModuleType, ...] = (
    da3_runtime.network.camera_decoder,
    da3_runtime.network.dpt,
    da3_runtime.network.dysample,
    da3_runtime.network.load,
    da3_runtime.network.network,
    da3_runtime.network.positions,
    da3_runtime.network.precision,
    da3_runtime.network.sdt,
    da3_runtime.network.sizes,
    da3_runtime.network.vit,
    da3_export.torch_to_onnx,
)
PLAN_SOURCES: tuple[ModuleType, ...] = (da3_export.onnx_attention, da3_export.onnx_to_plan)
PARITY_SOURCES: tuple[ModuleType, ...] = (
    da3_export.onnx_attention,
    da3_export.parity.fp16_emulation,
    da3_export.parity.report,
    da3_export.parity.plans,
    da3_export.parity.reference,
    da3_export.parity.upstream,
)


@dataclass(frozen=True)
class Request:
    """What to build.

    Attributes
    ----------
    variant, head : Variant, Head
        The engine.
    weights, revision : str, str | None
        ``WEIGHTS`` and ``REVISION``.
    sdt_weights, sdt_fusion_channels : str | None, int
        ``SDT_WEIGHTS`` and ``SDT_FUSION_CHANNELS``.
    ray_pose : bool
        Whether the graphs with a ray branch are built too.
    hardware_compatible, version_compatible : bool
        ``HARDWARE_COMPATIBLE`` and ``VERSION_COMPATIBLE``, of a TensorRT plan.
    targets : tuple[Kind, ...]
        Artefacts that must be there at the end.
    engine_dir : Path
        Where engine folders lie.
    """

    variant: Variant
    head: Head
    weights: str
    revision: str | None
    sdt_weights: str | None
    sdt_fusion_channels: int
    ray_pose: bool
    hardware_compatible: bool
    version_compatible: bool
    targets: tuple[Kind, ...]
    engine_dir: Path

    @property
    def folder(self) -> Path:
        """The engine folder."""
        return self.engine_dir / self.variant.model_id / self.head

    @property
    def title(self) -> str:
        """Name of the engine in messages."""
        return f"{self.variant.model_id}/{self.head}"


@dataclass(frozen=True)
class Weights:
    """Everything an engine is made from, on disk.

    Attributes
    ----------
    checkpoint, sdt : Checkpoint, Checkpoint | None
        The variant's checkpoint, and the SDT head's if the engine has one.
    source, head_source : Source, Source | None
        The same as the manifest has them.
    """

    checkpoint: Checkpoint
    sdt: Checkpoint | None
    source: Source
    head_source: Source | None

    def sdt_of(self, graph: Graph) -> Path | None:
        """File of the SDT head, if ``graph`` has one."""
        return self.sdt.path if self.sdt is not None and graph.takes_sdt else None

    def digests(self) -> list[str | None]:
        """Digests of both files."""
        return [self.source.sha256, self.head_source.sha256 if self.head_source else None]


def request_of(settings: BuildSettings, targets: str | None) -> Request:
    """The request that settings and a comma-separated ``TARGETS`` make.

    Raises
    ------
    SettingError
        If a model, head or target does not exist, or the engine has no rays to build.
    """
    variant, head = find_variant(settings.model_id), find_head(settings.head)
    if settings.ray_pose:
        check_ray_pose(variant, head)
    weights = settings.weights or HUB
    if weights.startswith(RANDOM_PREFIX):
        seed_of(weights)
    names = [name.strip().lower() for name in (targets or "").split(",") if name.strip()]
    unknown = [name for name in names if name not in list(Kind)]
    if unknown:
        known = ", ".join(Kind)
        raise SettingError(f"TARGETS {unknown[0]!r} is not one of: {known}.")
    return Request(
        variant,
        head,
        weights,
        settings.revision,
        settings.sdt_weights,
        settings.sdt_fusion_channels or variant.sdt_fusion_channels,
        settings.ray_pose,
        settings.hardware_compatible,
        settings.version_compatible,
        tuple(dict.fromkeys(Kind(name) for name in names)) or DEFAULT_TARGETS,
        settings.engine_dir,
    )


def build(request: Request) -> Manifest:
    """Build what is missing or out of date; see the module's docstring for how it is published.

    Raises
    ------
    CheckpointError
        If the weights cannot be had or do not fit.
    BuildError, ParityError
        If a step fails or an artefact is out of tolerance; nothing of the build is published then.
    """
    parent = request.folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(parent / f".{request.head}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            Progress(request.title, 0).say("another build is running; waiting for it.")
            lock.acquire()
        try:
            return _Build(request).run()
        finally:
            lock.release()
    except OSError as error:
        reason = error.strerror or "input/output error"
        raise BuildError(f"{request.title}: {reason} while writing the engine folder.") from error


def parity(settings: BuildSettings) -> Report:
    """Measure the parity of an engine folder again and rewrite its report.

    Raises
    ------
    ManifestError, ArtefactError
        If there is no whole engine to measure.
    CheckpointError
        If the weights it was built from cannot be had.
    """
    folder = local_engine(settings)
    variant, head, path, manifest = folder.variant, folder.head, folder.path, folder.manifest
    if manifest is None:
        raise ManifestError(
            f"There is no engine for {variant.model_id} with head {head}; run 'make engines' first."
        )
    weights = Weights(
        engine_checkpoint(folder, settings),
        engine_sdt(folder, settings) if head is Head.SDT else None,
        manifest.source,
        manifest.head_source,
    )
    files = {
        graph: [
            (entry, verified_path(path, entry))
            for entry in manifest.graphs[graph.key].artefacts.values()
        ]
        for graph in (*variant.graphs, *variant.ray_graphs)
        if graph.key in manifest.graphs
    }
    steps = sum(_steps(entry.kind) for entries in files.values() for entry, _ in entries)
    progress = Progress(f"{variant.model_id}/{head}", len(files) + steps)
    start = time.perf_counter()
    measured = []
    not_checked: dict[str, str] = {}
    for graph, entries in files.items():
        measuring = Parity(graph.key, all_cases(variant.above_half_billion), _has_sdt(head, graph))
        _measure_reference(measuring, variant, graph, weights, progress)
        for entry, file in entries:
            _measure(measuring, entry.kind, file, progress)
            if entry.kind in LIBRARIES:
                not_checked |= _measure_plan(measuring, folder, graph, entry, progress)
        measured.append(measuring)
    report = _report(measured, manifest, not_checked, time.perf_counter() - start)
    write_atomically(path / PARITY_NAME, report.to_json().encode())
    return report


@dataclass
class _Made:
    """One graph of a build under way; artefacts by name."""

    graph: Graph
    current: dict[str, Artefact] = field(default_factory=dict)
    missing: list[Kind] = field(default_factory=list)
    artefacts: dict[str, Artefact] = field(default_factory=dict)

    @property
    def plans(self) -> list[Kind]:
        return [kind for kind in self.missing if kind in LIBRARIES]

    @property
    def exports(self) -> list[Kind]:
        """ONNX files to make; a plan is made from the FP16 one, which may not be asked for itself."""
        kinds = [kind for kind in self.missing if kind not in LIBRARIES]
        if self.plans and Kind.ONNX_FP16 not in (*self.current, *kinds):
            kinds.append(Kind.ONNX_FP16)
        return kinds

    @property
    def measured(self) -> list[Kind]:
        return [kind for kind in SUBJECTS if kind in (*self.current, *self.exports)]

    def steps(self) -> int:
        kept = [entry.kind for entry in self.current.values() if entry.kind in LIBRARIES]
        measured = sum(_steps(kind) for kind in (*self.measured, *self.plans, *kept))
        return 1 + len(self.exports) + len(self.plans) + measured


class _Build:
    """One run of :func:`build`, with the lock held."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.staging = request.folder.parent / f".{request.head}.staging"
        self.old = self._old_manifest()
        self.plans = {
            kind: plan_here(kind, request.hardware_compatible, request.version_compatible)
            for kind in request.targets
            if kind in LIBRARIES
        }

    def run(self) -> Manifest:
        shutil.rmtree(self.staging, ignore_errors=True)  # what a killed build left
        self.staging.mkdir()
        try:
            return self._run()
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)

    def _run(self) -> Manifest:
        request = self.request
        with PeakMemory() as memory:
            weights = self._weights()
            made = self._plan_of_work(weights)
            if self.old and self._is_up_to_date(self.old, weights, made):
                Progress(request.title, 0).say("up to date.")
                return self.old
            manifest, report = self._make(weights, made)
        Progress(request.title, 0).say(f"peak anonymous memory {memory} GB")
        print(report.table())
        return manifest

    def _is_up_to_date(self, old: Manifest, weights: Weights, made: list[_Made]) -> bool:
        same_source = (old.source, old.head_source) == (weights.source, weights.head_source)
        listed = {(key, name) for key, graph in old.graphs.items() for name in graph.artefacts}
        current = {(m.graph.key, name) for m in made for name in m.current}
        asked_for = {(m.graph.key, self._name(kind)) for m in made for kind in m.missing}
        for key, name in sorted(listed - current - asked_for):
            Progress(self.request.title, 0).say(f"{key} {name} is out of date or damaged: removing it.")
        return same_source and listed == current and not asked_for and self._has_parity(old)

    def _plan_of_work(self, weights: Weights) -> list[_Made]:
        """What is asked for, and what nobody asked for but is there and up to date."""
        variant, wanted = self.request.variant, self.request.targets
        made = [self._graph_to_make(graph, wanted, weights) for graph in variant.graphs]
        rays = wanted if self.request.ray_pose else ()
        with_rays = [self._graph_to_make(graph, rays, weights) for graph in variant.ray_graphs]
        return made + [m for m in with_rays if m.current or m.missing]

    def _graph_to_make(self, graph: Graph, wanted: tuple[Kind, ...], weights: Weights) -> _Made:
        old = self.old.graphs.get(graph.key) if self.old else None
        entries = old.artefacts.values() if old else ()
        m = _Made(graph)
        # ONNX first: a plan is current when it was made from the FP16 ONNX that stays.
        for entry in sorted(entries, key=lambda entry: entry.kind in LIBRARIES):
            if self._is_current(m, entry, wanted, weights):
                m.current[entry.name] = entry
        m.missing += [kind for kind in Kind if kind in wanted and self._name(kind) not in m.current]
        return m

    def _make(self, weights: Weights, made: list[_Made]) -> tuple[Manifest, Report]:
        request = self.request
        start = time.perf_counter()
        progress = Progress(request.title, sum(m.steps() for m in made))
        cases = all_cases(request.variant.above_half_billion)
        measured = []
        for m in made:
            measuring = Parity(m.graph.key, cases, _has_sdt(request.head, m.graph))
            measured.append(measuring)
            _measure_reference(measuring, request.variant, m.graph, weights, progress)
            m.artefacts |= m.current
            for kind in m.exports:
                with progress.step(f"{m.graph.key}: export {kind}") as _:
                    self._export(m.graph, kind, weights)
                m.artefacts[kind] = self._artefact(m, kind, weights, progress)
            for kind in m.measured:
                _measure(measuring, kind, self._path_of(m.graph, kind), progress)
        self._require_parity(_report(measured, self._manifest(weights, made), {}, 0))
        not_checked: dict[str, str] = {}
        for m in made:
            for kind in m.plans:
                graph_path = self._path_of(m.graph, Kind.ONNX_FP16)
                plan_path = self.staging / self._file(m.graph, kind)
                timing_caches = request.engine_dir / TIMING_CACHES
                with progress.step(f"{m.graph.key}: build {self._name(kind)}") as advance:
                    build_plan(self.plans[kind], graph_path, plan_path, timing_caches, advance)
                m.artefacts[self._name(kind)] = self._artefact(m, kind, weights, progress)
        manifest = self._manifest(weights, made)
        for m, measuring in zip(made, measured, strict=True):
            for entry in m.artefacts.values():
                if entry.kind in LIBRARIES:
                    staged = (self.staging / entry.files[0].name).exists()
                    path = self.staging if staged else request.folder
                    folder = EngineFolder(request.variant, request.head, path, manifest)
                    not_checked |= _measure_plan(measuring, folder, m.graph, entry, progress)
        report = _report(measured, manifest, not_checked, time.perf_counter() - start)
        self._require_parity(report)
        self._publish(manifest, report)
        return manifest, report

    def _require_parity(self, report: Report) -> None:
        if not report.ok:
            raise ParityError(
                f"{self.request.title} is out of tolerance and was not published:\n{report.table()}"
            )

    def _manifest(self, weights: Weights, made: list[_Made]) -> Manifest:
        variant = self.request.variant
        return Manifest(
            model=variant.model_id,
            head=self.request.head,
            licence=variant.license,
            unit=variant.unit,
            source=weights.source,
            head_source=weights.head_source,
            side_multiple=PATCH,
            profiles=PROFILES,
            graphs={
                m.graph.key: GraphEntry(INPUTS, output_specs(m.graph.outputs), m.artefacts) for m in made
            },
        )

    def _old_manifest(self) -> Manifest | None:
        try:
            return read_manifest(self.request.folder)
        except ManifestError:
            return None

    def _weights(self) -> Weights:
        checkpoint = self._checkpoint()
        sdt = self._sdt() if self.request.head is Head.SDT else None
        return Weights(checkpoint, sdt, _source(checkpoint), _source(sdt) if sdt is not None else None)

    def _checkpoint(self) -> Checkpoint:
        """The checkpoint to build from; a drawn one is reused if it lies beside the engine."""
        request = self.request
        if request.weights == HUB and request.variant.repo is not None:
            Progress(request.title, 0).say(f"checkpoint from the hub: {request.variant.repo}")
        if not request.weights.startswith(RANDOM_PREFIX):
            return find_checkpoint(request.variant, request.weights, request.revision)
        seed = seed_of(request.weights)
        beside = request.folder / CHECKPOINT_DIR / WEIGHTS_FILE
        if self.old is not None and _is_drawn(beside, seed, self.old.source):
            return Checkpoint(f"{RANDOM_PREFIX}{seed}", beside, trained=False)
        return write_random_checkpoint(request.variant, seed, self.staging / CHECKPOINT_DIR)

    def _sdt(self) -> Checkpoint:
        """The SDT head to build with, in the staging folder unless it lies beside the engine."""
        request = self.request
        graph = next(graph for graph in request.variant.graphs if graph.takes_sdt)
        target = self.staging / CHECKPOINT_DIR / SDT_FILE
        beside = request.folder / CHECKPOINT_DIR / SDT_FILE
        channels = feature_width(graph)
        if request.sdt_weights is not None:
            given = find_sdt(request.sdt_weights)
            load_sdt(channels, given.path, request.sdt_fusion_channels)
            return given
        bundled = bundled_sdt(request.variant)
        if bundled is not None and request.sdt_fusion_channels == request.variant.sdt_fusion_channels:
            return bundled
        target.parent.mkdir(exist_ok=True)
        write_random_sdt(channels, request.sdt_fusion_channels, HEAD_SEED, target)
        drawn = Checkpoint(f"{RANDOM_PREFIX}{HEAD_SEED}", target, trained=False)
        if beside.is_file() and sha256_of(beside) == drawn.sha256():
            target.unlink()
            return Checkpoint(drawn.weights, beside, trained=False)
        return drawn

    def _is_current(self, m: _Made, entry: Artefact, wanted: tuple[Kind, ...], weights: Weights) -> bool:
        """Whether an artefact is whole, and made from what it would be made from now.

        One that is asked for must be of the installed versions too, any other of those it records.
        """
        kind = entry.kind
        if kind in wanted and entry.name == self._name(kind):
            plan, toolchain = self.plans.get(kind), self._toolchain(m, kind, weights)
        else:
            plan, toolchain = _plan_of(entry), entry.toolchain
        if entry.fingerprint != self._fingerprint(m, kind, plan, toolchain, weights):
            return False
        try:
            verified_path(self.request.folder, entry)
        except ArtefactError:
            return False
        return True

    def _fingerprint(
        self, m: _Made, kind: Kind, plan: Plan | None, toolchain: dict[str, str], weights: Weights
    ) -> str:
        """Digest of everything an artefact is made from; of a plan, with its FP16 ONNX's."""
        if plan is not None:
            onnx = self._fp16(m, weights)[0]
            made_by = [_source_digest(PLAN_SOURCES), toolchain]
            return _digest([onnx, plan.name, plan.version_compatible, *made_by])
        digests = weights.digests() if m.graph.takes_sdt else weights.digests()[:1]
        return _digest([m.graph.key, kind, digests, _source_digest(NETWORK_SOURCES), toolchain])

    def _fp16(self, m: _Made, weights: Weights) -> tuple[str, dict[str, str]]:
        """Fingerprint and toolchain of the FP16 ONNX that plans are made from, there or to be made."""
        onnx = m.current.get(Kind.ONNX_FP16)
        if onnx is not None:
            return onnx.fingerprint, onnx.toolchain
        toolchain = _exporter()
        return self._fingerprint(m, Kind.ONNX_FP16, None, toolchain, weights), toolchain

    def _toolchain(self, m: _Made, kind: Kind, weights: Weights) -> dict[str, str]:
        """Versions that make ``kind`` in this build."""
        if kind not in self.plans:
            return _exporter()
        return self._fp16(m, weights)[1] | {LIBRARIES[kind].package: library_version(kind)}

    def _has_parity(self, old: Manifest) -> bool:
        """Whether the folder's report is of these artefacts and this way of measuring."""
        try:
            report = json.loads((self.request.folder / PARITY_NAME).read_text(encoding="utf-8"))
            measured = (report["ok"], report["artefacts"], report["method"])
            return measured == (True, _digests(old), _source_digest(PARITY_SOURCES))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _name(self, kind: Kind) -> str:
        """Name of the artefact that this build makes of ``kind``."""
        return self.plans[kind].name if kind in self.plans else kind.value

    def _file(self, graph: Graph, kind: Kind) -> str:
        target = self.plans[kind].target if kind in self.plans else ""
        return f"{graph.key}.{ENDINGS[kind].format(target)}"

    def _path_of(self, graph: Graph, kind: Kind) -> Path:
        """Where an artefact lies before publishing."""
        staged = self.staging / self._file(graph, kind)
        return staged if staged.exists() else self.request.folder / staged.name

    def _export(self, graph: Graph, kind: Kind, weights: Weights) -> None:
        network = load_network(
            self.request.variant,
            graph,
            weights.checkpoint.path,
            ONNX_PRECISION[kind],
            weights.sdt_of(graph),
        )
        export_onnx(network, self.staging / self._file(graph, kind))

    def _artefact(self, m: _Made, kind: Kind, weights: Weights, progress: Progress) -> Artefact:
        path = self.staging / self._file(m.graph, kind)
        data = path.with_name(path.name + DATA_ENDING)
        plan, toolchain = self.plans.get(kind), self._toolchain(m, kind, weights)
        verb = "export" if plan is None else "build"
        return Artefact(
            kind=kind,
            files=[describe(file) for file in (path, data) if file.exists()],
            precision="fp32" if kind == Kind.ONNX_FP32 else "fp16",
            fingerprint=self._fingerprint(m, kind, plan, toolchain, weights),
            build_seconds=round(progress.seconds[f"{m.graph.key}: {verb} {self._name(kind)}"], 1),
            toolchain=toolchain,
            library="" if plan is None else library_version(kind),
            compute_capabilities=[] if plan is None else list(plan.compute_capabilities),
            version_compatible=plan is not None and plan.version_compatible,
        )

    def _publish(self, manifest: Manifest, report: Report) -> None:
        folder = self.request.folder
        folder.mkdir(exist_ok=True)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        kept = manifest.file_names()
        for path in folder.iterdir():
            if path.is_file() and path.name not in kept:
                path.unlink()
        for name in kept:
            staged = self.staging / name
            if staged.exists():
                staged.replace(folder / name)
        self._publish_drawn(manifest)
        write_atomically(folder / PARITY_NAME, report.to_json().encode())
        write_atomically(folder / MANIFEST_NAME, manifest.to_json().encode())

    def _publish_drawn(self, manifest: Manifest) -> None:
        """Move drawn weights beside the engine, and remove what it was not made from."""
        folder = self.request.folder / CHECKPOINT_DIR
        staged = self.staging / CHECKPOINT_DIR
        folder.mkdir(exist_ok=True)
        if staged.exists():
            for path in staged.iterdir():
                path.replace(folder / path.name)
        if manifest.source.trained:
            for path in folder.iterdir():
                if path.name != SDT_FILE:
                    path.unlink()
        if manifest.head_source is None or manifest.head_source.trained:
            (folder / SDT_FILE).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def _plan_of(entry: Artefact) -> Plan | None:
    """What a plan was built for; None for ONNX."""
    if entry.kind not in LIBRARIES:
        return None
    return Plan(entry.kind, tuple(entry.compute_capabilities), entry.version_compatible)


def _is_drawn(path: Path, seed: int, source: Source) -> bool:
    """Whether a file is the whole checkpoint that ``seed`` gave and ``source`` describes."""
    try:
        drawn = path.is_file() and random_seed(path) == f"{RANDOM_PREFIX}{seed}"
        return drawn and sha256_of(path) == source.sha256
    except CheckpointError:
        return False


def _source(checkpoint: Checkpoint) -> Source:
    return Source(
        checkpoint.weights,
        checkpoint.sha256(),
        checkpoint.repo,
        checkpoint.commit,
        checkpoint.trained,
    )


def _measure_reference(
    measured: Parity, variant: Variant, graph: Graph, weights: Weights, progress: Progress
) -> None:
    with progress.step(f"{graph.key}: reference", len(measured.cases)) as advance:
        upstream = load_upstream(variant, graph, weights.checkpoint.path)
        sdt_path = weights.sdt_of(graph)
        sdt = load_sdt(feature_width(graph), sdt_path) if sdt_path else None
        measured.measure_reference(lambda images: run_reference(upstream, images, graph, sdt), advance)


def _measure(measured: Parity, kind: Kind, path: Path, progress: Progress) -> None:
    for subject in SUBJECTS.get(kind, ()):
        name = f"{measured.graph}: parity {kind} ({subject.arithmetic})"
        with progress.step(name, len(subject.cases(measured.cases))) as advance:
            measured.measure(subject, onnx_runner(path, subject), advance)


def _has_sdt(head: Head, graph: Graph) -> bool:
    return head is Head.SDT and graph.takes_sdt


def _measure_plan(
    measured: Parity, folder: EngineFolder, graph: Graph, plan: Artefact, progress: Progress
) -> dict[str, str]:
    """Measure a plan; if that cannot be done here, its name in the report and the reason."""
    reason = measure_plan(measured, folder, graph, plan, progress)
    return {f"{graph.key} {plan.name}": reason} if reason is not None else {}


def _steps(kind: Kind) -> int:
    """How many steps measuring an artefact takes on this machine."""
    if kind in LIBRARIES:
        return int(unmeasurable(kind) is None)
    return len(SUBJECTS[kind])


def _report(
    measured: list[Parity], manifest: Manifest, not_checked: dict[str, str], seconds: float
) -> Report:
    return Report(
        model=manifest.model,
        head=manifest.head,
        checkpoint_sha256=manifest.source.sha256,
        artefacts=_digests(manifest),
        rows=[row for measuring in measured for row in measuring.rows],
        not_checked=not_checked,
        method=_source_digest(PARITY_SOURCES),
        seconds=round(seconds, 1),
    )


def _digests(manifest: Manifest) -> dict[str, str]:
    """Digest of every artefact, by graph and name."""
    return {
        f"{key} {name}": entry.sha256
        for key, graph in manifest.graphs.items()
        for name, entry in graph.artefacts.items()
    }


def _source_digest(modules: tuple[ModuleType, ...]) -> str:
    text = "\n".join(inspect.getsource(module) for module in modules)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _exporter() -> dict[str, str]:
    """Versions of the packages that an ONNX export depends on."""
    return {package: version(package) for package in ("torch", "onnx", "onnxscript")}


def _digest(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
