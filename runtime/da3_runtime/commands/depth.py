"""``da3-runtime depth``: photos and folders of photos -> depth files."""

from __future__ import annotations

import argparse
import errno
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from da3_runtime.commands.options import RUN_OPTIONS, Verbs, add_options, settings_of
from da3_runtime.errors import OutputError, SettingError
from da3_runtime.util.files import write_atomically

if TYPE_CHECKING:
    from da3_runtime.output.encode import Output, Wanted
    from da3_runtime.postprocess.depth import Prediction

JSON = dict[str, object]


def add_parser(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "depth",
        help="compute depth of photos, as previews and as numbers",
        description="Prints one JSON line for each image: the paths of its files, and the fields of the "
        "API's response. Folders are searched recursively; links are followed, hidden files and the "
        "folder OUT are left out. OUT gets manifest.jsonl, a line for each image: the next run does "
        "images that are new, changed or failed. stderr has progress and a summary.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files and folders")
    parser.add_argument(
        "--out",
        default=Path("depth.png"),
        type=Path,
        help="folder, or the preview (.png) of one image; default depth.png. "
        "Several images need a folder",
    )
    add_output_options(parser, "preview,camera")
    parser.add_argument(
        "--focal-length-px", type=float, help="focal length in pixels of the images, for depth in meters"
    )
    parser.add_argument("--model-size", action="store_true", help="write maps at the model's input size")
    parser.add_argument(
        "--overwrite", action="store_true", help="do images again that an earlier run has done"
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="do only part I of N, from 1/N to N/N; other machines do the other parts",
    )
    parser.add_argument(
        "--pretty", action="store_true", help="print an indented block for each image, not a JSON line"
    )
    parser.add_argument("--verbose", action="store_true", help="log why backends were skipped")
    add_options(parser, RUN_OPTIONS)
    parser.set_defaults(run=run)


def add_output_options(parser: argparse.ArgumentParser, outputs: str) -> None:
    """Add the options that :func:`find_wanted` takes; ``outputs`` is the default."""
    parser.add_argument(
        "--outputs",
        default=outputs,
        # The names are in output/encode.py, whose import would slow --help down.
        help=f"outputs, separated by commas; default {outputs}. An unknown name lists them all",
    )
    parser.add_argument(
        "--color-map", default="inferno", help="color map of the output color; default inferno"
    )
    parser.add_argument(
        "--depth-unit",
        choices=("auto", "mm"),
        default="auto",
        help="unit of the steps of depth_png16: auto, or mm for millimeters; default auto",
    )
    points = parser.add_argument_group("points", "which pixels become points of glb, ply and colmap")
    points.add_argument(
        "--points-confidence",
        type=float,
        metavar="PERCENTILE",
        help="leave out pixels below this percentile of confidence; default 40",
    )
    points.add_argument(
        "--points-edge",
        type=float,
        metavar="SHARE",
        help="leave out pixels whose neighbours' depths differ by more than this share; 0 keeps all; "
        "default 0.1",
    )
    points.add_argument(
        "--points-max", type=int, metavar="N", help="largest number of points; default 1000000"
    )
    points.add_argument("--points-sky", action="store_true", help="keep pixels of the sky")
    points.add_argument("--no-points-cameras", action="store_true", help="leave the cameras out of glb")


def run(args: argparse.Namespace) -> int:
    """Write the files and print their summaries; exit code 1 if any of several images failed."""
    from da3_runtime.commands import depth_run
    from da3_runtime.commands.depth_tasks import Shard
    from da3_runtime.output.run_manifest import Request

    log_to_stderr(args.verbose)
    settings = settings_of(args, own_files=True)
    wanted = find_wanted(args)
    check_positive(args, "focal_length_px")
    request = Request(wanted, args.focal_length_px, args.model_size)
    return depth_run.depth_of_files(
        settings,
        args.images,
        args.out,
        request,
        pretty=args.pretty,
        overwrite=args.overwrite,
        shard=None if args.shard is None else Shard.of(args.shard),
    )


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise :class:`SettingError` if an option that was given is no number over 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise SettingError(f"--{name.replace('_', '-')} must be a number over 0, not {value}.")


def log_to_stderr(verbose: bool) -> None:
    """Log warnings, or with ``verbose`` why backends were skipped too."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def find_wanted(args: argparse.Namespace) -> Wanted:
    """What the options of :func:`add_output_options` ask for.

    Raises
    ------
    SettingError
        If an output or the color map is unknown, or a number is outside its range; the message lists the
        known ones, or the range.
    """
    from da3_runtime.output.encode import DepthUnit, Output, Wanted
    from da3_runtime.output.preview import COLOR_MAPS
    from da3_runtime.postprocess.points import PointOptions

    if args.color_map not in COLOR_MAPS:
        known = ", ".join(COLOR_MAPS)
        raise SettingError(f"--color-map {args.color_map!r} is not one of: {known}.")
    outputs, unit = _find_outputs(args.outputs), DepthUnit(args.depth_unit)
    if unit is not DepthUnit.AUTO and Output.DEPTH_PNG16 not in outputs:
        raise SettingError(f"--depth-unit {unit} is for depth_png16: add it to --outputs.")
    given = {
        "confidence": args.points_confidence,
        "sky": args.points_sky,
        "edge": args.points_edge,
        "most": args.points_max,
    }
    points = PointOptions(**{name: value for name, value in given.items() if value is not None})
    return Wanted(
        outputs,
        color_map=args.color_map,
        depth_unit=unit,
        points=points,
        cameras=not args.no_points_cameras,
    )


def _find_outputs(text: str) -> tuple[Output, ...]:
    from da3_runtime.output.encode import Output

    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    known = {output.value: output for output in Output}
    for name in names:
        if name not in known:
            raise SettingError(f"--outputs: {name!r} is not one of: {', '.join(Output)}.")
    if not names:
        raise SettingError(f"--outputs: name at least one of: {', '.join(Output)}.")
    return tuple(dict.fromkeys(known[name] for name in names))


def write_outputs(
    predictions: Sequence[Prediction],
    wanted: Wanted,
    target: Path,
    names: Sequence[str],
    scratch: Path | None = None,
) -> tuple[JSON, list[str]]:
    """Write the wanted outputs of one image, or those that the images of a scene have together.

    Parameters
    ----------
    target : Path
        Path of the outputs, without the ending that each output adds.
    names : Sequence[str]
        File name of each image.
    scratch : Path | None
        Folder of incomplete files; None for the folder of the results.

    Returns
    -------
    tuple[JSON, list[str]]
        Path of each file, and the facts needed to read it; and warnings. An output that the model lacks
        is None.

    Raises
    ------
    OutputError
        If an output cannot be made of the depth, or has a name that is too long.
    SettingError
        If the folder cannot be written.
    """
    from da3_runtime.output.files import described_outputs

    written: JSON = {}
    warnings: list[str] = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for each in described_outputs(predictions, wanted, names):
            warnings += each.warnings
            if ending := each.output.row.ending:
                written[each.output] = each.file and _write(target, ending, each.file, scratch)
            written |= each.facts
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise OutputError(
                f"{target.name}: a result's name, with its own ending, is longer than the disk accepts; "
                "rename the image."
            ) from None
        raise SettingError(f"{target.parent}: {error.strerror or 'cannot be written'}.") from None
    return written, warnings


def _write(target: Path, ending: str, data: bytes, scratch: Path | None) -> str:
    path = target.with_name(f"{target.name}{ending}")
    write_atomically(path, data, scratch)
    return str(path)
