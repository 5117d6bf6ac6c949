"""What a run over a folder has done: ``manifest.jsonl``, one line for each photo, and ``run.json``.

A line is written when a photo's files are complete, so a killed run can go on: what has no line is done
again. ``run.json`` has the model and the settings that all files of the folder were made with.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

from da3_runtime.errors import SettingError
from da3_runtime.util.files import replacing

JSON = dict[str, object]

RUN_NAME = "run.json"


class Identity(NamedTuple):
    """Which photo a line is about, and the state of its file: another state means a changed photo.

    Attributes
    ----------
    id : str
        Path below the folder, with ``/``, or another name that no other photo of the run has.
    size : int | None
        Bytes of the file; None if it is not known.
    mtime : float | None
        Time of its last change, in seconds since 1970; None if it is not known.
    """

    id: str
    size: int | None = None
    mtime: float | None = None


def done_line(
    photo: Identity,
    outputs: Mapping[str, str | None],
    facts: Mapping[str, object],
    warnings: Sequence[str],
) -> JSON:
    """The line of a photo whose files are complete.

    Parameters
    ----------
    outputs : Mapping[str, str | None]
        Path of each output's file below the folder of the results; None if the model lacks it.
    facts : Mapping[str, object]
        What is known of the depth and of the engine that made it, such as ``unit``.
    """
    return {**photo._asdict(), "outputs": dict(outputs), **facts, "warnings": list(warnings)}


def failed_line(photo: Identity, error: str) -> JSON:
    """The line of a photo that failed, with the reason."""
    return {**photo._asdict(), "error": error}


class RunManifest:
    """The lines of all runs into one folder, and the file to which this run appends.

    Use it as a context manager, which locks the file. A last line that a killed run left incomplete is
    dropped. If photos were done again, the newest line of each stays at the end.

    Parameters
    ----------
    out : Path
        The folder of the results. It is created.
    part : str
        The part of the photos that this run does, such as ``2-of-8``, which has a file of its own; empty
        for all.

    Attributes
    ----------
    path : Path
        The file of this run.
    scratch : Path
        A folder for incomplete files of this run; what a killed run left there is removed.

    Raises
    ------
    SettingError
        If another run writes to the same file, or it cannot be written.
    """

    def __init__(self, out: Path, part: str = "") -> None:
        self._out = out
        name = f"manifest.{part}" if part else "manifest"
        self.path, self.scratch = out / f"{name}.jsonl", out / f".{name}.unfinished"
        # Offset of each photo's newest line, by file: a run of all photos knows what parts have done.
        self._offsets: dict[Path, dict[str, int]] = {self.path: {}}
        self._has_old_lines = False

    def __enter__(self) -> Self:
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            self._file = _locked(self.path)
            if self.path.stat().st_size and not (self._out / RUN_NAME).exists():
                self._file.close()
                raise SettingError(
                    f"{self.path} is not of a run of this command: choose another folder."
                )
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
            _drop_incomplete(self.path)
            for path in sorted(self._out.glob("manifest*.jsonl")):
                self._read(path)
        except BlockingIOError:
            raise SettingError(
                f"Another run writes to {self._out}: wait for its end, or choose another folder."
            ) from None
        except OSError as error:
            raise _cannot_be_written(self._out, error) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._has_old_lines and error is None:
            self._keep_newest()
        shutil.rmtree(self.scratch, ignore_errors=True)
        if not self._offsets[self.path]:
            self.path.unlink()
        self._file.close()

    def compare(self, settings: Mapping[str, object]) -> None:
        """Compare settings with those of earlier runs into the folder, if there were any.

        Parameters
        ----------
        settings : Mapping[str, object]
            What the files depend on, as JSON; not necessarily everything.

        Raises
        ------
        SettingError
            If one differs; the message names it.
        """
        file = self._out / RUN_NAME
        try:
            text = file.read_bytes()
            if not text:  # a run that was killed at its start
                return
            found = json.loads(text)
        except FileNotFoundError:
            return
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict) or "model_id" not in found:
            raise SettingError(f"{file} cannot be read: choose another folder.") from None
        for name in found.keys() & settings.keys():
            was, now = (json.dumps(each[name]) for each in (found, settings))
            if was != now:
                raise SettingError(
                    f"{self._out} has results with {name} {was}, and this run has {now}: choose another "
                    "folder."
                )

    def keep(self, settings: Mapping[str, object]) -> None:
        """Keep the settings of the first run in ``run.json``; raises as :meth:`compare` if they differ.

        Parameters
        ----------
        settings : Mapping[str, object]
            Everything that the files depend on, as JSON.
        """
        try:
            with (self._out / RUN_NAME).open("ab") as file:
                with contextlib.suppress(OSError):  # without locks two first runs may not see each other
                    fcntl.flock(file, fcntl.LOCK_EX)
                if file.tell() == 0:
                    file.write(json.dumps(settings, indent=1).encode() + b"\n")
        except OSError as error:
            raise _cannot_be_written(self._out, error) from None
        self.compare(settings)

    def find(self, photo: str) -> Iterator[JSON]:
        """The newest line of a photo, by its id, in every file that has one."""
        for path, offsets in self._offsets.items():
            if photo in offsets:
                with path.open("rb") as file:
                    file.seek(offsets[photo])
                    record = _parsed(file.readline())
                if record is not None:
                    yield record

    def has(self, photo: Identity) -> bool:
        """Whether a photo in this state is done, and all of its files are there."""
        return any(
            Identity(photo.id, record.get("size"), record.get("mtime")) == photo  # type: ignore[arg-type]
            and isinstance(outputs := record.get("outputs"), dict)
            and all((self._out / file).is_file() for file in outputs.values() if file is not None)
            for record in self.find(photo.id)
        )

    def add(self, record: Mapping[str, object]) -> None:
        """Write a photo's line, unless this run's file has the same one.

        Raises
        ------
        SettingError
            If it cannot be written.
        """
        line = json.dumps(record).encode() + b"\n"
        photo, offsets = str(record["id"]), self._offsets[self.path]
        if photo in offsets and _parsed(line) in list(self.find(photo)):
            return
        try:
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise _cannot_be_written(self._out, error) from None
        self._has_old_lines |= photo in offsets
        offsets[photo] = offset

    def _read(self, path: Path) -> None:
        offsets, offset = self._offsets.setdefault(path, {}), 0
        with path.open("rb") as file:
            for line in file:
                record = _parsed(line)
                if record is not None:
                    photo = str(record["id"])
                    self._has_old_lines |= photo in offsets and path == self.path
                    offsets[photo] = offset
                offset += len(line)

    def _keep_newest(self) -> None:
        """Keep the newest line of each photo, where its first line was."""
        with (
            replacing(self.path, self.scratch) as temporary,
            self.path.open("rb") as old,
            temporary.open("wb") as new,
        ):
            for offset in self._offsets[self.path].values():
                old.seek(offset)
                new.write(old.readline())


def _locked(path: Path) -> BinaryIO:
    """A file to append to, which no other process has locked; raises BlockingIOError if one has."""
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks.
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                file.close()
                raise
        # A run that ended in between has replaced or removed the file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()


def _drop_incomplete(path: Path) -> None:
    """Cut off a last line without its end."""
    with path.open("rb+") as file:
        complete = 0
        for line in file:
            complete += len(line) if line.endswith(b"\n") else 0
        file.truncate(complete)


def _parsed(line: bytes) -> JSON | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("id"), str) else None


def _cannot_be_written(folder: Path, error: OSError) -> SettingError:
    return SettingError(f"{folder}: {error.strerror or 'cannot be written'}.")
