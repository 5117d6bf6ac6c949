"""What a destination keeps of its runs: settings in ``run.json``, and lines in ``manifest*.jsonl``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from da3_runtime.batch.pieces import JSON
from da3_runtime.batch.storage import Place, explained, open_file
from da3_runtime.errors import SettingError
from da3_runtime.output.run_manifest import RUN_NAME, Identity, RunManifest, compare_settings

_LINES = 5000  # of one file in a bucket, where no file can grow


class BucketManifest:
    """As :class:`RunManifest`, but in a bucket, without a lock: lines go to new files.

    Parameters
    ----------
    place : Place
        The folder of the results.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._lines: list[str] = []
        self._start, self._files = time.time_ns(), 0
        self._done = done_photos(place)

    def compare(self, settings: Mapping[str, object]) -> None:
        """Compare settings with those of earlier runs, as :meth:`RunManifest.compare` does."""
        compare_settings(self._place.address, self._kept(), settings)

    def keep(self, settings: Mapping[str, object]) -> None:
        """Keep the settings of the first run; raises as :meth:`compare` if they differ."""
        if not self._kept():
            self._place.write(RUN_NAME, json.dumps(settings, indent=1).encode() + b"\n")
        self.compare(settings)

    def has(self, photo: Identity) -> bool:
        """Whether a photo of this size is done."""
        return photo.id in self._done and self._done[photo.id] == photo.size

    def add(self, record: Mapping[str, object]) -> None:
        """Write a photo's line, at once with some others."""
        self._lines.append(json.dumps(record))
        if len(self._lines) >= _LINES:
            self.flush()

    def flush(self) -> None:
        """Write the lines that are not written yet, into a new file."""
        if self._lines:
            name = f"manifest.{self._start}-{self._files:05d}.jsonl"
            self._place.write(name, "".join(f"{line}\n" for line in self._lines).encode())
            self._lines, self._files = [], self._files + 1

    def _kept(self) -> JSON:
        if not self._place.names(RUN_NAME):
            return {}
        try:
            kept: JSON = dict(json.loads(self._place.read(RUN_NAME)))
        except (ValueError, TypeError):
            raise SettingError(
                f"{self._place.at(RUN_NAME)} cannot be read: choose another folder."
            ) from None
        return kept


@contextmanager
def records_of(place: Place) -> Iterator[RunManifest | BucketManifest]:
    """The records of a destination; on a disk they are locked against other runs.

    Raises
    ------
    SettingError
        If another run writes to the folder, or it cannot be written.
    """
    if place.path is not None:
        with RunManifest(place.path) as manifest:
            yield manifest
        return
    bucket = BucketManifest(place)
    try:
        yield bucket
    finally:
        bucket.flush()


def done_photos(place: Place) -> dict[str, int | None]:
    """Sizes of the photos that are done in a destination of files, by id, from all its manifests."""
    done: dict[str, int | None] = {}
    names = [name for name in place.direct_names() if name.startswith("manifest")]
    for name in sorted(name for name in names if name.endswith(".jsonl")):
        with explained(place.at(name)), open_file(place.at(name)) as stream:
            for line in stream:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue  # the last line of a killed run
                if "error" in record:
                    done.pop(record["id"], None)
                else:
                    done[record["id"]] = record.get("size")
    return done
