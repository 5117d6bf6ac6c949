"""Decides which artefacts of an engine folder a build keeps and which it makes.

A requested artefact must be current: its fingerprint is a digest of everything it was made from
(weights, versions below, options, package versions). Any other artefact stays, with the fingerprint
that it has, as long as it is whole and was made from the same weights:
a machine without a GPU or without TensorRT keeps the plans that other machines added.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version

import onnxruntime

from da3_export.onnx_to_plan import LIBRARIES, PROFILES, Plan, library_version
from da3_export.request import Request
from da3_export.weights import Weights, source_digests
from da3_runtime.errors import ArtefactError
from da3_runtime.network_io import input_specs, output_specs
from da3_runtime.store.manifest import PARITY_NAME, Artefact, Kind, Manifest, verified_path
from da3_runtime.variants import Graph

# Raise it with every change to the network, the precision policy or the ONNX exporter after which the
# same weights give another ONNX file: other numbers, operators, names, shapes or stored precision.
# Not for comments, docstrings or renamed Python code.
EXPORT_VERSION = 5
# Raise it with every change to the builder after which the same ONNX file gives another plan:
# builder flags, profiles, or the way that attention is spelled out.
PLAN_VERSION = 2
# Raise it with every change after which the same FP16 ONNX gives another fused graph.
FUSION_VERSION = 1
# Raise it with every change to what parity measures, or how: cases, arithmetics, errors, tolerances.
PARITY_VERSION = 3

# Packages that decide what an ONNX file contains.
_EXPORTER = ("torch", "onnx", "onnxscript")


@dataclass
class GraphBuild:
    """One graph of a build.

    Attributes
    ----------
    graph : Graph
        The graph.
    kept : dict[str, Artefact]
        Artefacts of the engine folder that stay, by name.
    missing : list[Kind]
        Kinds to make because they were requested.
    artefacts : dict[str, Artefact]
        Artefacts of the new manifest so far, by name.
    """

    graph: Graph
    kept: dict[str, Artefact] = field(default_factory=dict)
    missing: list[Kind] = field(default_factory=list)
    artefacts: dict[str, Artefact] = field(default_factory=dict)

    @property
    def plans(self) -> list[Kind]:
        """Plans to build."""
        return [kind for kind in self.missing if kind in LIBRARIES]

    @property
    def exports(self) -> list[Kind]:
        """ONNX files to make, in order; others may need the FP16 one though it is not requested."""
        kinds = [kind for kind in self.missing if kind not in LIBRARIES]
        if self.needs_fp16 and Kind.ONNX_FP16 not in self.kept:
            kinds.append(Kind.ONNX_FP16)
        return [kind for kind in Kind if kind in kinds]

    @property
    def needs_fp16(self) -> bool:
        """Whether something is made from the FP16 ONNX: a plan, or the fused graph."""
        return bool(self.plans) or Kind.ONNX_FP16_ORT in self.missing

    @property
    def onnx(self) -> list[Kind]:
        """ONNX files that the engine will have."""
        return [kind for kind in Kind if kind not in LIBRARIES and kind in (*self.kept, *self.exports)]


class Freshness:
    """Decides for one build which artefacts stay and which are made.

    Parameters
    ----------
    request : Request
        The request.
    plans : Mapping[Kind, Plan]
        The requested plans, as this machine builds them.
    weights : Weights
        What the engine is made from.
    old : Manifest | None
        Manifest of the engine folder as it is.
    """

    def __init__(
        self, request: Request, plans: Mapping[Kind, Plan], weights: Weights, old: Manifest | None
    ) -> None:
        self._request = request
        self._plans = plans
        self._weights = weights
        self._old = old
        self.removed: list[str] = []  # one sentence for each artefact that is removed without a request

    def graph_builds(self) -> list[GraphBuild]:
        """Every graph that the engine will have, with its current and missing artefacts."""
        variant, wanted = self._request.variant, self._request.targets
        builds = [self._graph_build(graph, wanted) for graph in variant.graphs]
        rays = wanted if self._request.ray_pose else ()
        with_rays = [self._graph_build(graph, rays) for graph in variant.ray_graphs]
        return builds + [build for build in with_rays if build.kept or build.missing]

    def is_up_to_date(self, builds: Iterable[GraphBuild]) -> bool:
        """Whether the engine folder already is what the build would publish."""
        old, weights = self._old, self._weights
        if old is None or (old.source, old.head_source) != (weights.source, weights.head_source):
            return False
        listed = {(key, name) for key, graph in old.graphs.items() for name in graph.artefacts}
        kept = {(build.graph.key, name) for build in builds for name in build.kept}
        missing = any(build.missing for build in builds)
        return listed == kept and not missing and self._has_parity(old)

    def toolchain(self, build: GraphBuild, kind: Kind) -> dict[str, str]:
        """Package versions that make ``kind`` in this build, with those of the ONNX it is made from."""
        if kind is Kind.ONNX_FP16_ORT:
            return self._base(build)[1]
        if kind is Kind.ONNX_INT8:
            return exporter_versions() | {"onnxruntime": onnxruntime.__version__}
        if kind not in LIBRARIES:
            return exporter_versions()
        return self._base(build)[1] | {LIBRARIES[kind].package: library_version(kind)}

    def fingerprint(self, build: GraphBuild, kind: Kind) -> str:
        """Digest of everything that ``kind`` is made from in this build."""
        toolchain = self.toolchain(build, kind)
        if kind is Kind.ONNX_FP16_ORT:
            return _digest([self._base(build)[0], kind, FUSION_VERSION, toolchain])
        if kind not in LIBRARIES:
            return self._onnx_fingerprint(build.graph, kind, toolchain)
        plan, base = self._plans[kind], self._base(build)[0]
        return _digest([base, plan.name, plan.version_compatible, PLAN_VERSION, toolchain])

    def name(self, kind: Kind) -> str:
        """Name of the artefact that this build makes of ``kind``."""
        return self._plans[kind].name if kind in self._plans else kind.value

    def _graph_build(self, graph: Graph, wanted: tuple[Kind, ...]) -> GraphBuild:
        old = self._old.graphs.get(graph.key) if self._old else None
        build = GraphBuild(graph)
        # In the order of kinds: whether plans and the fused graph are current depends on the FP16 ONNX.
        order = list(Kind)
        entries = sorted(
            old.artefacts.values() if old else (), key=lambda entry: order.index(entry.kind)
        )
        for entry in entries:
            requested = entry.kind in wanted and entry.name == self.name(entry.kind)
            fault = self._fault(graph, entry)
            if fault is not None and not requested:
                self.removed.append(f"{graph.key} {entry.name} {fault}: removing it.")
            elif fault is None and (
                not requested or entry.fingerprint == self.fingerprint(build, entry.kind)
            ):
                build.kept[entry.name] = entry
        build.missing += [kind for kind in Kind if kind in wanted and self.name(kind) not in build.kept]
        if build.needs_fp16 and not self.is_of_this_version(graph, build.kept.get(Kind.ONNX_FP16)):
            build.kept.pop(Kind.ONNX_FP16, None)
        # The fused graph refers to the weights of the FP16 ONNX, so a new one needs a new one.
        if Kind.ONNX_FP16 in build.exports and Kind.ONNX_FP16_ORT in build.kept:
            del build.kept[Kind.ONNX_FP16_ORT]
            build.missing.append(Kind.ONNX_FP16_ORT)
        return build

    def _fault(self, graph: Graph, entry: Artefact) -> str | None:
        """Why an artefact cannot stay whatever was requested, or None."""
        old = self._old
        assert old is not None
        if source_digests(old.source, old.head_source, graph) != self._weights.digests(graph):
            return "was made from other weights"
        tensors = (old.graphs[graph.key].inputs, old.graphs[graph.key].outputs)
        if tensors != (input_specs(graph.series.inputs), output_specs(graph.outputs)):
            return "has other inputs or outputs"
        if entry.kind in LIBRARIES and old.profiles != PROFILES:
            return "was built for other input shapes"
        try:
            verified_path(self._request.folder, entry)
        except ArtefactError as error:
            return f"is damaged ({str(error).rstrip('.')})"
        return None

    def _base(self, build: GraphBuild) -> tuple[str, dict[str, str]]:
        """Fingerprint and toolchain of the FP16 ONNX that others are made from, kept or to be made."""
        onnx = build.kept.get(Kind.ONNX_FP16)
        if onnx is not None and self.is_of_this_version(build.graph, onnx):
            return onnx.fingerprint, onnx.toolchain
        toolchain = exporter_versions()
        return self._onnx_fingerprint(build.graph, Kind.ONNX_FP16, toolchain), toolchain

    def is_of_this_version(self, graph: Graph, onnx: Artefact | None) -> bool:
        """Whether an ONNX file is what this exporter makes with the package versions it records."""
        return onnx is not None and onnx.fingerprint == self._onnx_fingerprint(
            graph, onnx.kind, onnx.toolchain
        )

    def _onnx_fingerprint(self, graph: Graph, kind: Kind, toolchain: dict[str, str]) -> str:
        return _digest([graph.key, kind, self._weights.digests(graph), EXPORT_VERSION, toolchain])

    def _has_parity(self, old: Manifest) -> bool:
        """Whether the folder's report is of these artefacts, measured as today."""
        try:
            report = json.loads((self._request.folder / PARITY_NAME).read_text(encoding="utf-8"))
            measured = (report["ok"], report["artefacts"], report["method"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return measured == (True, old.digests(), str(PARITY_VERSION))


def exporter_versions() -> dict[str, str]:
    """Versions of the packages that decide what an ONNX file contains."""
    return {package: version(package) for package in _EXPORTER}


def _digest(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
