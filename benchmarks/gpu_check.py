"""Everything that needs a GPU, within ten minutes: tests, parity of scenes, latency, kernels.

``benchmarks/gpu_check.sh`` runs it. Each step is a process with a time limit of its own, and the result
file is written after each step, so a step that hangs or fails costs only itself. Steps that are not
timed run side by side; a timed step runs alone.

The models have random weights, except da3-nano. ``before`` has the artefact ``onnx-fp16`` alone,
``after`` also the fused ``onnx-fp16-ort``, which the backend prefers, if this release builds it. On a
CPU (``DEVICE=cpu``, to try the script) both are da3-nano's ``onnx-fp32``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.contenders import (
    AOTI,
    AOTI_CALLS,
    BEFORE_PREFIX,
    COMPILE,
    CPU,
    CUDA,
    ENGINE_BACKENDS,
    LOOSE_SUFFIX,
    NHWC_SUFFIX,
)
from benchmarks.record import RESULTS, ROOT, installed, provenance, without_folders, write_result
from da3_export.util.progress import aligned
from da3_runtime.backends.eager import Eager
from da3_runtime.store.manifest import Kind

WORK = ROOT / ".cache" / "gpu-check"
BEFORE, AFTER = WORK / "before", WORK / "after"
LARGE, SMALL, METRIC, NANO = "da3-large", "da3-small", "da3metric-large", "da3-nano"
RANDOM = "random:0"
# Of all steps: a command on the GPU machine may take ten minutes; compilers are slow on a few cores.
LIMIT_S = {CUDA: 570, CPU: 1200}
LEAST_S = 5  # with less time left no step starts
# What the figures of LARGE at 504 x 504, batch 1, must reach.
MOST_MS, LEAST_SPEEDUP = 5.5, 3.0
AOTI_GAIN = 1.3  # times faster than the fused graph: then AOTInductor's package is worth an artefact
# Variables that would change what the steps measure.
FOREIGN = ("OUT", "MODEL", "MODEL_ID", "MODELS", "HEAD", "HEADS", "WEIGHTS", "TARGETS", "ENGINE_DIR",
           "BACKEND", "SIZES", "BATCHES", "CONTENDERS", "RAY_POSE")  # fmt: skip
TAIL_LINES = 30


@dataclass(frozen=True)
class Step:
    """A process to run.

    Attributes
    ----------
    name : str
        Name in the result file.
    command : tuple[str, ...]
        Arguments of ``python -m``.
    limit_s : float
        Seconds after which it is killed.
    needs : tuple[str, ...]
        Steps that must have run before.
    after : tuple[str, ...]
        Steps that must have ended before, however they ended.
    result : Path | None
        File that it writes.
    embedded : bool
        Whether the result file of all steps holds that file's content.
    needs_gpu : bool
        Whether it has no form for a CPU.
    env : dict[str, str]
        Environment variables to add.
    may_exit : tuple[int, ...]
        Exit codes of a step that ran.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    result: Path | None = None
    embedded: bool = False
    needs_gpu: bool = False
    env: dict[str, str] = field(default_factory=dict)
    may_exit: tuple[int, ...] = (0,)


class Runner:
    """Runs steps, and writes the result file after each.

    Parameters
    ----------
    out : Path
        The result file.
    facts : Mapping[str, object]
        What the file says beside the steps.
    device : str
        ``cuda`` or ``cpu``.
    limit_s : float
        Seconds for all steps together.
    at_once : int
        How many steps run side by side.
    """

    def __init__(
        self, out: Path, facts: Mapping[str, object], device: str, limit_s: float, at_once: int
    ) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self._out, self._facts, self._device = out, facts, device
        self._begin = time.monotonic()
        self._deadline = self._begin + limit_s
        self._lock = threading.Lock()
        self._free = threading.Semaphore(at_once)
        self._ended: dict[str, threading.Event] = {}

    def run(self, steps: Sequence[Step]) -> None:
        """Run all steps, each as soon as those before it have ended."""
        self._ended = {step.name: threading.Event() for step in steps}
        with ThreadPoolExecutor(len(steps)) as pool:
            for _ in pool.map(self._run, steps):
                pass

    def write(self, **more: object) -> None:
        """Write the result file."""
        steps = [{"name": name, **entry} for name, entry in self.entries.items()]
        write_result(self._out, {**self._facts, "steps": steps, **more})

    def _run(self, step: Step) -> None:
        for name in (*step.needs, *step.after):
            self._ended[name].wait()
        try:
            missing = [name for name in step.needs if self.entries[name]["status"] != "ran"]
            with self._free:
                entry = self._entry(step, missing)
        except Exception as error:
            entry = {"status": "failed", "why": repr(error)}
        finally:
            with self._lock:
                self.entries[step.name] = entry
                self.write()
            at = time.monotonic() - self._begin
            print(f"[{at:3.0f} s] {step.name}: {entry['status']} {entry.get('why', '')}", flush=True)
            self._ended[step.name].set()

    def _entry(self, step: Step, missing: list[str]) -> dict[str, Any]:
        left = self._deadline - time.monotonic()
        if step.needs_gpu and self._device == CPU:
            return {"status": "not run", "why": "no GPU"}
        if missing:
            return {"status": "not run", "why": f"{missing[0]} did not run"}
        if left < LEAST_S:
            return {"status": "not run", "why": "no time left"}
        if step.result is not None:
            step.result.parent.mkdir(parents=True, exist_ok=True)
            step.result.unlink(missing_ok=True)
        average = [round(each, 2) for each in os.getloadavg()]
        start = time.monotonic()
        entry = _ending(step, min(step.limit_s, left))
        entry |= {"seconds": round(time.monotonic() - start, 1), "load_average": average}
        if step.result is not None and step.result.exists():
            if step.result.suffix == ".xml":
                entry["result"] = summary_of(step.result)
            elif step.embedded:
                entry["result"] = json.loads(step.result.read_text())
            else:
                entry["file"] = step.result.name
        return entry


def _ending(step: Step, limit_s: float) -> dict[str, Any]:
    """Run a step's process to its end or its limit; how it ended, and the end of what it printed."""
    log = WORK / "logs" / f"{step.name.replace(' ', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {name: value for name, value in os.environ.items() if name not in FOREIGN} | step.env
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *step.command],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit_s)
            entry: dict[str, Any] = {"status": "ran"}
            if code not in step.may_exit:
                entry = {"status": "failed", "why": f"exit code {code}"}
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            entry = {"status": "timed out", "why": f"killed after {limit_s:.0f} s"}
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return {**entry, "tail": [without_folders(line) for line in lines[-TAIL_LINES:]]}


def summary_of(junit: Path) -> dict[str, Any]:
    """How many tests passed, and which failed or were skipped for which reason, of pytest's XML."""
    passed, failed, skipped = 0, {}, {}
    for test in ElementTree.parse(junit).iter("testcase"):
        found = {child.tag: child.get("message", "") for child in test}
        name = f"{test.get('classname', '').rpartition('.')[2]}::{test.get('name')}"
        why = found.get("failure", found.get("error"))
        if why is not None:
            failed[name] = (why.splitlines() or [""])[0]
        elif "skipped" in found:
            skipped[name] = found["skipped"]
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": skipped}


def steps_of(device: str, out: Path) -> list[Step]:
    """All steps on a device, the most important first."""
    on_gpu = device == CUDA
    main, models = (LARGE, (LARGE, SMALL, METRIC)) if on_gpu else (NANO, (NANO,))
    scene_models = (NANO, SMALL) if on_gpu else (NANO,)
    size, engine = (
        ("504x504", ENGINE_BACKENDS[CUDA][-1]) if on_gpu else ("84x84", ENGINE_BACKENDS[CPU][-1])
    )
    earlier = ["onnx-fp16"] if on_gpu else ["onnx-fp32"]
    later = [kind for kind in Kind if kind.startswith("onnx-fp16")] if on_gpu else earlier
    no_gpu = {"CUDA_VISIBLE_DEVICES": ""}
    base = {} if on_gpu else no_gpu
    # Builds run side by side; with threads for all cores each would slow the others down.
    on_cpu = no_gpu | {"OMP_NUM_THREADS": "4"} if on_gpu else no_gpu
    env = base | {"ENGINE_DIR": str(AFTER)}
    # The models that take longest to build first.
    built = sorted({*models, *scene_models}, key=lambda model: (LARGE, METRIC, SMALL, NANO).index(model))

    def build(model: str, engine_dir: Path, targets: Sequence[str]) -> tuple[str, ...]:
        weights = () if model == NANO else ("--weights", RANDOM)
        where = ("--engine-dir", str(engine_dir), "--targets", ",".join(targets))
        return ("--model", model, *weights, *where)

    quick = "benchmarks.quick_engine"
    steps = [
        Step(f"build before {model}", (quick, *build(model, BEFORE, earlier)), 240, env=on_cpu)
        for model in built
    ]
    tests = sorted(
        str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()
    )
    junit = WORK / "tests.xml"
    steps.append(
        Step(
            "tests",
            ("pytest", "-q", "-m", "gpu", f"--junitxml={junit}", *tests),
            170,
            result=junit,
            env=base,
            may_exit=(0, 1),  # 1: a test failed
        )
    )
    # The tests take all of the GPU's memory, so nothing else uses the GPU meanwhile.
    steps += [
        Step(
            f"build after {model}",
            (quick, "--copy-of", str(BEFORE), *build(model, AFTER, later)),
            150,
            needs=(f"build before {model}",),
            after=("tests",),
            env=base,
        )
        for model in built
    ]
    steps.append(
        Step(
            "aoti package",
            ("benchmarks.aoti", "--model", main, "--size", size),
            240,
            needs=(f"build before {main}",),
            after=("tests",),
            env=base | {"ENGINE_DIR": str(BEFORE)},
        )
    )

    def alone(name: str, command: tuple[str, ...], limit_s: float, **fields: Any) -> None:
        """Add a step that runs when all steps before it have ended."""
        ended = tuple(step.name for step in steps)
        steps.append(Step(name, command, limit_s, after=ended, **{"env": env, **fields}))

    before = ("--before", str(BEFORE))
    scenes = ("benchmarks.scenes", "--device", device, *before, "--models", ",".join(scene_models))
    result = WORK / "scenes.json"
    alone("scenes", (*scenes, "--out", str(result)), 90, result=result, embedded=True)
    result = WORK / "views.json"
    views = ("benchmarks.views", "--size", size, "--no-memory", "--rounds", "3", "--out", str(result))
    alone("views", views, 45, result=result, embedded=True, env=env | {"MODEL": main, "BACKEND": engine})
    for model in models:
        names = [Eager.name, BEFORE_PREFIX + engine, engine]
        if on_gpu:
            names += [BEFORE_PREFIX + engine + NHWC_SUFFIX, engine + NHWC_SUFFIX, engine + LOOSE_SUFFIX]
        if model == main:
            names += [AOTI, AOTI_CALLS] if on_gpu else [AOTI_CALLS]
        alone(
            f"latency {model}",
            _latency(device, model, size, names, out / f"gpu_check_{model}.json"),
            120,
            needs=(f"build before {model}",),
            result=out / f"gpu_check_{model}.json",
            # Compiling here would take the time of all contenders.
            env=env | {"AOTI_COMPILE": "0"},
        )
    for name, backend in (("before", BEFORE_PREFIX + engine), ("after", engine)):
        path = out / f"gpu_check_kernels_{name}.json"
        command = ("benchmarks.kernels", "--model", main, "--backend", backend, "--size", size, *before)
        needs = (f"build before {main}",)
        alone(
            f"kernels {name}",
            (*command, "--out", str(path)),
            45,
            needs=needs,
            result=path,
            needs_gpu=True,
        )
    path = out / "gpu_check_compile.json"
    alone(
        "torch.compile",
        _latency(device, main, size, [Eager.name, COMPILE, engine], path),
        240 if on_gpu else 600,
        needs=(f"build before {main}",),
        result=path,
    )
    return steps


def _latency(
    device: str, model: str, size: str, contenders: Sequence[str], out: Path
) -> tuple[str, ...]:
    command = ("benchmarks.backends", "--device", device, "--models", model, "--heads", "dpt")
    shape = ("--sizes", size, "--batches", "1", "--no-loads", "--before", str(BEFORE))
    brief = ("--rounds", "2", "--runs", "3") if device == CPU else ()
    return (*command, *shape, *brief, "--contenders", ",".join(contenders), "--out", str(out))


def figures_of(model: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ratios of the medians of one model's contenders; a ratio without its two medians is None.

    ``engine_ms`` is the median of this project's engine ``after``, which ran ``artefact``.
    ``over_before``, ``over_eager`` and ``over_aoti`` say how many times faster it is, ``over_roofline``
    how many times slower than the roofline. ``nhwc_gain`` and ``loose_gain`` say how many times faster
    it is with the channels last, and with norms in one pass. ``met`` says whether da3-large reaches
    :data:`MOST_MS` and :data:`LEAST_SPEEDUP`; None for other models.
    """
    median = {row["contender"]: row["median_ms"] for row in rows if row["median_ms"] is not None}
    engine = next((names[-1] for names in ENGINE_BACKENDS.values() if names[-1] in median), "")
    after = median.get(engine)
    artefacts = {row["contender"]: row["artefact"] for row in rows}
    of_aoti = [median[name] for name in (AOTI, AOTI_CALLS) if name in median]

    def over(other: float | None) -> float | None:
        return None if after is None or other is None else round(other / after, 3)

    nhwc, loose = (over(median.get(engine + suffix)) for suffix in (NHWC_SUFFIX, LOOSE_SUFFIX))
    speedup, aoti = over(median.get(Eager.name)), over(min(of_aoti, default=None))
    floor = next((row["over_floor"] for row in rows if row["contender"] == engine), None)
    met = None
    if model == LARGE and after is not None:
        met = {
            "ms": after <= MOST_MS,
            "speedup": None if speedup is None else speedup >= LEAST_SPEEDUP,
        }
    return {
        "model": model,
        "artefact": artefacts.get(engine),
        "before_artefact": artefacts.get(BEFORE_PREFIX + engine),
        "engine_ms": after,
        "eager_ms": median.get(Eager.name),
        "over_before": over(median.get(BEFORE_PREFIX + engine)),
        "over_eager": speedup,
        "over_roofline": floor,
        "over_aoti": aoti,
        "nhwc_gain": None if nhwc is None else round(1 / nhwc, 3),
        "loose_gain": None if loose is None else round(1 / loose, 3),
        "keep_aoti": None if aoti is None else 1 / aoti >= AOTI_GAIN,
        "met": met,
    }


def sentences(figures: Mapping[str, Any]) -> list[str]:
    """The figures of one model as sentences."""
    model, ms = figures["model"], figures["engine_ms"]
    if ms is None:
        return [f"{model}: the engine was not timed."]
    parts = {
        "over_eager": "{:.2f} times faster than eager",
        "over_before": "{:.2f} times faster than before",
        "nhwc_gain": "{:.2f} times faster with prefer_nhwc",
        "loose_gain": "{:.2f} times faster with norms in one pass",
        "over_aoti": "{:.2f} times faster than AOTInductor's package",
        "over_roofline": "{:.2f} times the roofline",
    }
    ratios = [text.format(figures[name]) for name, text in parts.items() if figures[name] is not None]
    said = [f"{model} ({figures['artefact']}): {ms:.2f} ms; {', '.join(ratios)}."]
    if figures["artefact"] == figures["before_artefact"]:
        said.append(f"{model}: before and after ran the same artefact; their ratio is noise.")
    if figures["keep_aoti"] is not None:
        verdict = "worth" if figures["keep_aoti"] else "not worth"
        said.append(
            f"{model}: AOTInductor's package is {verdict} an artefact (from {AOTI_GAIN} times on)."
        )
    if figures["met"] is not None:
        words = {True: "met", False: "NOT MET", None: "not measured"}
        said.append(
            f"{model}: target of {MOST_MS} ms: {words[figures['met']['ms']]} ({ms:.2f} ms); target of "
            f"{LEAST_SPEEDUP:.0f} times faster than eager: {words[figures['met']['speedup']]}"
            + (f" ({figures['over_eager']:.2f} times)." if figures["over_eager"] is not None else ".")
        )
    return said


def check(device: str, out: Path, limit_s: float) -> int:
    """Run all steps and print what they found; 0 if all ran, those that need a GPU aside on a CPU."""
    versions = installed(("torch", "triton", "onnxruntime", "onnxruntime-gpu", "numpy"))
    facts = {**provenance(versions), "device_kind": device}
    runner = Runner(out / "gpu_check.json", facts, device, limit_s, at_once=8 if device == CUDA else 1)
    steps = steps_of(device, out)
    runner.run(steps)
    figures, busy = [], []
    for name, entry in runner.entries.items():
        if name.startswith("latency ") and "file" in entry:
            content = json.loads((out / entry["file"]).read_text())
            figures.append(figures_of(name.removeprefix("latency "), content["rows"]))
            if content["host"]["busy"]:
                busy.append(f"The host was busy during {name}: {content['host']}.")
    runner.write(figures=figures)
    lines = [(name, entry["status"], f"{entry.get('seconds', 0):.0f} s", entry.get("why", ""))
             for name, entry in runner.entries.items()]  # fmt: skip
    print(aligned([("step", "", "time", "why"), *lines]))
    for name, entry in runner.entries.items():
        if entry["status"] in ("failed", "timed out"):
            print(f"\n{name}:", *entry["tail"][-8:], sep="\n  ")
    tests = runner.entries["tests"].get("result")
    if tests is not None:
        failed, skipped = len(tests["failed"]), len(tests["skipped"])
        print(f"\nTests: {tests['passed']} passed, {failed} failed, {skipped} skipped.")
        print(*(f"  {name}: {why}" for name, why in tests["failed"].items()), sep="\n")
    scenes = runner.entries["scenes"]
    if scenes["status"] == "ran":
        print(*scenes["tail"], sep="\n")
    print(*busy, *(sentence for each in figures for sentence in sentences(each)), sep="\n")
    fine = ("ran",) if device == CUDA else ("ran", "not run")
    return 0 if all(entry["status"] in fine for entry in runner.entries.values()) else 1


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run all steps."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_check.sh", description=__doc__)
    parser.add_argument("--device", choices=(CUDA, CPU), default=CUDA)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args(argv)
    return check(args.device, args.out.resolve(), LIMIT_S[args.device])


if __name__ == "__main__":
    sys.exit(main())
