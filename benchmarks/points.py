"""``make bench-points``: the time of finding a million points and of writing them to files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.record import RESULTS, installed, provenance, write_result
from benchmarks.rounds import summarize, time_in_turn
from da3_export.util.progress import aligned
from da3_runtime.commands.options import run_verb
from da3_runtime.errors import SettingError
from da3_runtime.output.colmap import colmap
from da3_runtime.output.encode import name_of
from da3_runtime.output.glb import glb
from da3_runtime.output.ply import ply
from da3_runtime.postprocess.camera import Camera, centered_lens
from da3_runtime.postprocess.depth import Depth, Prediction, Seen
from da3_runtime.postprocess.points import PointOptions, cloud_of
from da3_runtime.variants import Unit

VIEWS, SIDE = 8, 504
POINTS = 1_000_000


def random_view(rng: np.random.Generator) -> Seen:
    """A photo, its depth and its confidence, without a meaning."""
    lens = centered_lens(SIDE, SIDE, SIDE, "")
    depth = Depth(rng.uniform(1, 9, (SIDE, SIDE)).astype(np.float32), Unit.RELATIVE)
    confidence = rng.uniform(1, 9, (SIDE, SIDE)).astype(np.float32)
    camera = Camera(lens.intrinsics, np.eye(3, 4, dtype=np.float32))
    image = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    model = Prediction(depth, camera, {"confidence": confidence}, None, [])
    return Seen(image, model, SIDE, SIDE, 0, 0, (1.0, 1.0))


def measure(args: argparse.Namespace) -> int:
    """Time every step, print a table, and write the result file."""
    rng = np.random.default_rng(0)
    views = [random_view(rng) for _ in range(VIEWS)]
    options = PointOptions(edge=0, most=POINTS)
    cloud, names = cloud_of(views, options), [name_of(index) for index in range(VIEWS)]
    assert len(cloud.xyz) == POINTS
    runs: dict[str, Callable[[], object]] = {
        "find the points": partial(cloud_of, views, options),
        "glb": partial(glb, cloud, views, names, "relative", cameras=True),
        "ply": partial(ply, cloud, "relative"),
        "colmap": partial(colmap, cloud, views, names),
    }
    seconds, failures = time_in_turn(runs, args.rounds, args.runs)
    if failures:
        raise SettingError("; ".join(f"{step}: {why}" for step, why in failures.items()))
    rows = [{"step": step, "ms": round(summarize(turns).median_ms)} for step, turns in seconds.items()]
    print(aligned([("step", "ms"), *(tuple(map(str, row.values())) for row in rows)]))
    content = {"points": POINTS, "views": VIEWS, "side": SIDE, "rows": rows}
    write_result(args.out, content | provenance(installed(("numpy",))))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.points", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=3, help="of each round")
    parser.add_argument("--out", type=Path, default=RESULTS / "points.json")
    return run_verb(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
