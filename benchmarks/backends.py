"""Times every backend beside eager PyTorch, torch.compile, a plain export and the device's roofline.

    make bench-gpu DEVICE=cuda                        # every model and head
    make bench-gpu DEVICE=cuda MODELS=da3-large HEADS=dpt SIZES=504x504 BATCHES=1,8
    python -m benchmarks.backends --device cpu --models da3-nano --sizes 140x140 --batches 1,2 --rounds 3

A time is from host to host: uint8 images in, FP32 maps out, copies included.

- ``eager``: the network in upstream's precision (on a GPU bf16 backbone and FP32 heads).
- ``compile``: torch.compile of that network, for fixed shapes.
- ``plain-NAME``: upstream's whole network cast to half precision and exported for the shape, run by
  backend NAME (:mod:`benchmarks.plain`). Upstream has no SDT head, so it is not measured with one.
- ``NAME``: this project's engine, run by backend NAME.
- Further contenders run only if they are named (:func:`benchmarks.contenders.extra_names`). Those with
  ``before-`` run the engines of the folder ``--before``.

A contender is timed only if its depth of the example photos agrees with that of the same network in
eager FP32 (TF32 off). :data:`benchmarks.reference.TOLERANCES` has the largest mean relative errors. bf16
is a baseline and always timed; a star marks an error that is too large for FP16.

Contenders take turns within each round (:mod:`benchmarks.rounds`). A latency is the median of the
rounds' medians, the 99th percentile is over all runs, and ratios are of medians.

Memory and seconds to the first result are measured in separate processes (:mod:`benchmarks.load_once`):
``cold`` with the caches of all compilers empty, ``cached`` with the caches that the first process
filled. Memory is measured after this shape and all smaller ones have run. ``--no-loads`` skips these
measurements. :mod:`benchmarks.roofline` defines the roofline.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.contenders import (
    AOTI,
    AOTI_CALLS,
    BEFORE_PREFIX,
    COMPILE,
    CPU,
    CUDA,
    PLAIN_PREFIX,
    Contender,
    cache_variables,
    contender_names,
    extra_names,
    make_contender,
)
from benchmarks.load_once import Loading, observe
from benchmarks.plain import export_plain, plain_kinds
from benchmarks.record import RESULTS, ROOT, reason
from benchmarks.reference import TOLERANCES, Depths, Reference, depth_error, refusal
from benchmarks.report import Report, Row, finish
from benchmarks.roofline import Rates, measure_rates
from benchmarks.rounds import MS, summarize, time_in_turn
from benchmarks.shapes import positive, size_of
from da3_export.parity.cases import Case, case_images
from da3_export.util.memory import PeakMemory
from da3_export.util.progress import Progress
from da3_runtime.backends import BACKENDS
from da3_runtime.backends.eager import Eager
from da3_runtime.backends.tensorrt import TensorRT
from da3_runtime.commands.options import run_verb
from da3_runtime.errors import SettingError
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.settings import Settings
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.find_engine import find_engine
from da3_runtime.store.manifest import Kind
from da3_runtime.store.settings import EngineSettings
from da3_runtime.variants import VARIANTS, Head, Variant, find_head, find_variant

OUT = RESULTS / "gpu.json"
SIZES, BATCHES = "504x504,378x504,280x504", "1,4,8"
ROUNDS, RUNS = 7, 30


@dataclass(frozen=True)
class Options:
    """What to measure: the parsed options of the command line."""

    device: str
    models: tuple[Variant, ...]
    heads: tuple[Head, ...]
    cases: tuple[Case, ...]
    contenders: tuple[str, ...]
    rounds: int
    runs: int
    build: bool
    loads: bool
    before: Path | None
    out: Path


@dataclass
class Slot:
    """A contender, how it loaded in other processes, and its model once this process has loaded it."""

    contender: Contender
    why: str | None = None
    cold: Loading = field(default_factory=Loading)
    cached: Loading = field(default_factory=Loading)
    loaded: Loaded | None = None


def measure_engine(options: Options, variant: Variant, head: Head, report: Report, rates: Rates) -> None:
    """Measure every contender on every case for one model and head, and add the rows to the report."""
    settings = replace(Settings.from_env().engine, model_id=variant.model_id, head=head, ray_pose=False)
    title = f"{variant.model_id}/{head}"
    common = [name for name in options.contenders if not name.startswith(PLAIN_PREFIX)]
    progress = Progress(title, 1 + int(options.build) + len(common) + len(options.cases))
    try:
        if options.build:
            with progress.step("engine"):
                build_engine(settings)
        with progress.step("reference"):
            folder, _ = find_engine(settings)
            reference = Reference(folder, settings, options.device, options.cases, rates.cache_bytes)
    except Exception as error:  # too little memory or missing weights: goes into the report
        report.rows += [
            Row(variant.model_id, head, name, *case[:3], why=reason(error))
            for case in options.cases
            for name in options.contenders
        ]
        report.write()
        progress.log(reason(error))
        return
    finally:
        _free()
    with tempfile.TemporaryDirectory() as scratch, _environment(Path(scratch, "caches", COMPILE)):
        work = Bench(options, folder, settings.engine_dir, reference, Path(scratch))
        for name in common:
            with progress.step(f"load {name}"):
                work.measure_load(name)
        work.load_all()
        try:
            for case in options.cases:
                step = f"{case.batch} x {case.height} x {case.width}"
                with progress.step(step) as advance:
                    rows = work.measure(case, advance)
                report.add_work(variant.model_id, head, case, reference.work[case])
                finish(rows, reference.work[case].roofline_s(rates) * MS)
                report.rows += rows
                report.write()
        finally:
            work.close()


def build_engine(settings: EngineSettings) -> None:
    """Build the engine, with a TensorRT plan if this machine can build one."""
    targets = [kind for kind in Kind if kind is not Kind.TENSORRT or TensorRT.unavailable() is None]
    command = [sys.executable, "-m", "da3_export", "engines", "--model", settings.model_id]
    command += ["--head", settings.head, "--targets", ",".join(targets), "--ray-pose", "0"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def _environment(caches: Path) -> Iterator[None]:
    """Let compilers in this process use the caches in ``caches``, which earlier processes filled."""
    variables = cache_variables(caches)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def occupied_mb(device: str) -> Callable[[int], float]:
    """A function from a process id to the memory that the process has allocated since now, in MB (10^6).

    On a GPU it is the growth of the device's used memory, so no other process may start or end
    meanwhile.
    """

    def of_device(pid: int) -> float:
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 1e6

    def of_process(pid: int) -> float:
        with PeakMemory(str(pid)) as memory:
            pass
        return (memory.gb or math.nan) * 1e3

    if device == CPU:
        return of_process
    before = of_device(0)
    return lambda pid: of_device(pid) - before


class Bench:
    """Loads, checks and times the contenders of one model and head."""

    def __init__(
        self,
        options: Options,
        folder: EngineFolder,
        engine_dir: Path,
        reference: Reference,
        scratch: Path,
    ) -> None:
        self._options = options
        self._folder = folder
        self._engine_dir = engine_dir
        self._reference = reference
        self._scratch = scratch
        self._slots: dict[str, Slot] = {}

    def measure_load(self, name: str) -> None:
        """Measure how a contender loads, in separate processes."""
        contender = self._contender(name, self._scratch)
        self._slots[name] = self._observed(contender, self._options.cases)

    def load_all(self) -> None:
        """Load in this process every contender that loaded in a separate one."""
        for slot in self._slots.values():
            _load(slot)

    def measure(self, case: Case, advance: Callable[[str], None]) -> list[Row]:
        """Check and time every contender on a case."""
        plain = self._plain_slots(case)
        slots = self._slots | plain
        rows = {name: self._row(slots[name], case) for name in self._options.contenders if name in slots}
        images = case_images(case)
        agreed: dict[str, Callable[[], object]] = {}
        for name, row in rows.items():
            loaded = slots[name].loaded
            if loaded is not None:
                check(row, loaded, images, self._reference.depths[case])
                if row.why is None:
                    agreed[name] = lambda loaded=loaded: loaded.run(images)  # type: ignore[misc]
            advance(f"check {name}")
        seconds, failures = time_in_turn(agreed, self._options.rounds, self._options.runs)
        for name, why in failures.items():
            rows[name].why = why
        for name, turns in seconds.items():
            rows[name].median_ms, rows[name].p99_ms, rows[name].rounds = summarize(turns)
        for slot in plain.values():
            _close(slot)
        return list(rows.values())

    def close(self) -> None:
        """Free every model."""
        for slot in self._slots.values():
            _close(slot)

    def _contender(self, name: str, plain: Path) -> Contender:
        folder = self._folder
        engines, before = self._engine_dir, self._options.before
        return make_contender(name, folder.variant, folder.head, engines, plain, before)

    def _row(self, slot: Slot, case: Case) -> Row:
        row = Row(self._folder.variant.model_id, self._folder.head, slot.contender.name, *case[:3])
        row.why = slot.why
        row.memory_mb = slot.cold.memory_mb.get(case[:3])
        row.cold_s, row.cached_s = slot.cold.seconds, slot.cached.seconds
        row.loads = {
            name: {"load_s": loading.load_s, "first_s": loading.first_s}
            for name, loading in (("cold", slot.cold), ("cached", slot.cached))
        }
        return row

    def _observed(self, contender: Contender, cases: tuple[Case, ...]) -> Slot:
        slot = Slot(contender, contender.unavailable())
        own = contender.backend in (Eager.name, AOTI, AOTI_CALLS) or contender.name.startswith(
            (PLAIN_PREFIX, BEFORE_PREFIX)
        )
        if slot.why is None and not own and self._folder.manifest is None:
            model, head = contender.model, contender.head
            slot.why = f"no engine: run make engines MODEL={model} HEAD={head}"
        if slot.why is not None or not self._options.loads:
            return slot
        caches = self._scratch / "caches" / contender.name
        variables, log = cache_variables(caches), self._scratch / "log"
        occupied = occupied_mb(self._options.device)
        shapes = [case[:3] for case in cases]
        slot.cold = observe(contender, shapes, variables, log, occupied)
        slot.why = slot.cold.why
        if slot.why is None:
            slot.cached = observe(contender, shapes[:1], variables, log, occupied)
        return slot

    def _plain_slots(self, case: Case) -> dict[str, Slot]:
        """Create the plain exports for a case, measure how they load, and load them."""
        names = [name for name in self._options.contenders if name.startswith(PLAIN_PREFIX)]
        if not names:
            return {}
        engine_dir = self._scratch / f"plain-{case.height}x{case.width}x{case.batch}"
        contenders = {name: self._contender(name, engine_dir) for name in names}
        slots = {
            name: Slot(contender, contender.unavailable()) for name, contender in contenders.items()
        }
        if self._folder.head is Head.SDT:
            return {name: replace(slot, why="upstream has no SDT head") for name, slot in slots.items()}
        kinds = {cls.name: Kind(cls.kind) for cls in BACKENDS if hasattr(cls, "kind")}
        usable = {name: kinds[slot.contender.backend] for name, slot in slots.items() if not slot.why}
        if not usable:
            return slots
        wanted = plain_kinds(list(usable.values()))
        variant, checkpoint = self._folder.variant, self._reference.checkpoint
        try:
            failures = export_plain(variant, checkpoint, case[:3], wanted, engine_dir)
        except Exception as error:  # any error of the exporter goes into the report
            failures = dict.fromkeys(wanted, reason(error))
        for name, kind in usable.items():
            slots[name].why = failures.get(kind)
            if slots[name].why is None:
                slots[name] = self._observed(contenders[name], (case,))
                _load(slots[name])
        return slots


def _load(slot: Slot) -> None:
    if slot.why is None:
        try:
            slot.loaded = slot.contender.load()
        except Exception as error:  # any error of a library goes into the report
            slot.why = reason(error)
            _free()


def _close(slot: Slot) -> None:
    if slot.loaded is not None:
        slot.loaded.close()
        slot.loaded = None
    _free()


def check(row: Row, loaded: Loaded, images: NDArray[np.uint8], reference: Depths) -> None:
    """Compare a contender's depth with the reference; ``row.why`` is the reason if it is refused."""
    row.precision = loaded.backend.precision
    row.artefact = None if loaded.backend.artefact is None else loaded.backend.artefact.name
    try:
        error = depth_error(loaded.run(images), reference)
    except Exception as failure:  # such as out of memory
        row.why = reason(failure)
        _free()
        return
    row.error = error if math.isfinite(error) else None
    row.why = refusal(row.precision, error)
    row.marked = row.why is None and row.precision not in TOLERANCES and error > TOLERANCES["fp16"]


def options_of(args: argparse.Namespace) -> Options:
    """Check the options.

    Raises
    ------
    SettingError
        If an option has an invalid value, or the device is not available.
    """
    if args.device == CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise SettingError(
            "bench-gpu needs an NVIDIA GPU and a PyTorch built for CUDA; this machine lacks one "
            "(make setup DEVICE=cuda installs PyTorch for CUDA; --device cpu measures the CPU)."
        )
    known = [*contender_names(args.device), *extra_names(args.device)]
    contenders = _listed(args.contenders) or contender_names(args.device)
    unknown = [name for name in contenders if name not in known]
    if unknown:
        raise SettingError(f"--contenders {unknown[0]!r} is not one of: {', '.join(known)}.")
    if args.before is None and any(name.startswith(BEFORE_PREFIX) for name in contenders):
        raise SettingError(
            "--contenders names one of --before, the folder of its engines: set --before."
        )
    sizes = [size_of(text) for text in _listed(args.sizes)]
    batches = [positive("--batches", text) for text in _listed(args.batches)]
    cases = tuple(Case(*size, batch) for size in sizes for batch in batches)
    return Options(
        args.device,
        tuple(find_variant(model, "--models") for model in _listed(args.models)),
        tuple(find_head(head) for head in _listed(args.heads)),
        # Smallest first: memory is reported after each shape and grows with it.
        tuple(sorted(cases, key=math.prod)),
        tuple(name for name in known if name in contenders),
        positive("--rounds", args.rounds),
        positive("--runs", args.runs),
        args.build,
        args.loads,
        args.before,
        args.out,
    )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def bench(args: argparse.Namespace) -> int:
    """Measure, print the table, write the file."""
    options = options_of(args)
    rates = measure_rates(options.device)
    report = Report(options.out, options.device, rates, options.rounds, options.runs)
    try:
        for variant in options.models:
            for head in options.heads:
                measure_engine(options, variant, head, report, rates)
    finally:
        print(report.text())
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line; lists are comma-separated."""

    def env(name: str, default: str) -> str:
        return os.environ.get(name) or default

    root = argparse.ArgumentParser(
        prog="python -m benchmarks.backends", description="Latency, memory and load of every backend."
    )
    add = root.add_argument
    add("--device", choices=(CUDA, CPU), default=CUDA, help="%(default)s")
    add("--models", default=env("MODELS", ",".join(VARIANTS)), help="MODELS: model ids; all")
    add("--heads", default=env("HEADS", ",".join(Head)), help="HEADS: %(default)s")
    add("--sizes", default=env("SIZES", SIZES), help="SIZES: height x width; %(default)s")
    add("--batches", default=env("BATCHES", BATCHES), help="BATCHES: %(default)s")
    add("--contenders", default=env("CONTENDERS", ""), help="CONTENDERS: contenders to measure; all")
    add("--rounds", default=str(ROUNDS), help="turns of each contender; %(default)s")
    add("--runs", default=str(RUNS), help="timed runs in a turn; %(default)s")
    add("--build", action="store_true", help="build engines that are missing or out of date first")
    add("--no-loads", dest="loads", action="store_false", help="do not measure loading and memory")
    add("--before", type=Path, help="folder of the engines that contenders before-NAME run")
    add("--out", type=Path, default=Path(env("OUT", str(OUT))), help="OUT: benchmarks/results/gpu.json")
    return root


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and measure."""
    return run_verb(bench, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
