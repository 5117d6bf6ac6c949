"""Parity of plans, measured by the backends that serve them, on this machine's GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from da3_export.onnx_to_plan import PROFILES
from da3_export.parity import tolerances
from da3_export.parity.cases import Case
from da3_export.parity.subjects import Subject
from da3_runtime.backends.gpu.cuda import cuda_missing, device_name
from da3_runtime.backends.openvino import OpenVino
from da3_runtime.backends.tensorrt import PlanBackend, TensorRT, TensorRTRTX
from da3_runtime.errors import DA3Error
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.manifest import Artefact, Kind
from da3_runtime.store.settings import EngineSettings
from da3_runtime.variants import Graph

BACKENDS: dict[Kind, type[PlanBackend]] = {cls.kind: cls for cls in (TensorRT, TensorRTRTX)}


@dataclass(frozen=True)
class PlanSubject(Subject):
    """A plan on this machine's GPU."""

    def cases(self, cases: list[Case]) -> list[Case]:
        """The ``cases`` whose shape one of the plan's profiles takes."""
        return [case for case in cases if any(each.fits(case.shape) for each in PROFILES)]


def plan_subject(kind: Kind) -> PlanSubject:
    """The subject that a plan of ``kind`` is on this machine's GPU."""
    return PlanSubject(kind, f"fp16 on {device_name()}", tolerances.FP16)


def unmeasurable(kind: Kind) -> str | None:
    """Why this machine can measure no artefact of ``kind``, or None if it can."""
    if kind in BACKENDS:
        return cuda_missing() or BACKENDS[kind].unavailable()
    return OpenVino.unavailable() if kind is Kind.ONNX_BF16 else None


def load_plan(folder: EngineFolder, graph: Graph, plan: Artefact) -> PlanBackend | str:
    """The backend with one of a folder's plans loaded, or the reason why it cannot be loaded here."""
    assert folder.manifest is not None
    entry = replace(folder.manifest.graphs[graph.key], artefacts={plan.name: plan})
    alone = replace(folder, manifest=replace(folder.manifest, graphs={graph.key: entry}))
    try:
        backend = BACKENDS[plan.kind].load(alone, graph, EngineSettings())
    except DA3Error as error:
        return str(error).rstrip(".")
    assert isinstance(backend, PlanBackend)
    return backend
