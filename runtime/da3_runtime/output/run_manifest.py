"""What a run over a folder has done: ``manifest.jsonl``, one line for each photo, and ``run.json``.

A line is written when a photo's files are complete, so a killed run can go on: what has no line is done
again. ``run.json`` has the model and the settings that all files of the folder were made with.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from da3_runtime.errors import SettingError
from da3_runtime.output.encode import Wanted
from da3_runtime.settings import Settings
from da3_runtime.util.files import locked, replacing
from da3_runtime.variants import find_head, find_variant

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


@dataclass(frozen=True)
class Request:
    """What is wanted of every photo.

    Attributes
    ----------
    wanted : Wanted
        The outputs.
    focal_length_px : float | None
        Focal length in pixels of the upright photos, if known.
    model_size : bool
        Write maps at the size of the model's input.
    """

    wanted: Wanted
    focal_length_px: float | None = None
    model_size: bool = False


def made_with(settings: Settings, request: Request) -> JSON:
    """What the files of a run depend on, beside the photos and the engine."""
    engine, wanted = settings.engine, asdict(request.wanted)
    return {
        "model_id": find_variant(engine.model_id).model_id,
        "head": find_head(engine.head).value,
        "ray_pose": engine.ray_pose,
        "processing_res": settings.inference.processing_res,
        "focal_length_px": request.focal_length_px,
        "model_size": request.model_size,
        **wanted,
    }


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


def compare_settings(
    out: Path | str, kept: Mapping[str, object], settings: Mapping[str, object]
) -> None:
    """Compare settings with those of earlier runs into a folder, where both have them.

    Raises
    ------
    SettingError
        If one differs; the message names the folder and the setting.
    """
    for name in (name for name in kept if name in settings):
        was, now = (json.dumps(each[name]) for each in (kept, settings))
        if was != now:
            raise SettingError(
                f"{out} has results with {name} {was}, and this run has {now}: choose another folder."
            )


class RunManifest:
    """The lines of all runs into one folder, and the file to which this run appends.

    Use it as a context manager. It keeps other runs out: a run of all photos runs alone, and each part
    once. A last line that a killed run left incomplete is dropped. If photos were done again, the newest
    line of each stays at the end. A run of all photos also takes over the lines of parts.

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
        self._is_whole = not part

    def __enter__(self) -> Self:
        with ExitStack() as locks:
            try:
                self._out.mkdir(parents=True, exist_ok=True)
                locks.enter_context(_locked_folder(self._out, alone=self._is_whole))
                if not self._kept() and _size_of(self.path):
                    raise SettingError(
                        f"{self.path} is not of a run of this command: choose another folder."
                    )
                self._file = locks.enter_context(locked(self.path))
                shutil.rmtree(self.scratch, ignore_errors=True)
                self.scratch.mkdir()
                for path in sorted(self._out.glob("manifest*.jsonl")):
                    self._read(path)
            except BlockingIOError:
                raise SettingError(
                    f"Another run writes to {self._out}: wait for its end, or choose another folder."
                ) from None
            except OSError as error:
                raise _cannot_be_written(self._out, error) from None
            self._locks = locks.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._locks:
            if error is None and self._is_whole and len(self._offsets) > 1:
                self._take_over_parts()
            elif error is None and self._has_old_lines:
                self._write_lines([(self.path, each) for each in self._offsets[self.path].values()])
            shutil.rmtree(self.scratch, ignore_errors=True)
            if not _size_of(self.path):
                self.path.unlink(missing_ok=True)

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
        compare_settings(self._out, self._kept(), settings)

    def _kept(self) -> JSON:
        """The settings in ``run.json``; empty if there are none."""
        file = self._out / RUN_NAME
        try:
            text = file.read_bytes()
            if not text:  # a run that was killed at its start
                return {}
            found = json.loads(text)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict) or "model_id" not in found:
            raise SettingError(f"{file} is not of a run of this command: choose another folder.")
        return found

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
                if os.fstat(file.fileno()).st_size == 0:
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
        """Whether a photo in this state is done, and all of its files are there.

        If several files have lines of it, which is the newest is not known: all must agree.
        """
        records = list(self.find(photo.id))
        return bool(records) and all(
            Identity(photo.id, record.get("size"), record.get("mtime")) == photo  # type: ignore[arg-type]
            and isinstance(outputs := record.get("outputs"), dict)
            and all((self._out / file).is_file() for file in outputs.values() if file is not None)
            for record in records
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
        if photo in offsets and next(self.find(photo)) == _parsed(line):
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
                if path == self.path and not line.endswith(b"\n"):
                    os.truncate(path, offset)  # a killed run left it incomplete
                    break
                record = _parsed(line)
                if record is not None:
                    photo = str(record["id"])
                    self._has_old_lines |= photo in offsets and path == self.path
                    offsets[photo] = offset
                offset += len(line)

    def _take_over_parts(self) -> None:
        """Move the lines of all parts to this run's file, sorted by the parts of the photos' paths."""
        newest: dict[str, tuple[Path, int]] = {}
        for path, offsets in reversed(self._offsets.items()):  # this run's own lines last
            newest |= {photo: (path, offset) for photo, offset in offsets.items()}
        self._write_lines([newest[photo] for photo in sorted(newest, key=lambda id_: id_.split("/"))])
        for path in self._offsets.keys() - {self.path}:
            path.unlink()

    def _write_lines(self, lines: Sequence[tuple[Path, int]]) -> None:
        """Replace this run's file by lines at these offsets of files."""
        with (
            replacing(self.path, self.scratch) as temporary,
            temporary.open("wb") as new,
            ExitStack() as opened,
        ):
            old = {path: opened.enter_context(path.open("rb")) for path in self._offsets}
            for path, offset in lines:
                old[path].seek(offset)
                new.write(old[path].readline())


@contextmanager
def _locked_folder(folder: Path, *, alone: bool) -> Iterator[None]:
    """Lock a folder, or share it with other runs that do; raises BlockingIOError if that cannot be."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        pass  # some network file systems have no locks, or none of folders
    try:
        yield
    finally:
        os.close(handle)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _parsed(line: bytes) -> JSON | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("id"), str) else None


def _cannot_be_written(folder: Path, error: OSError) -> SettingError:
    return SettingError(f"{folder}: {error.strerror or 'cannot be written'}.")
