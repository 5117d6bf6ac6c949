"""Collects the rows of ``benchmarks.backends``, formats them as a table and writes the result file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.contenders import CUDA
from benchmarks.record import host_load, installed, output_of, provenance, write_result
from benchmarks.reference import TOLERANCES
from benchmarks.roofline import Rates, Work
from benchmarks.rounds import MS, Round
from da3_export.parity.cases import Case
from da3_export.util.progress import aligned
from da3_runtime.backends.eager import Eager

SCHEMA_VERSION = 1
PACKAGES = (
    "torch",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-cu12",
    "tensorrt-lean-cu12-bindings",
    "tensorrt-rtx-cu12",
    "numpy",
)
HEAD = (
    "model",
    "head",
    "H x W",
    "batch",
    "contender",
    "",
    "median ms",
    "p99 ms",
    "images/s",
    "x eager",
    "x roofline",
    "MB",
    "cold s",
    "cached s",
    "error",
)


@dataclass
class Row:
    """One contender on one shape. Fields without a measurement are None or empty.

    The fields are the keys of the result file.

    Attributes
    ----------
    model, head, contender : str
        Model id, head and the contender's name.
    height, width, batch : int
        Shape of the input.
    precision : str | None
        ``fp32``, ``fp16`` or ``bf16``.
    artefact : str | None
        The artefact of the engine that ran.
    error : float | None
        Mean relative error of depth against eager FP32; the largest over the graphs.
    marked : bool
        Whether it was timed although the error is too large for FP16.
    why : str | None
        Reason if it was not timed.
    median_ms, p99_ms, images_per_s : float | None
        Latency and throughput from host to host.
    floor_ms : float | None
        The roofline (:mod:`benchmarks.roofline`).
    speedup : float | None
        Eager's median divided by this one.
    over_floor : float | None
        This median divided by the roofline.
    memory_mb : float | None
        MB (10^6 bytes) after this shape and the smaller ones have run.
    cold_s, cached_s : float | None
        Seconds from a bare interpreter to the first result, with empty and with filled caches.
    loads : dict[str, dict[str, float | None]]
        The same split into load and first run.
    rounds : list[Round]
        Median and 99th percentile of every round.
    """

    model: str
    head: str
    contender: str
    height: int
    width: int
    batch: int
    precision: str | None = None
    artefact: str | None = None
    error: float | None = None
    marked: bool = False
    why: str | None = None
    median_ms: float | None = None
    p99_ms: float | None = None
    images_per_s: float | None = None
    floor_ms: float | None = None
    speedup: float | None = None
    over_floor: float | None = None
    memory_mb: float | None = None
    cold_s: float | None = None
    cached_s: float | None = None
    loads: dict[str, dict[str, float | None]] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)


def finish(rows: list[Row], floor_ms: float) -> None:
    """Compute throughput and ratios of the rows of one case; ``floor_ms`` is its roofline."""
    eager = next((row.median_ms for row in rows if row.contender == Eager.name), None)
    for row in rows:
        row.floor_ms = floor_ms
        if row.median_ms is not None:
            row.images_per_s = row.batch * MS / row.median_ms
            row.over_floor = row.median_ms / floor_ms
            row.speedup = eager / row.median_ms if eager is not None else None


class Report:
    """All rows so far; :meth:`write` saves them after each shape.

    Parameters
    ----------
    out : Path
        The JSON file.
    device : str
        ``cuda`` or ``cpu``.
    rounds, runs : int
        Number of rounds, and of timed runs in each.
    """

    def __init__(self, out: Path, device: str, rates: Rates, rounds: int, runs: int) -> None:
        self.rows: list[Row] = []
        self._out = out
        self._facts = provenance(installed(PACKAGES))
        self._facts["gpu"] = gpu_facts() if device == CUDA else None
        self._host = host_load()
        self._rates = rates
        self._works: list[dict[str, object]] = []
        self._settings = {
            "device": device,
            "rounds": rounds,
            "runs_per_round": runs,
            "tolerances": TOLERANCES,
        }

    def add_work(self, model: str, head: str, case: Case, work: Work) -> None:
        """Add the counted work of a case."""
        self._works.append({"model": model, "head": head, **case._asdict(), **work._asdict()})

    def write(self) -> None:
        """Write the file atomically."""
        content = {
            "schema_version": SCHEMA_VERSION,
            **self._facts,
            "host": self._host,
            "settings": self._settings,
            "rates": self._rates._asdict(),
            "work": self._works,
            "rows": [_plain_row(row) for row in self.rows],
        }
        write_result(self._out, content)

    def text(self) -> str:
        """The rates, the table, and the contenders that were not timed."""
        rates = self._rates
        head = (
            f"{rates.dtype} matrix product {rates.flops_per_s / 1e12:.3g} TFLOP/s, "
            f"copy {rates.bytes_per_s / 1e9:.3g} GB/s, cache {rates.cache_bytes / 1e6:.0f} MB"
        )
        parts = (head, table(self.rows), refusals(self.rows), busy_sentence(self._host))
        return "\n\n".join(part for part in parts if part)


def busy_sentence(host: Mapping[str, object]) -> str:
    """What a busy host means for the figures; empty if the host (:func:`host_load`) is quiet."""
    if not host["busy"]:
        return ""
    return (
        f"The host is busy: other work uses {host['used']:.0%} of its processors' time, load average "
        f"{host['load_average']}. Contenders that launch their kernels from the host, as eager does, "
        "are slower than on a quiet host."
    )


def _plain_row(row: Row) -> dict[str, object]:
    return {**asdict(row), "rounds": [turn._asdict() for turn in row.rounds]}


def gpu_facts() -> dict[str, object]:
    """Facts about the GPU and its driver, for result files."""
    properties = torch.cuda.get_device_properties(0)
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_mb": round(properties.total_memory / 1e6),
        "driver": driver,
        "cuda": torch.version.cuda,
    }


def table(rows: list[Row]) -> str:
    """The timed rows as an aligned table; empty without timed rows."""
    lines: list[tuple[str, ...]] = [HEAD]
    for row in rows:
        if row.median_ms is None:
            continue
        speed = (_number(value, 3) for value in (row.median_ms, row.p99_ms, row.images_per_s))
        ratios = (_number(row.speedup, 3), _number(row.over_floor, 3))
        memory = "-" if row.memory_mb is None else f"{row.memory_mb:.0f}"
        loads = (_number(row.cold_s, 3), _number(row.cached_s, 3))
        error = "-" if row.error is None else f"{row.error:.1e}{'*' if row.marked else ''}"
        case = (row.model, row.head, f"{row.height} x {row.width}", str(row.batch), row.contender)
        lines.append((*case, row.precision or "", *speed, *ratios, memory, *loads, error))
    return aligned(lines) if len(lines) > 1 else ""


def _number(value: float | None, digits: int) -> str:
    """Format with ``digits`` significant digits and without an exponent."""
    if value is None:
        return "-"
    places = digits - 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, places)}f}"


def refusals(rows: list[Row]) -> str:
    """One line for each contender and reason that it was not timed, with the shapes."""
    shapes: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row.why is not None:
            key = (f"{row.model}/{row.head}", row.contender, row.why)
            shapes.setdefault(key, []).append(f"{row.batch} x {row.height} x {row.width}")
    return "\n".join(
        f"not timed: {model} {contender} ({', '.join(at)}): {why}"
        for (model, contender, why), at in shapes.items()
    )
