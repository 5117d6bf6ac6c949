"""Runs the images of ``da3-runtime depth`` through the stages, and keeps what was done.

Decoding, the network and encoding overlap, in the same stages and batches as serving.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from da3_runtime.api.response import facts_of
from da3_runtime.commands.depth import write_outputs
from da3_runtime.commands.depth_tasks import Shard, Task, find_tasks
from da3_runtime.errors import DA3Error, DeviceLostError, ImageError, SettingError
from da3_runtime.inference.estimator import Estimator, Prepared, Timings
from da3_runtime.inference.stages import PhotoStages
from da3_runtime.network_io import MAX_BATCH
from da3_runtime.output.encode import Output
from da3_runtime.output.run_manifest import (
    Identity,
    Request,
    RunManifest,
    done_line,
    failed_line,
    made_with,
)
from da3_runtime.settings import Settings
from da3_runtime.util.parallel import in_order, usable_cores
from da3_runtime.util.progress import progress
from da3_runtime.util.tally import Tally, counted

JSON = dict[str, object]

# Results that may wait for that of an earlier image, for each thread.
_AHEAD = 8


def depth_of_files(
    settings: Settings,
    images: Sequence[Path],
    out: Path,
    request: Request,
    *,
    pretty: bool = False,
    overwrite: bool = False,
    shard: Shard | None = None,
) -> int:
    """Write the wanted outputs of every image and print a JSON summary of each, with the API's names.

    Unless a single image was named, the folder also gets a line of ``manifest.jsonl`` for each image.
    The next run does the images that are new, changed, failed or without their files.

    Parameters
    ----------
    settings : Settings
        All settings of the runtime.
    images : Sequence[Path]
        Image files, and folders that are searched for images.
    out : Path
        A folder, or the preview (``.png``) of one image.
    pretty : bool
        Print each summary as an indented block instead of one line.
    overwrite : bool
        Do images again that are done.
    shard : Shard | None
        The part of the images to do; None for all.

    Returns
    -------
    int
        1 if an image failed, else 0.

    Raises
    ------
    DA3Error
        If the model cannot be loaded, a path is invalid, the folder has results of other settings, a
        file cannot be written, the GPU is lost, or an image that was named alone fails.
    """
    endings = [output.row.ending for output in request.wanted.outputs if output.row.ending]
    found = find_tasks(images, out, endings)
    tasks = found.tasks if shard is None else [task for task in found.tasks if shard.has(task.name)]
    total, tally, start = len(tasks), Tally(), time.monotonic()
    error: DA3Error | None = None
    with ExitStack() as stack:
        manifest = None
        if found.folder is not None:
            manifest = stack.enter_context(RunManifest(found.folder, shard.part if shard else ""))
            known = made_with(settings, request)
            manifest.compare(known)
            if not overwrite:
                tasks = [task for task in tasks if not manifest.has(identity(task))]
        if tasks:
            loading = Timings()
            with loading.stage("load"):
                estimator = Estimator.load(settings.engine, settings.images, settings.inference)
            stack.callback(estimator.close)
            loaded, engine = estimator.loaded, dict[str, str]()
            if manifest is not None:
                engine = {"head": loaded.folder.head.value, "engine": loaded.digest()}
                manifest.keep(known | engine | {"precision": loaded.backend.precision})
            most = settings.inference.max_batch or MAX_BATCH
            advance = stack.enter_context(progress(len(tasks), "image", is_shown=len(tasks) > 1))
            for task, result in run_tasks(estimator, tasks, request, manifest, loading, most, engine):
                if manifest is not None:
                    manifest.add(result.line)
                error = error or result.error
                tally.count(task.source.suffix.lower(), result.reason, result.warnings)
                with tqdm.external_write_mode():
                    print(_as_json({"image": str(task.source), **result.summary}, pretty), flush=True)
                advance(1)
    if found.skipped:
        print(f"Skipped in the folders: {found.skipped}.", file=sys.stderr)
    if error and found.folder is None:
        raise error
    if found.folder is not None:
        print(_summary(total, tally, time.monotonic() - start), file=sys.stderr)
    return 1 if error else 0


def identity(task: Task) -> Identity:
    """The id of an image and the state of its file; only the id if it cannot be read."""
    try:
        stat = task.source.stat()
    except OSError:
        return Identity(task.name)
    return Identity(task.name, stat.st_size, stat.st_mtime)


@dataclass(frozen=True)
class Result:
    """What became of an image.

    Attributes
    ----------
    summary : JSON
        Paths of its files, and the fields of the API's response; or ``error``.
    line : JSON
        Its line of the manifest.
    warnings : Sequence[str]
        Sentences about it.
    error : DA3Error | None
        Why it failed.
    reason : str
        The same without the path of the image; empty if it did not fail.
    """

    summary: JSON
    line: JSON
    warnings: Sequence[str] = ()
    error: DA3Error | None = None
    reason: str = ""


def run_tasks(
    estimator: Estimator,
    tasks: Sequence[Task],
    request: Request,
    manifest: RunManifest | None = None,
    loading: Timings | None = None,
    most: int = MAX_BATCH,
    engine: Mapping[str, str] | None = None,
    one_at_a_time: bool = False,
) -> Iterator[tuple[Task, Result]]:
    """Write the files of every image; the results come in the order of the tasks.

    Parameters
    ----------
    manifest : RunManifest | None
        Of the folder of the results. It is not written, only its folder for incomplete files is used.
    loading : Timings | None
        What was done before; each result's timings start with it.
    most : int
        Most images of a batch.
    engine : Mapping[str, str] | None
        Facts of the engine for the lines of the manifest.
    one_at_a_time : bool
        Run each image alone, for comparison.

    Raises
    ------
    DeviceLostError, SettingError
        If no further image can be done. Errors of one image are in its result.
    """
    cores = usable_cores()
    stages = PhotoStages(cores)
    scratch = manifest.scratch if manifest else None
    # One batch runs while the next comes together; other threads decode and encode.
    threads = 1 if one_at_a_time else 2 * most + 2 * cores

    def run(task: Task) -> tuple[Task, Result]:
        photo = identity(task)
        timings = Timings(dict(loading.ms) if loading else {})
        try:
            with stages.run(estimator, partial(_prepare, estimator, task, timings), timings) as ran:
                prediction = estimator.finish(
                    *ran,
                    timings,
                    focal_length_px=request.focal_length_px,
                    model_size=request.model_size,
                    maps=request.wanted.maps,
                )
                with timings.stage("encode"):
                    written, more = write_outputs(
                        [prediction], request.wanted, task.target, [task.source.name], scratch
                    )
        except (DeviceLostError, SettingError):
            raise
        except DA3Error as error:
            reason = str(error).removeprefix(f"{task.source}: ")
            return task, Result({"error": str(error)}, failed_line(photo, reason), (), error, reason)
        facts = {**facts_of(prediction, estimator.loaded), **written}
        warnings = [*prediction.warnings, *more]
        summary = {**facts, "timings_ms": timings.ms, "warnings": warnings}
        return task, Result(summary, _line(photo, task, {**facts, **(engine or {})}, warnings), warnings)

    return in_order(run, tasks, threads, _AHEAD * threads)


def _prepare(estimator: Estimator, task: Task, timings: Timings) -> Prepared:
    try:
        data = task.source.read_bytes()
    except OSError as error:
        raise ImageError(f"{task.source}: {error.strerror or 'cannot be read'}.") from None
    return estimator.prepare(data, timings, None)


def _line(photo: Identity, task: Task, facts: JSON, warnings: Sequence[str]) -> JSON:
    files = {output.value for output in Output if output.row.ending}
    outputs = {
        name: None if path is None else Path(str(path)).relative_to(task.out).as_posix()
        for name, path in facts.items()
        if name in files
    }
    known = {name: value for name, value in facts.items() if name not in files}
    return done_line(photo, outputs, known, warnings)


def _summary(total: int, tally: Tally, seconds: float) -> str:
    """What became of all images of a run, with those that an earlier one has done, for a person."""
    run, failed = tally.photos.total(), tally.failed.total()
    parts = [f"{run - failed} done"]
    parts += [f"{total - run} done by earlier runs"] if run < total else []
    parts += [f"{failed} failed"] if failed else []
    first = f"{counted(total, 'image')}{tally.speed(seconds)}: " + ", ".join(parts) + "."
    return "\n".join([first, *tally.described()])


def _as_json(summary: JSON, pretty: bool) -> str:
    """A summary as one line, or indented with the rows of matrices on one line each."""
    if not pretty:
        return json.dumps(summary)
    text = json.dumps(summary, indent=2)
    return re.sub(r"\[[-+.\d\se,]+\]", lambda row: " ".join(row[0].split()), text)
