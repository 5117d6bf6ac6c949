"""Command line of the runtime: ``python -m runtime VERB``."""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import sys
from pathlib import Path

from tqdm import tqdm

from runtime.batch import (
    JSON,
    SUFFIXES,
    Task,
    Wanted,
    check_no_overwrite,
    facts,
    find_outputs,
    find_tasks,
    write_outputs,
)
from runtime.cli import RUN_OPTIONS, add_engine_options, run_verb, settings_of
from runtime.errors import DA3Error, ImageError, SettingError
from runtime.outputs import Output
from runtime.pipeline import Estimator, Timings
from runtime.render import COLOUR_MAPS, DEFAULT_TONE


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="python -m runtime", description="Run depth engines.")
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    depth = verbs.add_parser("depth", help="depth of photos, as pictures and as numbers")
    depth.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files and folders")
    depth.add_argument(
        "--out", default=Path("depth.png"), type=Path, help="folder, or the picture (.png) of one image"
    )
    depth.add_argument(
        "--outputs", default="preview,camera", help=f"comma-separated: {', '.join(Output)}"
    )
    depth.add_argument("--color-map", default="inferno", help=f"of color: {', '.join(COLOUR_MAPS)}")
    depth.add_argument("--focal-length-px", type=float, help="in pixels of the images; metres with it")
    depth.add_argument("--model-size", action="store_true", help="write maps at the model's size")
    depth.add_argument("--verbose", action="store_true", help="log why backends were passed over")
    add_engine_options(depth, RUN_OPTIONS)
    return root


def run_depth(args: argparse.Namespace) -> int:
    """``depth``: write the files, print what they mean; 1 if any image failed."""
    settings = settings_of(args)
    wanted = Wanted(find_outputs(args.outputs), DEFAULT_TONE, args.color_map)
    if args.color_map not in COLOUR_MAPS:
        known = ", ".join(COLOUR_MAPS)
        raise SettingError(f"--color-map {args.color_map!r} is not one of: {known}.")
    if args.focal_length_px is not None and not 0 < args.focal_length_px < math.inf:
        raise SettingError(f"--focal-length-px must be over 0, not {args.focal_length_px}.")
    tasks = _tasks(args.images, args.out)
    check_no_overwrite(tasks)

    loading = Timings()
    with loading.stage("load"):
        estimator = Estimator.load(settings)
    loaded = estimator.loaded
    model: JSON = {
        "model": loaded.folder.variant.model_id,
        "head": loaded.folder.head,
        "backend": loaded.backend.name,
        "precision": loaded.backend.precision,
    }

    def depth_of(task: Task) -> JSON:
        timings = Timings(dict(loading.ms))
        prediction = estimator.estimate(
            _read(task.source),
            timings,
            focal_length_px=args.focal_length_px,
            model_size=args.model_size,
        )
        with timings.stage("encode"):
            written = write_outputs(prediction, wanted, task.target)
        return {"image": str(task.source), **model, **facts(prediction, timings), **written}

    if len(tasks) == 1:
        print(_with_rows_on_a_line(json.dumps(depth_of(tasks[0]), indent=2)))
        return 0
    failed = 0
    for task in tqdm(tasks, unit="image", disable=not sys.stderr.isatty()):
        try:
            told = depth_of(task)
        except DA3Error as error:
            told = {"image": str(task.source), "error": str(error)}
            failed += 1
        tqdm.write(json.dumps(told), file=sys.stdout)
    if failed:
        print(f"{failed} of {len(tasks)} images failed.", file=sys.stderr)
    return 1 if failed else 0


def _tasks(images: list[Path], out: Path) -> list[Task]:
    """What to do; ``out`` names one image's picture, or a folder."""
    if out.suffix.lower() not in SUFFIXES or out.is_dir():
        return find_tasks(images, out)
    if out.suffix.lower() != ".png":
        raise SettingError(f"--out {out}: the picture is a PNG; give a name that ends in .png.")
    tasks = find_tasks(images, out.parent)
    if len(tasks) > 1:
        raise SettingError(f"--out {out}: {len(tasks)} images need a folder.")
    return [Task(tasks[0].source, out.with_suffix(""))]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or 'cannot be read'}.") from None


def _with_rows_on_a_line(text: str) -> str:
    """Indented JSON with every innermost list of numbers on one line."""
    return re.sub(r"\[[-+.\d\se,]+\]", lambda row: " ".join(row[0].split()), text)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run its verb."""
    args = parser().parse_args(argv)
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    return run_verb(run_depth, args)


if __name__ == "__main__":
    sys.exit(main())
