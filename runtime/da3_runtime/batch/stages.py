"""The stages that a piece goes through, each in processes of its own: decode, network, encode.

Only the network's processes load the engine.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from da3_runtime.api.response import facts_of_depth, facts_of_engine
from da3_runtime.batch.destinations import Destination, Files, failed
from da3_runtime.batch.pieces import JSON, Done, Piece, Row, Work
from da3_runtime.batch.storage import is_remote, is_url, read_image
from da3_runtime.errors import DA3Error, DeviceLostError, InferenceError, SettingError
from da3_runtime.image.decode import decode_photo
from da3_runtime.image.fetch import ByteBudget, download
from da3_runtime.inference.batcher import Share
from da3_runtime.inference.estimator import Estimator, finish_photo, prepare_photo
from da3_runtime.output.encode import Output
from da3_runtime.output.files import described_outputs
from da3_runtime.output.run_manifest import Request, done_line
from da3_runtime.settings import Settings
from da3_runtime.variants import find_variant

_FROM_BUCKETS = 16  # photos that a process reads from a bucket at once


@dataclass(frozen=True)
class Job:
    """All settings of the runtime, and what is wanted of every photo."""

    settings: Settings
    request: Request


class Engine(NamedTuple):
    """What is known of a loaded engine: facts for every photo, and warnings."""

    facts: JSON
    warnings: list[str]


def load(settings: Settings) -> tuple[Estimator, Engine]:
    """Load the engine, and say which one it is; raises as :meth:`Estimator.load`."""
    # Ray gives OpenMP, on which PyTorch runs, one thread in a process that reserves less than a core.
    os.environ.pop("OMP_NUM_THREADS", None)
    estimator = Estimator.load(settings.engine, settings.images, settings.inference)
    loaded = estimator.loaded
    own = {"head": loaded.folder.head.value, "engine": loaded.digest()}
    return estimator, Engine(facts_of_engine(loaded) | own, list(loaded.warnings))


class Decode:
    """Gets the encoded photos of a piece, decodes them, and resizes them to the network's input."""

    def __init__(self, job: Job) -> None:
        self._settings = job.settings
        self._variant = find_variant(job.settings.engine.model_id)

    def __call__(self, row: Mapping[str, bytes]) -> dict[str, bytes]:
        piece = Piece.unpacked(row)
        is_far = [isinstance(each.image, str) and is_remote(each.image) for each in piece.rows]
        if any(is_far):
            most = max(self._settings.downloads.max_downloads, _FROM_BUCKETS)
            with ThreadPoolExecutor(most) as threads:
                rows = list(threads.map(self._fetched, piece.rows))
        else:
            rows = list(piece.rows)
        return piece._replace(rows=[self._decoded(each) for each in rows]).packed()

    def _fetched(self, row: Row) -> Row:
        """The row with the encoded photo, or with the reason why it cannot be got."""
        if row.error or isinstance(row.image, bytes):
            return row
        try:
            limits, downloads = self._settings.images, self._settings.downloads
            if is_url(row.image):
                budget = ByteBudget(limits.max_image_bytes)
                return row._replace(
                    image=asyncio.run(
                        download(
                            row.image, budget, downloads.download_seconds, downloads.image_url_hosts
                        )
                    )
                )
            image = read_image(row.image, limits.max_image_bytes, row.photo.size)
            return row._replace(image=image)
        except DA3Error as error:
            return row._replace(image=b"", error=str(error))

    def _decoded(self, row: Row) -> Work:
        row = self._fetched(row)
        bare = row._replace(image=b"")
        if row.error:
            return Work(bare, error=row.error)
        assert isinstance(row.image, bytes)
        limits = self._settings.images
        try:
            photo = decode_photo(
                row.image, max_bytes=limits.max_image_bytes, max_pixels=limits.max_image_pixels
            )
            prepared = prepare_photo(photo, self._variant, self._settings.inference.processing_res)
        except DA3Error as error:
            return Work(bare, error=str(error))
        return Work(bare, prepared)


class Network:
    """Runs the network on the photos of a piece, in batches of one size.

    Parameters
    ----------
    engine : Engine
        The engine that all processes must have.
    """

    def __init__(self, job: Job, engine: Engine) -> None:
        self._job = job
        self._engine = engine
        self._estimator: Estimator | None = None

    def __call__(self, row: Mapping[str, bytes]) -> dict[str, bytes]:
        """The piece with the network's outputs.

        Raises
        ------
        DA3Error
            If the engine cannot be loaded, or is another one than the first process has.
        """
        piece = Piece.unpacked(row)
        good = [index for index, work in enumerate(piece.rows) if not work.error]
        if not good:
            return piece.packed()
        estimator = self._loaded()
        begun, rows = time.time(), list(piece.rows)
        images = [rows[index].prepared.images for index in good]
        try:
            outcomes: list[Share | InferenceError] = [*estimator.run_all(images)]
        except DeviceLostError:
            os._exit(1)  # only a new process can use the GPU; Ray starts one, and repeats the piece
        except InferenceError:
            outcomes = [_alone(estimator, image) for image in images]
        for index, outcome in zip(good, outcomes, strict=True):
            if isinstance(outcome, Share):
                rows[index] = rows[index]._replace(share=outcome)
            else:
                rows[index] = rows[index]._replace(error=str(outcome))
        return piece._replace(rows=rows, begun=begun).packed()

    def _loaded(self) -> Estimator:
        if self._estimator is None:
            estimator, engine = load(self._job.settings)
            if engine.facts["engine"] != self._engine.facts["engine"]:
                raise SettingError(
                    f"Nodes would run different engines: {engine.facts['backend']} and "
                    f"{self._engine.facts['backend']}, or other files. Choose one with --backend, and "
                    "copy one ENGINE_DIR to all nodes."
                )
            self._estimator = estimator
        return self._estimator


def _alone(estimator: Estimator, image: Any) -> Share | InferenceError:
    """The outputs of one photo, or the error, so that only the photo that causes it fails."""
    try:
        (share,) = estimator.run_all([image])
    except DeviceLostError:
        os._exit(1)
    except InferenceError as error:
        return error
    return share


class Encode:
    """Turns the network's outputs into files, and writes them."""

    def __init__(self, job: Job, engine: Engine, destination: Destination) -> None:
        self._job = job
        self._engine = engine
        self._destination = destination
        self._variant = find_variant(job.settings.engine.model_id)

    def __call__(self, row: Mapping[str, bytes]) -> dict[str, bytes]:
        """A piece whose only row is its :class:`Done`; raises as :meth:`Destination.write`."""
        piece = Piece.unpacked(row)
        done = Done(begun=piece.begun)
        if piece.rows:
            made = self._destination.write(piece, [self._made(work) for work in piece.rows], done)
            for each in made:
                warnings = each.line.get("warnings")
                told = warnings if isinstance(warnings, list) else []
                done.count(each.row.ending, each.error, told)
        return piece._replace(rows=[done] if piece.rows else []).packed()

    def _made(self, work: Work) -> Files:
        row, request = work.row, self._job.request
        if work.error:
            return failed(row, work.error)
        assert work.share is not None and work.prepared is not None
        files: dict[Output, bytes | None] = {}
        try:
            prediction = finish_photo(
                work.share,
                work.prepared,
                self._variant,
                self._engine.warnings,
                focal_length_px=request.focal_length_px,
                model_size=request.model_size,
                maps=request.wanted.maps,
            )
            facts, warnings = facts_of_depth(prediction), list(prediction.warnings)
            name = row.name or PurePosixPath(row.stem).name + row.ending
            for each in described_outputs([prediction], request.wanted, [name]):
                warnings += each.warnings
                facts |= each.facts
                if each.output.row.ending:
                    files[each.output] = each.file
        except DA3Error as error:
            return failed(row, str(error))
        line = done_line(row.photo, {}, facts | self._engine.facts, warnings)
        return Files(row, files, line)
