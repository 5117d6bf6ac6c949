"""Command line of the runtime: ``python -m runtime VERB``."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.cli import RUN_OPTIONS, add_engine_options, run_verb, settings_of
from runtime.errors import ImageError, SettingError

if TYPE_CHECKING:
    from runtime.camera import Camera


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="python -m runtime", description="Run depth engines.")
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    depth = verbs.add_parser("depth", help="depth picture and JSON summary of one photo")
    depth.add_argument("--image", required=True, type=Path, help="photo to read")
    depth.add_argument("--out", default=Path("depth.png"), type=Path, help="picture to write (.png)")
    depth.add_argument("--verbose", action="store_true", help="log why backends were passed over")
    add_engine_options(depth, RUN_OPTIONS)
    return root


def run_depth(args: argparse.Namespace) -> int:
    """``depth``: write the picture, print the summary."""
    settings = settings_of(args)
    try:
        data = args.image.read_bytes()
    except OSError as error:
        raise ImageError(f"--image {args.image}: {error.strerror or 'cannot be read'}.") from None
    if args.out.suffix.lower() != ".png":
        raise SettingError(f"--out {args.out}: the picture is a PNG; give a name that ends in .png.")

    from runtime.files import write_atomically
    from runtime.pipeline import Estimator, Timings
    from runtime.render import encode_png, inverse_depth_picture

    timings = Timings()
    with timings.stage("load"):
        estimator = Estimator.load(settings)
    estimate = estimator.estimate(data, timings)
    with timings.stage("encode"):
        png = encode_png(inverse_depth_picture(estimate.depth.values))
    try:
        write_atomically(args.out, png)
    except OSError as error:
        raise SettingError(f"--out {args.out}: {error.strerror or 'cannot be written'}.") from None

    loaded = estimator.loaded
    summary = {
        "model": loaded.folder.variant.model_id,
        "head": loaded.folder.head,
        "backend": loaded.backend.name,
        "precision": loaded.backend.precision,
        "width": estimate.depth.values.shape[1],
        "height": estimate.depth.values.shape[0],
        "min": float(estimate.depth.values.min()),
        "max": float(estimate.depth.values.max()),
        "unit": estimate.depth.unit,
        "focal_source": estimate.focal_source,
        "camera": _camera(estimate.camera),
        "picture": str(args.out),
        "timings_ms": timings.ms,
        "warnings": estimate.warnings,
    }
    print(_with_rows_on_a_line(json.dumps(summary, indent=2)))
    return 0


def _camera(camera: Camera | None) -> dict[str, list[list[float]]] | None:
    if camera is None:
        return None
    fields = camera._asdict().items()
    return {name: matrix.astype(float).round(6).tolist() for name, matrix in fields}


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
