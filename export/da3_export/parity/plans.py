"""Parity of plans, by the backends that serve them: on a GPU; elsewhere with the reason why not."""

from __future__ import annotations

from dataclasses import dataclass, replace

from da3_export.onnx_to_plan import PROFILES
from da3_export.parity.report import FP16_TOLERANCES, Case, Parity, Subject
from da3_export.util.progress import Progress
from da3_runtime.backends.gpu.cuda import device_name
from da3_runtime.backends.tensorrt import PlanBackend, TensorRT, TensorRTRTX
from da3_runtime.errors import DA3Error
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.manifest import Artefact, Kind
from da3_runtime.store.settings import EngineSettings
from da3_runtime.variants import Graph

BACKENDS: dict[Kind, type[PlanBackend]] = {cls.kind: cls for cls in (TensorRT, TensorRTRTX)}


@dataclass(frozen=True)
class PlanSubject(Subject):
    """A plan on the GPU at hand, on the cases that a profile takes."""

    def cases(self, cases: list[Case]) -> list[Case]:
        """Those of ``cases`` that it is measured on."""
        return [
            case
            for case in cases
            if any(each.fits((case.batch, case.height, case.width, 3)) for each in PROFILES)
        ]


def unmeasurable(kind: Kind) -> str | None:
    """Why no plan of ``kind`` can be measured on this machine, or None."""
    return BACKENDS[kind].unavailable()


def measure_plan(
    measured: Parity, folder: EngineFolder, graph: Graph, plan: Artefact, progress: Progress
) -> str | None:
    """Measure one of a folder's plans, or say why it cannot be measured here.

    Raises
    ------
    InferenceError
        If it can be loaded and fails.
    """
    cls = BACKENDS[plan.kind]
    reason = cls.unavailable()
    if reason is not None:
        return reason
    assert folder.manifest is not None
    entry = replace(folder.manifest.graphs[graph.key], artefacts={plan.name: plan})
    alone = replace(folder, manifest=replace(folder.manifest, graphs={graph.key: entry}))
    subject = PlanSubject(plan.kind, f"fp16 on {device_name()}", FP16_TOLERANCES)
    with progress.step(
        f"{graph.key}: parity {plan.name}", len(subject.cases(measured.cases))
    ) as advance:
        try:
            backend = cls.load(alone, graph, EngineSettings())
        except DA3Error as error:
            return str(error).rstrip(".")
        try:
            measured.measure(subject, backend.run, advance)
        finally:
            backend.close()
    return None
