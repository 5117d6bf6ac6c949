"""``make bench-cpu``: every way to run a model on this CPU beside upstream's own network, in turn.

    python -m benchmarks.cpu --models da3-small,da3-nano --size 364x504

Upstream's network runs in eager FP32 with PyTorch, this project's eager network and its engines beside
it: FP32 and INT8 with ONNX Runtime, bf16 with OpenVINO. A time is from host to host, one photo. Errors
are those of depth against upstream, over photos: the mean relative error, and 1 minus Spearman's rank
correlation. A model whose checkpoint only the hub has gets random weights, which take as long.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import quick_engine
from benchmarks.record import RESULTS, ROOT, installed, provenance, write_result
from benchmarks.rounds import summarize, time_in_turn
from da3_export.parity.cases import Case, case_images
from da3_export.parity.reference import run_reference
from da3_export.parity.tolerances import order_error
from da3_export.parity.upstream import load_upstream
from da3_export.settings import BuildSettings
from da3_export.util.progress import aligned
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.store.engine_weights import engine_checkpoint
from da3_runtime.store.find_engine import local_engine
from da3_runtime.util.setting_group import AUTO
from da3_runtime.variants import find_variant

ENGINES = ROOT / ".cache" / "bench-engines"
TARGETS = "onnx-fp32,onnx-bf16,onnx-int8"
UPSTREAM = "upstream eager fp32"
# Backend and PRECISION of each contender.
CONTENDERS = (
    ("eager", AUTO),
    ("onnxruntime-cpu", AUTO),
    ("onnxruntime-cpu", "int8"),
    ("openvino", "bf16"),
)
PHOTOS = 3
Images = NDArray[np.uint8]


class Row(NamedTuple):
    """One way to run a model.

    Attributes
    ----------
    times_faster : float
        Than upstream's network: the median of the rounds' ratios.
    abs_rel, order : float
        Mean relative error of depth, and 1 - rank correlation, against upstream's network.
    megabytes : float
        Size of the artefact; 0 for PyTorch.
    """

    model: str
    contender: str
    median_ms: float
    times_faster: float
    abs_rel: float
    order: float
    megabytes: float


def measure(settings: BuildSettings, size: tuple[int, int], rounds: int, runs: int) -> list[Row]:
    """Rows of one model."""
    line = ["--model", settings.model_id, "--engine-dir", str(ENGINES), "--targets", TARGETS]
    if quick_engine.main([*line, "--weights", settings.weights or ""]):
        raise RuntimeError(f"{settings.model_id} was not built.")
    folder = local_engine(settings)
    variant = folder.variant
    (graph,) = variant.graphs
    upstream = load_upstream(variant, graph, engine_checkpoint(folder, settings).path)
    photos = case_images(Case(*size, batch=PHOTOS))
    first = photos[:1]
    exact = [run_reference(upstream, photos[i : i + 1], graph).outputs.depth for i in range(PHOTOS)]
    loaded = {
        f"{backend} {each.backend.precision}": each
        for backend, precision in CONTENDERS
        for each in [load_backend(replace(settings, backend=backend, precision=precision))]
    }
    work: dict[str, Callable[[], object]] = {UPSTREAM: lambda: run_reference(upstream, first, graph)}
    work |= {name: partial(each.run, first) for name, each in loaded.items()}
    seconds, failures = time_in_turn(work, rounds, runs)
    if failures:
        raise RuntimeError(str(failures))
    timings = {name: summarize(turns) for name, turns in seconds.items()}
    rows = []
    for name, timing in timings.items():
        pairs = zip(timings[UPSTREAM].rounds, timing.rounds, strict=True)
        depths = exact
        if name in loaded:
            depths = [loaded[name].run(photos[i : i + 1])[graph.name].depth for i in range(PHOTOS)]
        got, want = np.concatenate(depths), np.concatenate(exact)
        artefact = loaded[name].backend.artefact if name in loaded else None
        rows.append(
            Row(
                variant.model_id,
                name,
                timing.median_ms,
                median(theirs.median_ms / ours.median_ms for theirs, ours in pairs),
                float(np.mean(np.abs(got - want) / want)),
                float(order_error(got, want).max()),
                0 if artefact is None else artefact.size / 1e6,
            )
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Build what is missing, measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--models", default="da3-small,da3-nano")
    parser.add_argument("--size", default="364x504", help="height x width in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json")
    args = parser.parse_args(argv)
    height, width = (int(side) for side in args.size.split("x"))
    rows = []
    for model in args.models.split(","):
        weights = "random:0" if find_variant(model).repo else None
        settings = BuildSettings(model_id=model, weights=weights, engine_dir=ENGINES)
        rows += measure(settings, (height, width), args.rounds, args.runs)
    lines = [("model", "run as", "ms", "times faster", "AbsRel", "1 - rank correlation", "MB")]
    lines += [
        (
            row.model,
            row.contender,
            f"{row.median_ms:.0f}",
            f"{row.times_faster:.2f}",
            f"{row.abs_rel:.1e}",
            f"{row.order:.1e}",
            f"{row.megabytes:.0f}",
        )
        for row in rows
    ]
    print(aligned(lines))
    packages = ("numpy", "onnxruntime", "openvino", "torch", "depth-anything-3")
    result: dict[str, Any] = {"size": [height, width], "rounds": args.rounds, "runs": args.runs}
    result |= {"load_average": os.getloadavg()[0], "threads": torch.get_num_threads()}
    result |= {"rows": [row._asdict() for row in rows]}
    result |= provenance({"python": sys.version.split()[0], **installed(packages)})
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
