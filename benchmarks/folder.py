"""``make bench-folder``: photos per second of a folder, against one at a time and against the bound.

The bound is the slower of two: the network alone, and the other stages alone on all cores. A network on
the CPU takes the cores of the other stages, so its bound is the sum of both times.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.record import RESULTS, installed, provenance, write_result
from da3_export.util.progress import aligned
from da3_runtime.backends.base import Backend
from da3_runtime.commands.depth_run import run_tasks
from da3_runtime.commands.depth_tasks import Task, find_tasks
from da3_runtime.commands.options import run_verb
from da3_runtime.inference.estimator import Estimator, Timings
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.inference.settings import InferenceSettings
from da3_runtime.network_io import MAX_BATCH, Conditions, RawOutputs
from da3_runtime.output.encode import Output, Wanted
from da3_runtime.output.run_manifest import Request, RunManifest
from da3_runtime.settings import Settings
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.util.parallel import usable_cores
from da3_runtime.variants import Head, find_variant

# Width, height, and the share of the photos with this size.
SIZES = ((640, 480, 0.6), (1600, 1200, 0.3), (4000, 3000, 0.1))
BATCH_SECONDS, IMAGE_SECONDS = 0.020, 0.002
REQUEST = Request(Wanted((Output.PREVIEW, Output.DEPTH_PNG16)))


class StandIn(Backend):
    """A network that takes its time on a device of its own: seconds for each batch and each image."""

    name, precision, trained, gains_from_batches = "stand-in", "fp32", True, True

    def __init__(self, batch_seconds: float, image_seconds: float) -> None:
        self._seconds = batch_seconds, image_seconds

    @classmethod
    def unavailable(cls) -> str | None:
        return None

    @classmethod
    def load(cls, folder: object, graph: object, settings: object) -> Backend:
        raise NotImplementedError

    def run(self, images: NDArray[np.uint8], conditions: Conditions | None = None) -> RawOutputs:
        batch, image = self._seconds
        time.sleep(batch + image * len(images))
        # A slope, so that encoding has something to do.
        depth = np.empty(images.shape[:4], np.float32)
        depth[:] = np.linspace(1, 9, images.shape[3], dtype=np.float32)
        intrinsics, extrinsics = (
            np.tile(np.eye(3, side, dtype=np.float32), (*images.shape[:2], 1, 1)) for side in (3, 4)
        )
        return RawOutputs(depth, depth, None, intrinsics, extrinsics)


def stand_in(batch_seconds: float, image_seconds: float) -> Estimator:
    """A model of the main series whose network is a :class:`StandIn`."""
    variant = find_variant("da3-large")
    graphs: dict[str, Backend] = {variant.graphs[0].name: StandIn(batch_seconds, image_seconds)}
    return Estimator(Loaded(EngineFolder(variant, Head.DPT, Path("none"), None), graphs, []))


def make_photos(folder: Path, count: int) -> None:
    """Write JPEG photos of the three sizes, with the detail that photos have, in a mixed order."""
    rng = np.random.default_rng(0)
    kinds = [
        cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), (0, 0), 2)
        for width, height, _ in SIZES
    ]
    chosen = rng.choice(len(SIZES), count, p=[share for *_, share in SIZES])
    folder.mkdir()
    for index, kind in enumerate(chosen):
        cv2.imwrite(str(folder / f"{index:06d}.jpg"), np.roll(kinds[kind], index * 8, axis=1))


def run(estimator: Estimator, tasks: Sequence[Task], one_at_a_time: bool = False) -> None:
    """Write the files of every photo."""
    for _, result in run_tasks(estimator, tasks, REQUEST, one_at_a_time=one_at_a_time):
        assert result.error is None, result.error


class Others:
    """Every stage but the network, in one process for each core."""

    def __init__(self, tasks: Sequence[Task], processes: int) -> None:
        parts = [tasks[number::processes] for number in range(processes)]
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
        self._parts = parts
        # Processes start, and import everything, before the first turn.
        list(self._pool.map(_run_part, [part[:1] for part in parts]))

    def run(self) -> None:
        """Run the stages for all photos."""
        list(self._pool.map(_run_part, self._parts))


def _run_part(tasks: Sequence[Task]) -> None:
    cv2.setNumThreads(1)
    run(stand_in(0, 0), tasks, one_at_a_time=True)


def peak_mb(count: int) -> float:
    """Peak memory of a process that writes the files of ``count`` small photos, in 2^20 bytes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_mb, count).result()


def _peak_mb(count: int) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "photos", Path(scratch) / "out"
        _, photo = cv2.imencode(".jpg", np.zeros((84, 112, 3), np.uint8))
        for index in range(count):
            path = folder / f"{index // 1000:03d}" / f"{index:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo.tobytes())
        tasks = find_tasks([folder], out).tasks
        with RunManifest(out) as manifest:
            for _, result in run_tasks(stand_in(0, 0), tasks, REQUEST, manifest):
                manifest.add(result.line)
    # Not ru_maxrss, which starts with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def network_inputs(estimator: Estimator, tasks: Sequence[Task]) -> list[NDArray[np.uint8]]:
    """The network's inputs in full batches of one size."""
    by_shape: dict[tuple[int, ...], list[NDArray[np.uint8]]] = {}
    for task in tasks:
        images = estimator.prepare(task.source.read_bytes(), Timings(), None).images
        by_shape.setdefault(images.shape, []).append(images)
    gains = estimator.loaded.backend.gains_from_batches
    size = MAX_BATCH if gains else 1
    return [
        np.concatenate(images[start : start + size])
        for images in by_shape.values()
        for start in range(0, len(images), size)
    ]


def run_network(estimator: Estimator, inputs: Sequence[NDArray[np.uint8]]) -> None:
    """Run the network alone."""
    for images in inputs:
        estimator.loaded.run(images)


def measure(args: argparse.Namespace) -> int:
    """Time every contender in turn, print a table, and write the result file."""
    settings = Settings.from_env()
    networks = {
        "stand-in": lambda: stand_in(BATCH_SECONDS, IMAGE_SECONDS),
        "da3-nano": lambda: Estimator.load(
            settings.changed(model_id="da3-nano", weights=None).engine, settings=InferenceSettings()
        ),
    }
    cores, rows = usable_cores(), []
    with tempfile.TemporaryDirectory() as scratch:
        make_photos(Path(scratch) / "photos", args.count)
        tasks = find_tasks([Path(scratch) / "photos"], Path(scratch) / "out").tasks
        others_alone = Others(tasks, cores)
        for name, load in networks.items():
            estimator = load()
            inputs = network_inputs(estimator, tasks)
            contenders: dict[str, Callable[[], None]] = {
                "one at a time": partial(run, estimator, tasks, True),
                "pipeline": partial(run, estimator, tasks),
                "network alone": partial(run_network, estimator, inputs),
                "other stages alone": others_alone.run,
            }
            seconds = _in_turn(contenders, args.rounds, Path(scratch) / "out")
            on_cpu = estimator.loaded.backend.on_cpu
            others, network = seconds["other stages alone"], seconds["network alone"]
            bound = others + network if on_cpu else max(others, network)
            rates = {each: round(args.count / taken, 1) for each, taken in seconds.items()}
            rows.append(
                {
                    "network": name,
                    **{each.replace(" ", "_"): rate for each, rate in rates.items()},
                    "bound": round(args.count / bound, 1),
                    "share_of_bound": round(bound / seconds["pipeline"], 3),
                    "speedup": round(seconds["one at a time"] / seconds["pipeline"], 2),
                }
            )
            estimator.close()
    print(aligned([tuple(rows[0]), *(tuple(map(str, row.values())) for row in rows)]))
    memory = [{"photos": count, "peak_mb": round(peak_mb(count))} for count in args.memory]
    print(aligned([tuple(memory[0]), *(tuple(map(str, row.values())) for row in memory)]))
    content = {
        "photos": args.count,
        "sizes": [f"{width} x {height}" for width, height, _ in SIZES],
        "shares": [share for *_, share in SIZES],
        "outputs": [str(output) for output in REQUEST.wanted.outputs],
        "rows": rows,
        "memory": memory,
    }
    packages = ("numpy", "opencv-python-headless", "onnxruntime", "simplejpeg")
    write_result(args.out, content | provenance(installed(packages)))
    return 0


def _in_turn(contenders: dict[str, Callable[[], None]], rounds: int, out: Path) -> dict[str, float]:
    """Median seconds of each contender; each round starts with another one."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            shutil.rmtree(out, ignore_errors=True)
            start = time.perf_counter()
            contenders[name]()
            taken[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in taken.items()}


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.folder", description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="of photos")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory", type=int, nargs="+", default=[1000, 20_000], help="counts of small photos"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "folder.json")
    return run_verb(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
