"""ModelOpt AutoCast against this project's own FP16 policy, on the same network.

Engines are strongly typed, so FP16 has to be put into the ONNX graph. NVIDIA's tool for that,
AutoCast, rewrites the FP32 graph; :mod:`runtime.eager.precision` places casts in the network
before it is exported. Both graphs are compared with upstream's modules in eager FP32, with every FP16
value rounded where the graph makes it (:mod:`export.half_arithmetic`). Of a variant with several
graphs, the first is taken.

    pip install -r requirements/torch-cpu.txt
    pip install -r requirements/benchmark.txt
    pip install --no-deps -r requirements/upstream.txt
    python -m benchmarks.autocast

What came out for da3-small (nvidia-modelopt 0.47.0; results/autocast.json). With its defaults
AutoCast cannot convert the graph: the range it draws sample inputs from, -1 to 1, does not fit uint8.
Calibrated, it puts all that stays below 512 on the photographs into FP16, the residual stream,
normalisation, camera decoder and exp included, and the depth error is five times that of our policy.
Most of this is one place: the sampling coordinates of the position table, index arithmetic that a
rule on magnitudes does not recognise. Told to leave all but the products, their activations and
resizing in FP32, it is as good as our policy on depth, with twice the casts.

The checkpoint is drawn at random. Its position table is rougher than a trained one is likely to be,
which exaggerates the errors of coordinates (with a smooth table, measured apart: twice our depth
error, not five times), and it has none of the outlier activations of trained weights. Seconds are of
whatever machine this ran on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import math
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, shape_inference

from benchmarks.record import RESULTS, provenance, reason, write_result
from export import parity
from export.attention import spell_out_attention
from export.onnx_graph import export_onnx
from export.parity import Case, case_images, compare, onnx_runner
from export.plan import build_plan, plan_here
from export.progress import Progress, aligned
from export.random_weights import write_random_checkpoint
from export.reference import run_reference
from runtime.backends.base import RawOutputs
from runtime.eager.load import load_network, load_upstream
from runtime.eager.precision import FP16, FP32, Precision
from runtime.errors import DA3Error
from runtime.manifest import Kind
from runtime.variants import Variant, find_variant

SCHEMA_VERSION = 1
OUT = RESULTS / "autocast.json"
CASES = [Case(height, width, 1) for height, width in parity.SHAPES]
# Not one of CASES, so that AutoCast is not calibrated on what it is judged on.
CALIBRATION = Case(378, 504, 3)
PACKAGES = ("torch", "onnx", "onnxruntime", "nvidia-modelopt", "tensorrt-rtx-cu12")
# The nearest to our policy that AutoCast can be told by operator type: all else stays in FP32.
LOW_OPERATORS = {"MatMul", "Conv", "ConvTranspose", "Gelu", "Relu", "Resize"}

PRODUCTS = "matrix products and convolutions"
RESIDUAL = "residual sums"
GROUPS: dict[str, tuple[str, ...]] = {
    PRODUCTS: ("MatMul", "Conv", "ConvTranspose", "Gemm"),
    "normalisation": ("LayerNormalization",),
    "softmax": ("Softmax",),
    "positions (sin, cos)": ("Sin", "Cos"),
    "position table (floor)": ("Floor",),
    "camera decoder (Gemm)": ("Gemm",),
    "exp": ("Exp",),
}
CONVERSION, ORT, HALF, RTX = "conversion", "ONNX Runtime", "half arithmetic", "TensorRT-RTX"


@dataclass(frozen=True)
class Candidate:
    """One way to an ONNX graph.

    Attributes
    ----------
    name, settings : str
        What it is, and what it was told.
    path : Path
        Where the graph goes.
    make : Callable[[Path], None]
        Writes the graph.
    """

    name: str
    settings: str
    path: Path
    make: Callable[[Path], None]


@dataclass
class Result:
    """What was found out about one candidate; what a refusal left unknown is None or empty.

    Attributes
    ----------
    make_seconds, plan_seconds : float | None
        Time to write the graph (an export loads the checkpoint, too), and to build the plan.
    onnx_mb, plan_mb : float | None
        File sizes, 10^6 bytes.
    casts, nodes : int | None
        Cast nodes, and all nodes.
    half : dict[str, float]
        By group of operators, the share of nodes whose result is FP16.
    runs : bool
        Whether ONNX Runtime runs the graph as it is at every shape.
    errors : dict[str, dict[str, float | None]]
        By output, the largest mean, 99.9th percentile and maximum over the shapes, under honest
        half arithmetic; None is NaN or infinity.
    within_tolerance : bool | None
        Whether the build's parity check would pass it.
    refusals : dict[str, str]
        By step, the first line of the error.
    """

    name: str
    settings: str
    make_seconds: float | None = None
    onnx_mb: float | None = None
    casts: int | None = None
    nodes: int | None = None
    half: dict[str, float] = field(default_factory=dict)
    runs: bool = False
    errors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    within_tolerance: bool | None = None
    plan_seconds: float | None = None
    plan_mb: float | None = None
    refusals: dict[str, str] = field(default_factory=dict)


def candidates(variant: Variant, checkpoint: Path, folder: Path) -> list[Candidate]:
    """Everything to compare, in the order in which it must be made.

    Parameters
    ----------
    checkpoint : Path
        Safetensors file of the weights.
    folder : Path
        Scratch folder for AutoCast's input and calibration data.
    """
    source, photos = folder / "fp32.onnx", folder / "photos.npz"

    def exported(precision: Precision) -> Callable[[Path], None]:
        def make(path: Path) -> None:
            export_onnx(load_network(variant, variant.graphs[0], checkpoint, precision), path)
            # As plans are built of it, and AutoCast is told by operator.
            model = onnx.load(str(path))
            spell_out_attention(model)
            onnx.save(model, str(path))

        return make

    def calibrated(path: Path) -> None:
        np.savez(photos, images=case_images(CALIBRATION))
        autocast(source, path, keep_io_types=True, calibration_data=str(photos))

    def nodes_of_source() -> list[NodeProto]:
        return list(onnx.load(str(source), load_external_data=False).graph.node)

    def without_coordinates(path: Path) -> None:
        names = [f"{re.escape(name)}$" for name in table_coordinates(nodes_of_source())]
        autocast(source, path, keep_io_types=True, data_max=math.inf, nodes_to_exclude=names)

    def by_operator(path: Path) -> None:
        kept = sorted({node.op_type for node in nodes_of_source()} - LOW_OPERATORS)
        autocast(source, path, keep_io_types=True, data_max=math.inf, op_types_to_exclude=kept)

    height, width, batch = CALIBRATION
    operators = ", ".join(sorted(LOW_OPERATORS))
    return [
        Candidate("FP32", "no casts", source, exported(FP32)),
        Candidate("our policy", "runtime.eager.precision.FP16", folder / "fp16.onnx", exported(FP16)),
        Candidate(
            "AutoCast, defaults",
            "none",
            folder / "defaults.onnx",
            lambda path: autocast(source, path),
        ),
        Candidate(
            "AutoCast, calibrated",
            f"keep_io_types=True, calibration_data: {batch} photographs at {height} x {width}, "
            "data_max: its default, 512",
            folder / "calibrated.onnx",
            calibrated,
        ),
        Candidate(
            "AutoCast, coordinates kept",
            "keep_io_types=True, data_max=inf, nodes_to_exclude: what resizes the position table",
            folder / "coordinates.onnx",
            without_coordinates,
        ),
        Candidate(
            "AutoCast, by operator",
            f"keep_io_types=True, data_max=inf, op_types_to_exclude: all but {operators}",
            folder / "by_operator.onnx",
            by_operator,
        ),
    ]


def autocast(source: Path, path: Path, **settings: Any) -> None:
    """Convert the FP32 graph at ``source`` with AutoCast and write the result to ``path``."""
    with _quiet():
        module = importlib.import_module("modelopt.onnx.autocast")
        model: ModelProto = module.convert_to_mixed_precision(str(source), **settings)
        onnx.save(model, str(path))


def table_coordinates(nodes: list[NodeProto]) -> list[str]:
    """Names of the nodes that make the weights of the position table's bicubic resize.

    They are what leads to the graph's Floor nodes (one per axis), and what follows from the
    coordinates that these round down, up to the matrix products with the table.
    """
    maker = {name: node for node in nodes for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def makers(node: NodeProto) -> list[NodeProto]:
        return [maker[name] for name in node.input if name in maker]

    def followers(node: NodeProto) -> list[NodeProto]:
        after = [reader for name in node.output for reader in readers.get(name, [])]
        return [reader for reader in after if reader.op_type != "MatMul"]

    floors = [node for node in nodes if node.op_type == "Floor"]
    coordinates = [node for floor in floors for node in makers(floor)]
    return sorted(_reached(floors, makers) | _reached(coordinates, followers))


def _reached(start: list[NodeProto], step: Callable[[NodeProto], list[NodeProto]]) -> set[str]:
    """Names of the nodes that any number of steps lead to from ``start``, which counts too."""
    names: set[str] = set()
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        if node.name not in names:
            names.add(node.name)
            waiting += step(node)
    return names


def half_shares(model: ModelProto) -> dict[str, float]:
    """Share of nodes whose result is FP16, by group of operators.

    The residual sums are the additions that a normalisation reads, directly or through a cast.
    """
    graph = shape_inference.infer_shapes(model).graph
    typed = [*graph.value_info, *graph.output]
    half = {v.name for v in typed if v.type.tensor_type.elem_type == TensorProto.FLOAT16}
    groups = {
        group: [node for node in graph.node if node.op_type in operators]
        for group, operators in GROUPS.items()
    }
    groups[RESIDUAL] = _residual_sums(list(graph.node))
    return {
        group: round(sum(node.output[0] in half for node in nodes) / len(nodes), 3)
        for group, nodes in groups.items()
        if nodes
    }


def _residual_sums(nodes: list[NodeProto]) -> list[NodeProto]:
    maker = {name: node for node in nodes for name in node.output}
    sums: dict[str, NodeProto] = {}
    for node in nodes:
        if node.op_type != "LayerNormalization":
            continue
        read = maker.get(node.input[0])
        while read is not None and read.op_type == "Cast":
            read = maker.get(read.input[0])
        if read is not None and read.op_type == "Add":
            sums[read.output[0]] = read
    return list(sums.values())


def measure(candidate: Candidate, reference: dict[Case, RawOutputs], progress: Progress) -> Result:
    """Make one candidate and find out everything about it; a step that fails is a refusal.

    Parameters
    ----------
    reference : dict[Case, RawOutputs]
        Upstream's outputs.
    """
    path, plan_path = candidate.path, candidate.path.with_suffix(".plan")
    result = Result(candidate.name, candidate.settings)
    with progress.step(candidate.name, 4) as advance:
        with _refusable(result, CONVERSION):
            start = time.perf_counter()
            candidate.make(path)
            result.make_seconds = round(time.perf_counter() - start, 1)
            model = onnx.load(str(path))
            result.onnx_mb = _megabytes(path)
            result.nodes = len(model.graph.node)
            result.casts = sum(node.op_type == "Cast" for node in model.graph.node)
            result.half = half_shares(model)
            del model
        advance(CONVERSION)
        if CONVERSION in result.refusals:
            return result
        with _refusable(result, ORT):
            run = onnx_runner(path, parity.FP16_WEIGHTS)
            for case in CASES:
                run(case_images(case))
            result.runs = True
        advance(ORT)
        with _refusable(result, HALF):
            _measure_errors(path, reference, result)
        advance(HALF)
        with _refusable(result, RTX):
            start = time.perf_counter()
            plan = plan_here(Kind.TENSORRT_RTX)
            build_plan(plan, path, plan_path, plan_path.parent, lambda phase: None)
            result.plan_seconds = round(time.perf_counter() - start, 1)
            result.plan_mb = _megabytes(plan_path)
        advance(RTX)
    return result


def _measure_errors(path: Path, reference: dict[Case, RawOutputs], result: Result) -> None:
    """Fill in the errors of a graph under honest half arithmetic."""
    run = onnx_runner(path, parity.FP16)
    rows = [
        row
        for case in CASES
        for row in compare(parity.FP16, case, run(case_images(case)), reference[case])
    ]
    for output in dict.fromkeys(row.output for row in rows):
        statistics = np.array([(r.mean, r.p999, r.max) for r in rows if r.output == output])
        worst = statistics.max(axis=0)  # NaN wins
        result.errors[output] = dict(zip(("mean", "p999", "max"), map(_rounded, worst), strict=True))
    result.within_tolerance = all(row.ok for row in rows)


def _rounded(value: float) -> float | None:
    """Three significant digits; None for what JSON has no number for."""
    return float(f"{value:.2e}") if math.isfinite(value) else None


def _megabytes(path: Path) -> float:
    return round(path.stat().st_size / 1e6, 1)


@contextlib.contextmanager
def _refusable(result: Result, step: str) -> Iterator[None]:
    """Record an error of the body instead of raising it."""
    try:
        yield
    except Exception as error:  # whatever the other side's code raises is a finding
        result.refusals[step] = reason(error)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence AutoCast's log, a line for every node; its exceptions still surface."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def table(results: list[Result]) -> str:
    """The results as aligned text: graphs, then placement, then errors, then refusals."""
    head = ("graph", "ONNX MB", "nodes", "casts", "made s", "runs", "plan s", "plan MB", "parity")
    graphs: list[tuple[str, ...]] = [head]
    verdicts = {True: "ok", False: "OUT", None: "-"}
    for r in results:
        numbers = (r.onnx_mb, r.nodes, r.casts, r.make_seconds, verdicts[r.runs or None])
        row = (*numbers, r.plan_seconds, r.plan_mb, verdicts[r.within_tolerance])
        graphs.append((r.name, *map(_cell, row)))
    made = [r for r in results if r.half]
    placement: list[tuple[str, ...]] = [("share in FP16", *(r.name for r in made))]
    for group in (*GROUPS, RESIDUAL):
        shares = (r.half.get(group) for r in made)
        placement.append((group, *("-" if s is None else f"{s:.0%}" for s in shares)))
    errors: list[tuple[str, ...]] = [("relative error", "output", "mean", "p99.9", "max")]
    for r in results:
        for output, values in r.errors.items():
            cells = ("nan" if v is None else f"{v:.1e}" for v in values.values())
            errors.append((r.name, output, *cells))
    parts = [aligned(graphs), aligned(placement), aligned(errors)]
    parts += [f"{r.name}, {step}: {why}" for r in results for step, why in r.refusals.items()]
    return "\n\n".join(parts)


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


def main() -> int:
    """Run the comparison, print it and write :data:`OUT`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.autocast",
        description="Compare ModelOpt AutoCast with this project's own FP16 policy.",
    )
    parser.add_argument("--model", default="da3-small", help="variant (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the drawn checkpoint (default: %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        variant = find_variant(arguments.model)
    except DA3Error as error:
        parser.error(f"--model: {error}")
    try:
        facts = provenance({package: version(package) for package in PACKAGES})
    except PackageNotFoundError as error:
        parser.error(f"{error.name} is missing: pip install -r requirements/benchmark.txt")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint = write_random_checkpoint(variant, arguments.seed, folder / "checkpoint").path
        listed = candidates(variant, checkpoint, folder)
        progress = Progress(variant.model_id, 1 + len(listed))
        with progress.step("reference", len(CASES)) as advance:
            upstream = load_upstream(variant, variant.graphs[0], checkpoint)
            reference: dict[Case, RawOutputs] = {}
            for case in CASES:
                reference[case] = run_reference(upstream, case_images(case), variant.graphs[0])
                advance(f"{case.height} x {case.width}")
            del upstream
        results = [measure(candidate, reference, progress) for candidate in listed]
    content = {
        "schema_version": SCHEMA_VERSION,
        "model": variant.model_id,
        "seed": arguments.seed,
        **facts,
        "reference": "upstream modules, PyTorch eager, FP32, CPU",
        "arithmetic": "every FP16 value rounded where the graph makes it, products summed in FP32",
        "cases": [case._asdict() for case in CASES],
        "results": [asdict(result) for result in results],
    }
    write_result(OUT, content)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
