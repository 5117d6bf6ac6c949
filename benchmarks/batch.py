"""``make bench-batch``: photos per second of ``da3-runtime batch``, against ``da3-runtime depth``.

Both commands write the same files of the same photos, in turn, each in a process of its own. Loading the
model, and starting Ray, are not counted: they are reported apart.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import cv2
import numpy as np

from benchmarks.record import RESULTS, ROOT, installed, provenance, write_result
from da3_export.util.progress import aligned
from da3_runtime.commands.options import run_verb
from da3_runtime.errors import SettingError

_SUMMARY = re.compile(r"^\d+ \w+ in ([\d.]+) s,", re.MULTILINE)


def make_photos(folder: Path, count: int, side: int) -> None:
    """Write JPEG photos of ``side`` x 3/4 ``side`` pixels, 1000 in each folder below."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8)
    image = cv2.GaussianBlur(noise, (0, 0), 2)
    for index in range(count):
        path = folder / f"{index // 1000:03d}" / f"{index:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.roll(image, index, axis=1))


def timed(args: list[str], out: Path, count: int) -> tuple[float, float]:
    """Seconds that a command says it took for its photos, and those of its process beyond that.

    Raises
    ------
    SettingError
        If it failed, or did not write a file for each photo.
    """
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "da3_runtime", *args],
        cwd=ROOT,
        env=os.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    whole = time.perf_counter() - begun
    written = sum(1 for _ in out.rglob("*.depth.png"))
    found = _SUMMARY.search(done.stderr)
    if done.returncode or found is None or written != count:
        raise SettingError(f"{args[0]} failed, with {written} of {count} files: {done.stderr[-500:]}")
    return float(found[1]), whole - float(found[1])


def measure(args: argparse.Namespace) -> int:
    """Time both commands in turn, print a table, and write the result file."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in args.commands}
    options = ["--outputs", "depth_png16,camera"]
    if args.processing_res:
        options += ["--processing-res", str(args.processing_res)]
    with tempfile.TemporaryDirectory() as scratch:
        photos, out = Path(scratch) / "photos", Path(scratch) / "out"
        make_photos(photos, args.count, args.side)
        lines = {
            "depth": ["depth", str(photos), "--out", str(out), *options],
            "batch": ["batch", str(photos), str(out), *options],
        }
        for number in range(args.rounds):
            for name in sorted(taken, reverse=bool(number % 2)):
                taken[name].append(timed(lines[name], out, args.count))
                shutil.rmtree(out)
    rows = []
    for name, turns in taken.items():
        seconds = median(each for each, _ in turns)
        rows.append(
            {
                "command": f"da3-runtime {name}",
                "seconds": round(seconds, 1),
                "photos_per_second": round(args.count / seconds, 1),
                "start_and_end_seconds": round(median(each for _, each in turns), 1),
            }
        )
    print(aligned([tuple(rows[0]), *(tuple(map(str, row.values())) for row in rows)]))
    overhead = None
    if len(taken) == 2:
        folder, batch = (median(each for each, _ in taken[name]) for name in ("depth", "batch"))
        overhead = round(batch / folder - 1, 3)
        print(f"overhead of batch: {overhead:+.1%}")
    content = {
        "photos": args.count,
        "width": args.side,
        "height": args.side * 3 // 4,
        "processing_res": args.processing_res,
        "model": os.environ.get("MODEL"),
        "rounds": args.rounds,
        "rows": rows,
        "overhead": overhead,
    }
    packages = ("numpy", "onnxruntime", "opencv-python-headless", "pyarrow", "ray")
    write_result(args.out, content | provenance(installed(packages)))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch", description=__doc__)
    parser.add_argument("--count", type=int, default=3000, help="of photos")
    parser.add_argument("--side", type=int, default=168, help="width of the photos in pixels")
    parser.add_argument("--processing-res", type=int, help="of the network's input")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--commands", nargs="+", choices=("depth", "batch"), default=["depth", "batch"], metavar="NAME"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "batch.json")
    return run_verb(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
