"""``da3-runtime batch``: depth of very many photos, on one machine or a Ray cluster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from da3_runtime.commands.depth import add_output_options, check_positive, find_wanted, log_to_stderr
from da3_runtime.commands.options import RUN_OPTIONS, Verbs, add_options, settings_of
from da3_runtime.errors import SettingError
from da3_runtime.util.extras import missing_package

if TYPE_CHECKING:
    from da3_runtime.batch.pieces import Row


def add_parser(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "batch",
        help="compute depth of very many photos, on this machine or a Ray cluster",
        description="Decoding, the network and encoding run in processes of Ray Data, one model for "
        "each GPU. The same command goes on where a killed run stopped. Failed photos are listed "
        "in the manifest with the reason. SOURCE and DESTINATION are local, or s3:// or gs:// "
        "addresses; SOURCE may be hf:// too.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder of photos; WebDataset tars, such as photos/{00000..00099}.tar or photos/*.tar; "
        "or tables, .parquet or .jsonl, with a column of URLs, paths or bytes",
    )
    parser.add_argument("destination", metavar="DESTINATION", help="folder of the results")
    parser.add_argument(
        "--to",
        choices=("folder", "tar", "parquet"),
        help="write files, tars (one for each tar of the source and each output) or Parquet; default: "
        "folder for a folder, tar for tars, parquet for tables",
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="a Ray cluster, such as auto; default: this machine alone"
    )
    parser.add_argument(
        "--column", default="url", help="column of a table with URLs, paths or bytes; default url"
    )
    parser.add_argument(
        "--id-column", metavar="COLUMN", help="column with each photo's id; default: FILE:ROW"
    )
    add_output_options(parser, "depth_png16,camera")
    parser.add_argument(
        "--focal-length-px", type=float, help="focal length in pixels of the photos, for depth in meters"
    )
    parser.add_argument("--model-size", action="store_true", help="write maps at the model's input size")
    add_options(parser, RUN_OPTIONS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the batch and print a summary on stderr; exit code 1 if a photo or a shard failed."""
    for module in ("pyarrow", "ray"):
        if missing := missing_package(module, "ray"):
            raise SettingError(f"{missing}.")
    from da3_runtime.batch.run import Batch, run_batch
    from da3_runtime.batch.sources import Columns, Kind, kind_of
    from da3_runtime.batch.stages import Job
    from da3_runtime.batch.storage import check_allowed, is_remote
    from da3_runtime.output.run_manifest import Request

    log_to_stderr(verbose=False)
    check_allowed(args.source)
    check_allowed(args.destination)
    kind = kind_of(args.source)
    is_table = kind in (Kind.PARQUET, Kind.JSON_LINES)
    # A table may name photos of strangers, for which the limits of serving are the defaults.
    settings = settings_of(args, own_files=not is_table)
    check_positive(args, "focal_length_px")
    photos = None
    if kind is Kind.FOLDER and not is_remote(args.source):
        photos = _photos(args.source, args.destination)
    request = Request(find_wanted(args), args.focal_length_px, args.model_size)
    report = run_batch(
        Batch(
            args.source,
            args.destination,
            args.to,
            args.ray,
            Columns(args.column, args.id_column),
            Job(settings, request),
        ),
        photos,
    )
    print(report.text(), file=sys.stderr)
    return 1 if report.has_failed else 0


def _photos(source: str, destination: str) -> list[Row]:
    """The photos of a local folder, with the names of results that the command depth gives them."""
    from da3_runtime.batch.pieces import Row
    from da3_runtime.batch.run import check_apart
    from da3_runtime.batch.storage import is_remote, normalized
    from da3_runtime.commands.depth_run import identity
    from da3_runtime.commands.depth_tasks import find_tasks

    check_apart(source, destination)
    folder = Path(normalized(source))
    # Names of results depend on no folder in a bucket.
    out = folder.with_name(f"{folder.name}-depth") if is_remote(destination) else Path(destination)
    return [
        Row(
            identity(task),
            task.stem,
            task.source.suffix.lower(),
            str(task.source.absolute()),
            name=task.source.name,
        )
        for task in find_tasks([folder], out).tasks
    ]
