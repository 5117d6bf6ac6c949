"""What parity compares with the reference: ONNX files, each in one arithmetic, on a CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from da3_export.onnx_attention import spell_out_attention
from da3_export.parity import tolerances
from da3_export.parity.cases import Case
from da3_export.parity.fp16_emulation import round_like_half
from da3_export.parity.tolerances import ORDER, Tolerance, Tolerances, bounds_by_name
from da3_runtime.backends.openvino import OpenVino
from da3_runtime.network_io import Conditions, RawOutputs, inputs_of
from da3_runtime.store.manifest import Kind

Runner = Callable[[NDArray[np.uint8], Conditions | None], RawOutputs]


@dataclass(frozen=True)
class Subject:
    """An artefact in one arithmetic.

    Attributes
    ----------
    artefact : Kind
        Kind of artefact that runs.
    arithmetic : str
        ``fp32``; ``fp16 weights``: values stored in FP16, arithmetic in FP32, as ONNX Runtime's CPU
        provider runs an FP16 graph; ``fp16``: every FP16 value rounded where the graph makes it;
        ``bf16``, by OpenVINO; ``int8``.
    tolerances : Tolerances
        Largest errors, by kind of output; for bf16 besides those of
        :mod:`da3_export.parity.eager_bf16`.
    sdt_tolerances : Tolerances | None
        The same for a graph with an SDT head, where they differ.
    every_case : bool
        Whether it is measured on every input shape, or on the first only.
    is_coarse : bool
        Whether its errors are so large that it is given the reference views always, and that the order
        of depths is compared too.
    """

    artefact: Kind
    arithmetic: str
    tolerances: Tolerances
    sdt_tolerances: Tolerances | None = None
    every_case: bool = True
    is_coarse: bool = False

    def bounds(self, sdt: bool) -> dict[str, Tolerance]:
        """Tolerance of every name in the report, for a graph with or without an SDT head."""
        bounds = bounds_by_name((sdt and self.sdt_tolerances) or self.tolerances)
        return bounds | {ORDER: tolerances.ORDER_BOUND} if self.is_coarse else bounds

    def cases(self, cases: list[Case]) -> list[Case]:
        """The ``cases`` that it is measured on."""
        return cases if self.every_case else cases[:1]


FP32 = Subject(Kind.ONNX_FP32, "fp32", tolerances.FP32, tolerances.FP32_SDT)
# Shows that the file itself runs, and how much of the error the arithmetic adds. No backend serves it.
FP16_WEIGHTS = Subject(Kind.ONNX_FP16, "fp16 weights", tolerances.FP16, every_case=False)
FP16 = Subject(Kind.ONNX_FP16, "fp16", tolerances.FP16)
FUSED_WEIGHTS = Subject(Kind.ONNX_FP16_ORT, "fp16 weights", tolerances.FP16, every_case=False)
FUSED = Subject(Kind.ONNX_FP16_ORT, "fp16", tolerances.FP16)
BF16 = Subject(Kind.ONNX_BF16, "bf16", tolerances.BF16, is_coarse=True)
INT8 = Subject(Kind.ONNX_INT8, "int8", tolerances.INT8, is_coarse=True)
SUBJECTS: dict[Kind, tuple[Subject, ...]] = {
    Kind.ONNX_FP32: (FP32,),
    Kind.ONNX_FP16: (FP16_WEIGHTS, FP16),
    Kind.ONNX_FP16_ORT: (FUSED_WEIGHTS, FUSED),
    Kind.ONNX_BF16: (BF16,),
    Kind.ONNX_INT8: (INT8,),
}


def onnx_runner(path: Path, subject: Subject) -> Runner:
    """A function that runs an ONNX file on the CPU with the subject's arithmetic.

    It takes images [B, S, H, W, 3], and what is wanted or known of the scenes.
    """
    if subject is BF16:
        return OpenVino(path).run
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Threads that wait in a loop take the cores of other processes, such as of tests.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = ["CPUExecutionProvider"]
    if subject in (FP16, FUSED):
        # Optimizers may drop a cast to FP16 and back.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Beside the original, whose weights it may refer to.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".half.", suffix=".onnx") as rounded:
            model = onnx.load(str(path), load_external_data=False)
            if subject is FP16:
                # A plan rounds the scores; ONNX Runtime's flash attention keeps them in FP32.
                spell_out_attention(model)
            rounded.write(round_like_half(model).SerializeToString())
            rounded.flush()
            session = ort.InferenceSession(rounded.name, options, providers=providers)
    else:
        session = ort.InferenceSession(path, options, providers=providers)
    inputs, names = (
        [each.name for each in tensors] for tensors in (session.get_inputs(), session.get_outputs())
    )

    def run(images: NDArray[np.uint8], conditions: Conditions | None = None) -> RawOutputs:
        return RawOutputs.of(names, session.run(names, inputs_of(inputs, images, conditions)))

    return run
