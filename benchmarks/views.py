"""``make bench-views``: time and memory of a scene by its number of views, on the best backend here.

Scenes of 1, 2, 4 and 8 views of the example photos run in turn at one size, ``--size``. Their memory is
measured at the larger size of the other models, unless ``--no-memory`` is given.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from benchmarks.record import RESULTS, installed, provenance, write_result
from benchmarks.rounds import summarize, time_in_turn
from benchmarks.shapes import size_of
from da3_export.parity.cases import Case, case_images
from da3_export.util.memory import PeakMemory
from da3_export.util.progress import aligned
from da3_runtime.commands.options import run_verb
from da3_runtime.errors import SettingError
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.settings import Settings

VIEWS = (1, 2, 4, 8)
SIZE = "126x168"  # da3-nano's own size of a photo
SIDE = 504


def memory_of(loaded: Loaded, views: int) -> float | None:
    """Anonymous memory of this process in GB, at most, while it runs a scene; None without /proc."""
    images = case_images(Case(SIDE, SIDE, 1, views))
    with PeakMemory() as peak:
        loaded.run(images)
    return peak.gb and round(peak.gb, 2)


def measure(args: argparse.Namespace) -> int:
    """Time every number of views, print a table, and write the result file."""
    settings = Settings.from_env()
    height, width = size_of(args.size)
    loaded = load_backend(settings.engine)
    try:
        runs = {
            str(views): partial(loaded.run, case_images(Case(height, width, 1, views)))
            for views in VIEWS
        }
        seconds, failures = time_in_turn(runs, args.rounds, args.runs)
        memory = [memory_of(loaded, views) if args.memory else None for views in VIEWS]
    finally:
        loaded.close()
    if failures:
        raise SettingError("; ".join(f"{views} views: {why}" for views, why in failures.items()))
    medians = {views: summarize(turns).median_ms for views, turns in seconds.items()}
    alone = medians[str(VIEWS[0])]
    rows = [
        {
            "views": int(views),
            "ms": round(ms, 2),
            "ms_per_view": round(ms / int(views), 2),
            "times_alone": round(ms / int(views) / alone, 2),
            "gb_at_504": gb,
        }
        for (views, ms), gb in zip(medians.items(), memory, strict=True)
    ]
    head = ("views", "ms", "ms per view", "times one photo", "GB at 504 x 504")
    print(aligned([head, *(tuple(map(str, row.values())) for row in rows)]))
    content = {
        "model": loaded.folder.variant.model_id,
        "backend": loaded.backend.name,
        "height": height,
        "width": width,
        "rows": rows,
    }
    write_result(args.out, content | provenance(installed(("numpy", "onnxruntime", "torch"))))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.views", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=10, help="of each round")
    parser.add_argument("--size", default=SIZE, help="height x width; %(default)s")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--out", type=Path, default=RESULTS / "views.json")
    return run_verb(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
