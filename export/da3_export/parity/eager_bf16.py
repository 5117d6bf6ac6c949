"""The errors of bf16 in PyTorch, which a bf16 engine is allowed too.

bf16 has 8 bits of precision. How far depth moves depends on the network and the photos, so the tolerance
is not a constant. It is the error of upstream's own policy, a bf16 backbone with FP32 heads, on the same
inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from da3_export.parity.cases import Case, case_images
from da3_export.parity.reference import Reference
from da3_export.parity.tolerances import (
    BF16,
    Statistics,
    Tolerance,
    bounds_by_name,
    relative_errors,
)
from da3_runtime.network.load import load_network
from da3_runtime.network.precision import UPSTREAM_GPU
from da3_runtime.network_io import RawOutputs, inputs_of
from da3_runtime.variants import Graph, Variant

# Sums in another order round elsewhere. OpenVINO's largest errors of da3-nano's outputs are 1.0 to 2.7
# times those of PyTorch.
MARGIN = 3.0


def eager_bounds(
    variant: Variant,
    graph: Graph,
    checkpoint: Path,
    sdt: Path | None,
    references: Mapping[Case, Reference],
) -> dict[str, Tolerance]:
    """Largest errors of each output: :data:`MARGIN` times those of PyTorch with upstream's policy.

    Parameters
    ----------
    references : Mapping[Case, Reference]
        Upstream's outputs in FP32 for every case. The largest mean and the largest 99.9th percentile of
        all cases count.

    Raises
    ------
    CheckpointError
        If the weights do not fit.
    """
    network = load_network(variant, graph, checkpoint, UPSTREAM_GPU, sdt)
    found: dict[str, list[Statistics]] = {}
    for case, reference in references.items():
        given = inputs_of(graph.series.inputs, case_images(case), reference.conditions(is_forced=True))
        with torch.inference_mode():
            values = network(*map(torch.from_numpy, given.values()))
        outputs = RawOutputs.of(graph.outputs, [each.numpy() for each in values])
        for name, errors in relative_errors(outputs, reference.outputs).items():
            found.setdefault(name, []).append(Statistics.of(errors))
    floors = bounds_by_name(BF16)
    return {name: _bound(floors[name], every) for name, every in found.items()}


def _bound(floor: Tolerance, errors: Sequence[Statistics]) -> Tolerance:
    return Tolerance(
        max(floor.mean or 0, MARGIN * max(each.mean for each in errors)),
        max(floor.p999 or 0, MARGIN * max(each.p999 for each in errors)),
    )
