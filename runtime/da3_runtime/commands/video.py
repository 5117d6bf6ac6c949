"""``da3-runtime video``: a video -> its depth as videos, its camera trajectory, and points."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from da3_runtime.commands.depth import add_output_options, check_positive, find_wanted, log_to_stderr
from da3_runtime.commands.options import RUN_OPTIONS, Verbs, add_options, settings_of
from da3_runtime.errors import DA3Error, SettingError

if TYPE_CHECKING:
    from da3_runtime.settings import Settings

# Fields of a request that are options of the command, as they stand in messages: the first ones at the
# start of a message only, as they are words of other sentences too.
_FIELDS = re.compile(r"^(window|overlap|outputs|loop)\b|\b(processing_res|points_[a-z]+)\b")


def add_parser(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "video",
        help="compute the depth of a video, and its camera trajectory",
        description="Writes preview.mp4, depth.mkv (16 bits, lossless), frames.jsonl and film.json to "
        "the folder OUT; with a model that sees several frames at once also track.txt and joins.jsonl. "
        "Prints the content of film.json as one JSON line. A run that was stopped goes on when the same "
        "command runs again.",
    )
    parser.add_argument("film", type=Path, metavar="VIDEO", help="the video")
    parser.add_argument("--out", required=True, type=Path, help="folder of the results")
    frames = parser.add_argument_group(
        "frames", "which frames are used, and how many the model sees at once"
    )
    which = frames.add_mutually_exclusive_group()
    which.add_argument("--fps", type=float, metavar="R", help="at most R frames per second; default all")
    which.add_argument("--every", type=int, default=1, metavar="N", help="every N-th frame; default 1")
    frames.add_argument(
        "--window",
        type=int,
        default=8,
        metavar="N",
        help="frames that the model sees at once; 1 for each frame alone; default 8. Models that see "
        "each photo alone ignore it",
    )
    frames.add_argument(
        "--overlap",
        type=int,
        metavar="N",
        help="frames that a window shares with the next one; default 3, or half of a smaller window",
    )
    frames.add_argument(
        "--loop",
        action="store_true",
        help="the video ends where it began: measure the drift between its ends",
    )
    # An output without a file: by default frames have none of their own.
    add_output_options(parser, "camera")
    parser.add_argument(
        "--focal-length-px", type=float, help="focal length in pixels of the upright video, if known"
    )
    parser.add_argument(
        "--model-size", action="store_true", help="write videos and maps at the model's input size"
    )
    parser.add_argument("--verbose", action="store_true", help="log why backends were skipped")
    add_options(parser, RUN_OPTIONS)
    parser.set_defaults(run=run)


def model_facts(settings: Settings) -> dict[str, object]:
    """The settings that decide what the model returns."""
    names = ("model_id", "head", "ray_pose", "weights", "sdt_weights", "revision", "backend")
    facts = {name: getattr(settings.engine, name) for name in names}
    return {**facts, "processing_res": settings.inference.processing_res}


@contextmanager
def _naming_options() -> Iterator[None]:
    """Name options, not fields of a request, in the message of an error in the body."""
    try:
        yield
    except DA3Error as error:
        text = _FIELDS.sub(lambda name: "--" + name[0].replace("_", "-"), str(error))
        raise (error if text == str(error) else type(error)(text)) from None


@_naming_options()
def run(args: argparse.Namespace) -> int:
    """Write the files and print the summary; exit code 0."""
    import av  # noqa: F401  the extra is missed at once
    from tqdm import tqdm

    from da3_runtime.image.film import FilmLimits, Pick
    from da3_runtime.inference.estimator import Estimator, Timings
    from da3_runtime.inference.film import FilmRun, run_film
    from da3_runtime.inference.windows import WindowOptions, default_overlap
    from da3_runtime.variants import find_variant

    log_to_stderr(args.verbose)
    settings = settings_of(args, own_files=True)
    check_positive(args, "fps", "focal_length_px")
    if args.every < 1:
        raise SettingError(f"--every must be 1 or more, not {args.every}.")
    overlap = default_overlap(args.window) if args.overlap is None else args.overlap
    options = WindowOptions(
        Pick(args.every, args.fps), args.window, overlap, args.focal_length_px, args.loop
    )
    task = FilmRun(
        args.film,
        args.out,
        options,
        find_wanted(args),
        args.model_size,
        FilmLimits(settings.images.max_image_pixels),
        model_facts(settings),
        find_variant(settings.engine.model_id),
    )
    timings = Timings()
    with tqdm(unit="frame", disable=not sys.stderr.isatty()) as bar:

        def progress(stage: str, done: int, total: int | None) -> None:
            bar.set_description(stage, refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        summary = run_film(
            task,
            lambda: Estimator.load(settings.engine, settings.images, settings.inference),
            progress,
            timings,
        )
    print(json.dumps({**summary, "timings_ms": timings.ms}))
    return 0
