"""One model and head: checkpoint -> ONNX -> plan -> parity report -> engine folder.

Everything is made in a staging folder and published only when parity holds: the old manifest goes first,
the artefacts move in, the new manifest comes last. Whoever looks in between, or after a crash, finds a
folder without a manifest, which is no engine.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from filelock import FileLock, Timeout

import export.half_arithmetic
import export.onnx_graph
import export.parity
import export.plan
import export.reference
import runtime.eager.camera
import runtime.eager.dpt
import runtime.eager.load
import runtime.eager.network
import runtime.eager.positions
import runtime.eager.precision
import runtime.eager.vit
from export.onnx_graph import INPUTS, OUTPUTS, export_onnx
from export.parity import FP16, FP16_WEIGHTS, FP32, Parity, Report, Subject, all_cases, onnx_runner
from export.plan import LIBRARIES, PROFILES, build_plan, library_version
from export.progress import Advance, Progress
from export.random_weights import seed_of, write_random_checkpoint
from export.reference import run_reference
from runtime.backends.base import EngineFolder
from runtime.backends.eager import eager_checkpoint
from runtime.backends.tensorrt import has_cuda_driver
from runtime.checkpoint import HUB, RANDOM_PREFIX, WEIGHTS_FILE, Checkpoint, drawn_seed, find_checkpoint
from runtime.eager import precision
from runtime.eager.load import load_network, load_upstream
from runtime.errors import (
    ArtefactError,
    BuildError,
    CheckpointError,
    ManifestError,
    ParityError,
    SettingError,
)
from runtime.files import write_atomically
from runtime.manifest import (
    CHECKPOINT_DIR,
    MANIFEST_NAME,
    PARITY_NAME,
    Artefact,
    Kind,
    Manifest,
    Source,
    read_manifest,
    sha256_of,
    verified_path,
)
from runtime.settings import Settings
from runtime.variants import PATCH, Head, Variant, find_head, find_variant

DEFAULT_TARGETS = (Kind.ONNX_FP32, Kind.ONNX_FP16, Kind.TENSORRT_RTX)
FILES = {
    Kind.ONNX_FP32: "model.fp32.onnx",
    Kind.ONNX_FP16: "model.fp16.onnx",
    Kind.TENSORRT_RTX: "model.fp16.rtx.plan",
    Kind.TENSORRT: "model.fp16.trt.plan",
}
ONNX_PRECISION = {Kind.ONNX_FP32: precision.FP32, Kind.ONNX_FP16: precision.FP16}
SUBJECTS: dict[Kind, tuple[Subject, ...]] = {
    Kind.ONNX_FP32: (FP32,),
    Kind.ONNX_FP16: (FP16_WEIGHTS, FP16),
}
# Whose source decides what an artefact contains. A plan also depends on the ONNX it is made from.
NETWORK_SOURCES: tuple[ModuleType, ...] = (
    runtime.eager.camera,
    runtime.eager.dpt,
    runtime.eager.load,
    runtime.eager.network,
    runtime.eager.positions,
    runtime.eager.precision,
    runtime.eager.vit,
    export.onnx_graph,
)
PARITY_SOURCES: tuple[ModuleType, ...] = (
    export.half_arithmetic,
    export.parity,
    export.reference,
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
    targets : tuple[Kind, ...]
        Artefacts that must be there at the end.
    engines_dir : Path
        Where engine folders lie.
    """

    variant: Variant
    head: Head
    weights: str
    revision: str | None
    targets: tuple[Kind, ...]
    engines_dir: Path

    @property
    def folder(self) -> Path:
        """The engine folder."""
        return self.engines_dir / self.variant.model_id / self.head

    @property
    def title(self) -> str:
        """Name of the engine in messages."""
        return f"{self.variant.model_id}/{self.head}"


def request_of(settings: Settings, targets: str | None) -> Request:
    """The request that settings and a comma-separated ``TARGETS`` make.

    Raises
    ------
    SettingError
        If a model, head or target does not exist.
    """
    variant, head = find_variant(settings.model_id), find_head(settings.head)
    weights = settings.weights or HUB
    if weights.startswith(RANDOM_PREFIX):
        seed_of(weights)
    names = [name.strip().lower() for name in (targets or "").split(",") if name.strip()]
    unknown = [name for name in names if name not in list(Kind)]
    if unknown:
        known = ", ".join(Kind)
        raise SettingError(f"TARGETS {unknown[0]!r} is not one of: {known}.")
    kinds = tuple(dict.fromkeys(Kind(name) for name in names)) or DEFAULT_TARGETS
    return Request(variant, head, weights, settings.revision, kinds, settings.engines_dir)


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


def parity(settings: Settings) -> Report:
    """Measure the parity of an engine folder again and rewrite its report.

    Raises
    ------
    ManifestError, ArtefactError
        If there is no whole engine to measure.
    CheckpointError
        If the weights it was built from cannot be had.
    """
    variant, head = find_variant(settings.model_id), find_head(settings.head)
    path = settings.engines_dir / variant.model_id / head
    manifest = read_manifest(path)
    if manifest is None:
        raise ManifestError(
            f"There is no engine for {variant.model_id} with head {head}; run 'make engines' first."
        )
    paths = {kind: verified_path(path, entry) for kind, entry in manifest.artefacts.items()}
    checkpoint = eager_checkpoint(EngineFolder(variant, head, path, manifest), settings)
    steps = 1 + sum(len(SUBJECTS.get(Kind(kind), ())) for kind in paths)
    progress = Progress(f"{variant.model_id}/{head}", steps)
    measured = Parity(all_cases())
    _measure_reference(measured, variant, checkpoint, progress)
    for kind, file in paths.items():
        _measure(measured, Kind(kind), file, progress)
    report = _report(measured, variant, head, manifest.source.sha256, manifest.artefacts)
    write_atomically(path / PARITY_NAME, report.to_json().encode())
    return report


class _Build:
    """One run of :func:`build`, with the lock held."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.staging = request.folder.parent / f".{request.head}.staging"
        self.old = self._old_manifest()

    def run(self) -> Manifest:
        shutil.rmtree(self.staging, ignore_errors=True)  # what a killed build left
        self.staging.mkdir()
        try:
            return self._run()
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)

    def _run(self) -> Manifest:
        request = self.request
        for kind in request.targets:
            if kind in LIBRARIES:
                library_version(kind)
        checkpoint = self._checkpoint()
        sha256 = checkpoint.sha256()
        current = {
            kind: entry
            for kind, entry in (self.old.artefacts.items() if self.old else ())
            if self._is_current(Kind(kind), entry, sha256)
        }
        missing = [kind for kind in Kind if kind in request.targets and kind not in current]
        source = Source(
            checkpoint.weights,
            sha256,
            checkpoint.repo,
            checkpoint.commit,
            checkpoint.trained,
        )
        if not missing and self.old is not None and self.old.source == source and self._has_parity():
            Progress(request.title, 0).say("up to date.")
            return self.old
        return self._make(checkpoint, source, current, missing)

    def _make(
        self,
        checkpoint: Checkpoint,
        source: Source,
        current: dict[str, Artefact],
        missing: list[Kind],
    ) -> Manifest:
        request = self.request
        # A plan is made from the FP16 graph, which may not be asked for itself.
        plans = [kind for kind in missing if kind in LIBRARIES]
        graphs = [kind for kind in missing if kind not in LIBRARIES]
        if plans and Kind.ONNX_FP16 not in (*current, *graphs):
            graphs.append(Kind.ONNX_FP16)
        measured_kinds = [kind for kind in SUBJECTS if kind in (*current, *graphs)]
        subjects = sum(len(SUBJECTS[kind]) for kind in measured_kinds)
        progress = Progress(request.title, 1 + len(graphs) + len(plans) + subjects)

        measured = Parity(all_cases())
        _measure_reference(measured, request.variant, checkpoint, progress)
        artefacts = dict(current)
        for kind in graphs:
            with progress.step(f"export {kind}"):
                network = load_network(request.variant, checkpoint.path, ONNX_PRECISION[kind])
                export_onnx(network, self.staging / FILES[kind])
                del network
            artefacts[kind] = self._artefact(kind, source.sha256, progress, [])
        for kind in measured_kinds:
            path = self._path_of(kind)
            _measure(measured, kind, path, progress)
        report = _report(measured, request.variant, request.head, source.sha256, artefacts)
        if not report.ok:
            raise ParityError(
                f"{request.title} is out of tolerance and was not published:\n{report.table()}"
            )
        for kind in plans:
            with progress.step(f"build {kind}") as advance:
                capabilities = self._plan(kind, advance)
            artefacts[kind] = self._artefact(kind, source.sha256, progress, capabilities)
        report = _report(measured, request.variant, request.head, source.sha256, artefacts)
        manifest = Manifest(
            model=request.variant.model_id,
            head=request.head,
            licence=request.variant.licence,
            unit=request.variant.unit,
            source=source,
            inputs=INPUTS,
            outputs=OUTPUTS,
            side_multiple=PATCH,
            profiles=PROFILES,
            artefacts=artefacts,
        )
        self._publish(manifest, report)
        print(report.table())
        return manifest

    def _old_manifest(self) -> Manifest | None:
        try:
            return read_manifest(self.request.folder)
        except ManifestError:
            return None

    def _checkpoint(self) -> Checkpoint:
        """The checkpoint to build from; a drawn one is reused if it lies beside the engine."""
        request = self.request
        if request.weights == HUB:
            Progress(request.title, 0).say(f"checkpoint from the hub: {request.variant.repo}")
        if not request.weights.startswith(RANDOM_PREFIX):
            return find_checkpoint(request.variant, request.weights, request.revision)
        seed = seed_of(request.weights)
        beside = request.folder / CHECKPOINT_DIR / WEIGHTS_FILE
        if self.old is not None and beside.is_file():
            try:
                drawn = drawn_seed(beside)
                if drawn == f"{RANDOM_PREFIX}{seed}" and sha256_of(beside) == self.old.source.sha256:
                    return Checkpoint(drawn, beside, trained=False)
            except CheckpointError:
                pass
        return write_random_checkpoint(request.variant, seed, self.staging / CHECKPOINT_DIR)

    def _fingerprint(self, kind: Kind, checkpoint_sha256: str) -> str:
        """Digest of everything the artefact is made from."""
        parts: list[object] = [kind, checkpoint_sha256, _source_digest(NETWORK_SOURCES)]
        parts += [_toolchain(kind)]
        if kind in LIBRARIES:
            parts += [
                self._fingerprint(Kind.ONNX_FP16, checkpoint_sha256),
                _source_digest((export.plan,)),
            ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _is_current(self, kind: Kind, entry: Artefact, checkpoint_sha256: str) -> bool:
        try:
            if entry.fingerprint != self._fingerprint(kind, checkpoint_sha256):
                return False
            verified_path(self.request.folder, entry)
        except (ArtefactError, BuildError):
            return False
        return True

    def _has_parity(self) -> bool:
        """Whether the folder's report is of these artefacts and this way of measuring."""
        assert self.old is not None
        try:
            report = json.loads((self.request.folder / PARITY_NAME).read_text(encoding="utf-8"))
            digests = {kind: entry.sha256 for kind, entry in self.old.artefacts.items()}
            measured = (report["ok"], report["artefacts"], report["method"])
            return measured == (True, digests, _source_digest(PARITY_SOURCES))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _path_of(self, kind: Kind) -> Path:
        """Where an artefact lies before publishing."""
        staged = self.staging / FILES[kind]
        return staged if staged.exists() else self.request.folder / FILES[kind]

    def _plan(self, kind: Kind, advance: Advance) -> list[str]:
        return build_plan(kind, self._path_of(Kind.ONNX_FP16), self.staging / FILES[kind], advance)

    def _artefact(
        self, kind: Kind, checkpoint_sha256: str, progress: Progress, capabilities: list[str]
    ) -> Artefact:
        path = self.staging / FILES[kind]
        verb = "build" if kind in LIBRARIES else "export"
        return Artefact(
            file=path.name,
            sha256=sha256_of(path),
            size=path.stat().st_size,
            precision="fp32" if kind == Kind.ONNX_FP32 else "fp16",
            fingerprint=self._fingerprint(kind, checkpoint_sha256),
            build_seconds=round(progress.seconds[f"{verb} {kind}"], 1),
            toolchain=_toolchain(kind),
            compute_capabilities=capabilities,
        )

    def _publish(self, manifest: Manifest, report: Report) -> None:
        folder = self.request.folder
        folder.mkdir(exist_ok=True)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        kept = {entry.file for entry in manifest.artefacts.values()}
        for kind in Kind:
            staged = self.staging / FILES[kind]
            if staged.exists():
                staged.replace(folder / staged.name)
            elif FILES[kind] not in kept:
                (folder / FILES[kind]).unlink(missing_ok=True)
        drawn = self.staging / CHECKPOINT_DIR
        if drawn.exists() or manifest.source.trained:
            shutil.rmtree(folder / CHECKPOINT_DIR, ignore_errors=True)
        if drawn.exists():
            drawn.replace(folder / CHECKPOINT_DIR)
        write_atomically(folder / PARITY_NAME, report.to_json().encode())
        write_atomically(folder / MANIFEST_NAME, manifest.to_json().encode())


def _measure_reference(
    measured: Parity, variant: Variant, checkpoint: Checkpoint, progress: Progress
) -> None:
    with progress.step("reference", len(measured.cases)) as advance:
        upstream = load_upstream(variant, checkpoint.path)
        measured.measure_reference(lambda images: run_reference(upstream, images), advance)


def _measure(measured: Parity, kind: Kind, path: Path, progress: Progress) -> None:
    for subject in SUBJECTS.get(kind, ()):
        with progress.step(f"parity {kind} ({subject.arithmetic})", len(measured.cases)) as advance:
            measured.measure(subject, onnx_runner(path, subject), advance)


def _report(
    measured: Parity, variant: Variant, head: Head, sha256: str, artefacts: dict[str, Artefact]
) -> Report:
    reason = (
        "this version does not run plans"
        if has_cuda_driver()
        else "a plan runs on a GPU only and there is no NVIDIA driver"
    )
    return measured.report(
        model=variant.model_id,
        head=head,
        checkpoint_sha256=sha256,
        artefacts={kind: entry.sha256 for kind, entry in artefacts.items()},
        not_checked={kind: reason for kind in artefacts if Kind(kind) not in SUBJECTS},
        method=_source_digest(PARITY_SOURCES),
    )


def _source_digest(modules: tuple[ModuleType, ...]) -> str:
    text = "\n".join(inspect.getsource(module) for module in modules)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _toolchain(kind: Kind) -> dict[str, str]:
    packages = ("torch", "onnx", "onnxscript", "depth-anything-3")
    versions = {package: version(package) for package in packages}
    if kind in LIBRARIES:
        versions[LIBRARIES[kind].package] = library_version(kind)
    return versions
