"""Every backend beside eager PyTorch, torch.compile, a plain export, and what the GPU could do at best.

    make bench-gpu DEVICE=cuda                        # every model and head
    make bench-gpu DEVICE=cuda MODELS=da3-large HEADS=dpt SIZES=504x504 BATCHES=1,8
    python -m benchmarks.backends --device cpu --models da3-nano --sizes 140x140 --batches 1,2 --rounds 3

What is timed is host to host: uint8 images in, FP32 maps out, copies included, for every contender.

- ``eager``: the network in upstream's own precision (on a GPU bf16 backbone and FP32 heads).
- ``compile``: torch.compile of that network, for fixed shapes.
- ``plain-NAME``: upstream's whole network cast to half and exported for the shape, run by that backend
  (:mod:`benchmarks.plain`); upstream has no SDT head, so there is none with it.
- ``NAME``: this project's engine, run by that backend.

Before it is timed, a contender's depth of the example photos must be that of the same network in eager
FP32 (TF32 off), to the mean relative error of :data:`benchmarks.reference.TOLERANCES`; one that is
further off is refused. bf16 is a baseline and timed all the same; a star marks an error that FP16 would
be refused for.

Contenders take turns within each round (:mod:`benchmarks.rounds`); a latency is the median of the
rounds' medians, the 99th percentile is over all runs, and ratios are of medians. Memory and seconds to
the first answer are those of processes of their own (:mod:`benchmarks.load_once`): ``cold`` with every
compiler's cache empty, ``cached`` with what the first process left there. Memory is what is held when
this shape and the smaller ones before it have been run. ``--no-loads`` leaves all three out. The floor
is :mod:`benchmarks.floor`'s.
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
    COMPILE,
    CPU,
    CUDA,
    PLAIN_PREFIX,
    Contender,
    cache_variables,
    contender_names,
    make_contender,
)
from benchmarks.floor import Rates, measure_rates
from benchmarks.load_once import Loading, observe
from benchmarks.plain import export_plain, plain_kinds
from benchmarks.record import RESULTS, ROOT, reason
from benchmarks.reference import TOLERANCES, Depths, Reference, depth_error, refusal
from benchmarks.report import Report, Row, finish
from benchmarks.rounds import MS, summarise, time_in_turn
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
from da3_runtime.variants import (
    MAX_SIDE,
    MIN_SIDE,
    PATCH,
    VARIANTS,
    Head,
    Variant,
    find_head,
    find_variant,
)

OUT = RESULTS / "gpu.json"
SIZES, BATCHES = "504x504,378x504,280x504", "1,4,8"
ROUNDS, RUNS = 7, 30


@dataclass(frozen=True)
class Options:
    """What to measure; attributes as the command line's options."""

    device: str
    models: tuple[Variant, ...]
    heads: tuple[Head, ...]
    cases: tuple[Case, ...]
    contenders: tuple[str, ...]
    rounds: int
    runs: int
    build: bool
    loads: bool
    out: Path


@dataclass
class Slot:
    """A contender on its way: how it loaded, and the model once it is loaded here."""

    contender: Contender
    why: str | None = None
    cold: Loading = field(default_factory=Loading)
    cached: Loading = field(default_factory=Loading)
    loaded: Loaded | None = None


def measure_engine(options: Options, variant: Variant, head: Head, report: Report, rates: Rates) -> None:
    """Measure every contender of one model and head on every case, and add the rows to the report."""
    settings = replace(Settings.from_env(), model_id=variant.model_id, head=head, ray_pose=False)
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
    except Exception as error:  # a model that does not fit or has no weights is a finding
        report.rows += [
            Row(variant.model_id, head, name, *case, why=reason(error))
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
                work.watch(name)
        work.load_all()
        try:
            for case in options.cases:
                step = f"{case.batch} x {case.height} x {case.width}"
                with progress.step(step) as advance:
                    rows = work.measure(case, advance)
                report.add_work(variant.model_id, head, case, reference.work[case])
                finish(rows, reference.work[case].floor_s(rates) * MS)
                report.rows += rows
                report.write()
        finally:
            work.close()


def build_engine(settings: Settings) -> None:
    """Run ``make engines``, for TensorRT too where it can build."""
    targets = [kind for kind in Kind if kind is not Kind.TENSORRT or TensorRT.unavailable() is None]
    command = [sys.executable, "-m", "da3_export", "engines", "--model", settings.model_id]
    command += ["--head", settings.head, "--targets", ",".join(targets), "--ray-pose", "0"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def _environment(caches: Path) -> Iterator[None]:
    """Have compilers in this process find what the processes before it have left in ``caches``."""
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
    """A function of a process id that gives the memory it has taken since now, 10^6 bytes.

    On a GPU the device's, which tells processes apart only if no other one starts or ends meanwhile.
    """

    def of_device(pid: int) -> float:
        free, whole = torch.cuda.mem_get_info()
        return (whole - free) / 1e6

    def of_process(pid: int) -> float:
        with PeakMemory(str(pid)) as memory:
            pass
        return (memory.gb or math.nan) * 1e3

    if device == CPU:
        return of_process
    before = of_device(0)
    return lambda pid: of_device(pid) - before


class Bench:
    """The contenders of one model and head."""

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

    def watch(self, name: str) -> None:
        """See how a contender loads in processes of its own."""
        contender = self._contender(name, self._scratch)
        self._slots[name] = self._observed(contender, self._options.cases)

    def load_all(self) -> None:
        """Load in this process what has loaded before."""
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
            rows[name].median_ms, rows[name].p99_ms, rows[name].rounds = summarise(turns)
        for slot in plain.values():
            _close(slot)
        return list(rows.values())

    def close(self) -> None:
        """Free every model."""
        for slot in self._slots.values():
            _close(slot)

    def _contender(self, name: str, plain: Path) -> Contender:
        folder = self._folder
        return make_contender(name, folder.variant, folder.head, self._engine_dir, plain)

    def _row(self, slot: Slot, case: Case) -> Row:
        row = Row(self._folder.variant.model_id, self._folder.head, slot.contender.name, *case)
        row.why = slot.why
        row.memory_mb = slot.cold.memory_mb.get(case)
        row.cold_s, row.cached_s = slot.cold.seconds, slot.cached.seconds
        row.loads = {
            name: {"load_s": loading.load_s, "first_s": loading.first_s}
            for name, loading in (("cold", slot.cold), ("cached", slot.cached))
        }
        return row

    def _observed(self, contender: Contender, cases: tuple[Case, ...]) -> Slot:
        slot = Slot(contender, contender.unavailable())
        own = contender.backend == Eager.name or contender.name.startswith(PLAIN_PREFIX)
        if slot.why is None and not own and self._folder.manifest is None:
            model, head = contender.model, contender.head
            slot.why = f"no engine: run make engines MODEL={model} HEAD={head}"
        if slot.why is not None or not self._options.loads:
            return slot
        caches = self._scratch / "caches" / contender.name
        variables, log = cache_variables(caches), self._scratch / "log"
        occupied = occupied_mb(self._options.device)
        slot.cold = observe(contender, cases, variables, log, occupied)
        slot.why = slot.cold.why
        if slot.why is None:
            slot.cached = observe(contender, cases[:1], variables, log, occupied)
        return slot

    def _plain_slots(self, case: Case) -> dict[str, Slot]:
        """The plain exports for a case, made, observed and loaded."""
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
            failures = export_plain(variant, checkpoint, case, wanted, engine_dir)
        except Exception as error:  # whatever the exporter raises is a finding
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
        except Exception as error:  # whatever a library raises is a finding
            slot.why = reason(error)
            _free()


def _close(slot: Slot) -> None:
    if slot.loaded is not None:
        slot.loaded.close()
        slot.loaded = None
    _free()


def check(row: Row, loaded: Loaded, images: NDArray[np.uint8], reference: Depths) -> None:
    """Compare a contender's depth with the reference, and say in its row if it is refused."""
    row.precision = loaded.backend.precision
    try:
        error = depth_error(loaded.run(images), reference)
    except Exception as failure:  # out of memory, most likely
        row.why = reason(failure)
        _free()
        return
    row.error = error if math.isfinite(error) else None
    row.why = refusal(row.precision, error)
    row.marked = row.why is None and row.precision not in TOLERANCES and error > TOLERANCES["fp16"]


def options_of(args: argparse.Namespace) -> Options:
    """The options, checked.

    Raises
    ------
    SettingError
        Naming the value that is not what its option takes, or if there is no such device.
    """
    if args.device == CPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise SettingError(
            "bench-gpu needs an NVIDIA GPU and a PyTorch built for CUDA (make setup DEVICE=cuda); "
            "there is none here."
        )
    known = contender_names(args.device)
    contenders = _listed(args.contenders) or known
    unknown = [name for name in contenders if name not in known]
    if unknown:
        raise SettingError(f"--contenders {unknown[0]!r} is not one of: {', '.join(known)}.")
    sizes = [size_of(text) for text in _listed(args.sizes)]
    batches = [positive("--batches", text) for text in _listed(args.batches)]
    cases = tuple(Case(*size, batch) for size in sizes for batch in batches)
    return Options(
        args.device,
        tuple(find_variant(model, "--models") for model in _listed(args.models)),
        tuple(find_head(head) for head in _listed(args.heads)),
        # Smallest first, so that memory is seen to grow.
        tuple(sorted(cases, key=math.prod)),
        tuple(name for name in known if name in contenders),
        positive("--rounds", args.rounds),
        positive("--runs", args.runs),
        args.build,
        args.loads,
        args.out,
    )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def positive(option: str, text: str) -> int:
    """A whole number above 0, the value of an option; raises SettingError."""
    if not text.isdecimal() or int(text) == 0:
        raise SettingError(f"{option} {text!r} is not a whole number above 0.")
    return int(text)


def size_of(text: str) -> tuple[int, int]:
    """Height and width of ``504x504``; raises SettingError if no network takes them."""
    height, _, width = text.lower().partition("x")
    sides = (positive("--sizes", height), positive("--sizes", width))
    if any(side % PATCH or not MIN_SIDE <= side <= MAX_SIDE for side in sides):
        raise SettingError(
            f"--sizes {text!r}: height and width must be multiples of {PATCH} "
            f"from {MIN_SIDE} to {MAX_SIDE}."
        )
    return sides


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
    add("--contenders", default=env("CONTENDERS", ""), help="CONTENDERS: who is measured; all")
    add("--rounds", default=str(ROUNDS), help="turns of each contender; %(default)s")
    add("--runs", default=str(RUNS), help="timed runs in a turn; %(default)s")
    add("--build", action="store_true", help="build engines that are missing or out of date first")
    add("--no-loads", dest="loads", action="store_false", help="do not measure loading and memory")
    add("--out", type=Path, default=Path(env("OUT", str(OUT))), help="OUT: benchmarks/results/gpu.json")
    return root


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and measure."""
    return run_verb(bench, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
