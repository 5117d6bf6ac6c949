"""A whole batch: find the source, compare with earlier runs, run what is left, keep what was done."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from da3_runtime.batch import pipeline
from da3_runtime.batch.destinations import DESTINATIONS, Destination
from da3_runtime.batch.pieces import JSON, Done, Row
from da3_runtime.batch.records import BucketManifest, done_photos, records_of
from da3_runtime.batch.report import Report
from da3_runtime.batch.sources import (
    Columns,
    Kind,
    Shard,
    find_shards,
    folder_shards,
    in_utf8,
    kind_of,
    remote_photos,
)
from da3_runtime.batch.stages import Job
from da3_runtime.batch.storage import Place, is_remote, normalized
from da3_runtime.errors import SettingError
from da3_runtime.output.run_manifest import RUN_NAME, RunManifest, made_with
from da3_runtime.util.progress import progress

# What results are written as, unless the command says it.
_DEFAULTS = {
    Kind.FOLDER: "folder",
    Kind.TAR: "tar",
    Kind.PARQUET: "parquet",
    Kind.JSON_LINES: "parquet",
}


@dataclass(frozen=True)
class Batch:
    """A batch that was asked for.

    Attributes
    ----------
    source, destination : str
        Paths or addresses.
    to : str | None
        A key of :data:`DESTINATIONS`; None for the one that fits the source.
    ray : str | None
        Address of a cluster; None for this machine.
    columns : Columns
        Of a table.
    job : Job
        What is wanted of every photo.
    """

    source: str
    destination: str
    to: str | None
    ray: str | None
    columns: Columns
    job: Job

    @property
    def form(self) -> str:
        """What results are written as."""
        return self.to or _DEFAULTS[kind_of(self.source)]

    def made_with(self, photos: Sequence[Row]) -> JSON:
        """What the results depend on, beside the engine, as JSON.

        Parameters
        ----------
        photos : Sequence[Row]
            The photos of a folder. Shards of a folder are parts of its listing, so they depend on it.
        """
        source = self.source if is_remote(self.source) else normalized(self.source)
        settings = made_with(self.job.settings, self.job.request)
        known = {**settings, "to": self.form, "source": source}
        if kind_of(self.source) in (Kind.PARQUET, Kind.JSON_LINES):
            known |= {"column": self.columns.image, "id_column": self.columns.id}
        if photos and self.form != "folder":
            listing = "\n".join(row.photo.id for row in photos).encode()
            known |= {"listing": f"{len(photos)} photos, {hashlib.sha256(listing).hexdigest()[:16]}"}
        return known


def run_batch(batch: Batch, photos: Sequence[Row] | None = None) -> Report:
    """Run a batch, without what earlier runs have done.

    Parameters
    ----------
    photos : Sequence[Row] | None
        The photos of a local folder.

    Raises
    ------
    DA3Error
        If the source or the destination cannot be used, the engine cannot be loaded, the destination has
        results of other settings, another run writes to it, or no further photo can be done.
    """
    report = Report()
    kind = kind_of(batch.source)
    place = Place(normalized(batch.destination))
    destination = DESTINATIONS[batch.form](place, batch.job.request.wanted)
    if not destination.outputs and batch.form == "tar":
        raise SettingError("--outputs: tars need at least one output with a file, such as depth_png16.")
    if kind is Kind.FOLDER:
        check_apart(batch.source, batch.destination)
        rows = list(remote_photos(normalized(batch.source), place.address) if photos is None else photos)
        if batch.form != "folder":
            rows = [in_utf8(row) for row in rows]
        shards = folder_shards(batch.source, rows)
    else:
        most = batch.job.settings.images.max_image_bytes
        found = find_shards(batch.source, batch.columns)
        rows, shards = [], [shard._replace(max_bytes=most) for shard in found]
        _check_no_overwrite(shards, destination)
    job = _with_absolute_engine(batch.job)
    with records_of(place) as records:
        made_with = batch.made_with(rows)
        records.compare(made_with)
        _check_own(destination)
        known: frozenset[str] = frozenset()
        if batch.form == "folder" and rows:
            left = [row for row in rows if not records.has(row.photo)]
            report.before = len(rows) - len(left)
            shards = folder_shards(batch.source, left)
        elif batch.form == "folder":
            known = frozenset(done_photos(place))
            shards = [_below_its_name(shard) for shard in shards]
            report.before = len(known)
        else:
            shards = _left(shards, destination, report)
        if not shards:
            destination.clean()
            return report
        _run(batch, job, shards, known, destination, records, made_with, report)
    return report


def _run(
    batch: Batch,
    job: Job,
    shards: Sequence[Shard],
    known: frozenset[str],
    destination: Destination,
    records: RunManifest | BucketManifest,
    made_with: JSON,
    report: Report,
) -> None:
    begun = time.time()
    cluster = pipeline.start(batch.ray)
    try:
        engine = pipeline.probe(job, cluster)
        records.keep(made_with | {name: engine.facts[name] for name in ("engine", "precision")})
        total = sum(len(shard.rows) for shard in shards) or None
        with progress(total, "photo") as advance:

            def on_piece(piece: Done) -> None:
                for line in piece.lines:
                    records.add(line)
                if piece.begun and not report.start_seconds:
                    report.start_seconds = max(piece.begun - begun, 0.0)
                report.tally.add(piece)
                advance(piece.photos.total())

            pipeline.run(shards, known, job, engine, destination, cluster, on_piece, report)
        destination.clean()
    finally:
        pipeline.stop()


def _left(shards: Sequence[Shard], destination: Destination, report: Report) -> list[Shard]:
    """The shards that are not complete, each with the pieces that are done."""
    finished, pieces = destination.finished(), destination.pieces()
    left = [
        shard._replace(skip=frozenset(pieces.get(shard.name, ())))
        for shard in shards
        if shard.name not in finished
    ]
    for name in finished & pieces.keys():  # of a run that was killed before it removed them
        destination.finish(name, 0)
    report.shards_before = len(shards) - len(left)
    return left


def _check_own(destination: Destination) -> None:
    """Refuse files of others, which would count as results."""
    place = destination.place
    if RUN_NAME not in place.direct_names() and (destination.finished() or destination.pieces()):
        raise SettingError(
            f"{place.address} has files that no run of this command wrote: choose another folder."
        )


def _below_its_name(shard: Shard) -> Shard:
    """A shard whose results go to a folder of its name."""
    return shard._replace(prefix=f"{shard.name}/")


def _with_absolute_engine(job: Job) -> Job:
    """The job with the absolute path of the engines, as Ray's processes may have another folder."""
    folder: Path = job.settings.engine.engine_dir
    return dataclasses.replace(job, settings=job.settings.changed(engine_dir=folder.absolute()))


def check_apart(source: str, destination: str) -> None:
    """Raise :class:`SettingError` if the source is the destination."""
    if normalized(source) == normalized(destination):
        raise SettingError(
            f"{destination} is the folder of the photos: results need another folder, such as "
            f"{destination.rstrip('/')}-depth."
        )


def _check_no_overwrite(shards: Sequence[Shard], destination: Destination) -> None:
    sources = {shard.address for shard in shards}
    for shard in shards:
        for name in destination.final_files(shard.name):
            if destination.place.at(name) in sources:
                raise SettingError(
                    f"{destination.place.at(name)} is a file of the source: results need another folder."
                )
