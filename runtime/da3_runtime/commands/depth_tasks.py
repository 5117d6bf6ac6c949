"""Which images ``da3-runtime depth`` processes, and where the results of each go.

Everything that can go wrong with names is found here, before a model is loaded.
"""

from __future__ import annotations

import os
import stat
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from da3_runtime.errors import ImageError, SettingError
from da3_runtime.image.folder import Found, find_photos, photo_endings, real_path
from da3_runtime.output.files import ENDINGS


@dataclass(frozen=True)
class Task:
    """One image file, and the path of its results.

    Attributes
    ----------
    source : Path
        The image.
    target : Path
        Path of the results, without the ending that each of them adds.
    """

    source: Path
    target: Path


class Tasks(NamedTuple):
    """All images of a run.

    Attributes
    ----------
    tasks : list[Task]
        In the order of the command line, and by path within a folder.
    skipped : str
        What the folders contain beside these images, in words; empty if nothing.
    """

    tasks: list[Task]
    skipped: str


def find_tasks(images: Sequence[Path], out: Path, endings: Iterable[str] = ENDINGS.values()) -> Tasks:
    """The images in files and folders, each with the path of its results.

    Results of a folder's images keep the folder's structure. They are named after the image, without
    its ending; where two images would share a file, the ending stays in the names. A folder is searched
    without ``out``, which holds the results of earlier runs.

    Parameters
    ----------
    out : Path
        A folder, or the preview (``.png``) of one image.
    endings : Iterable[str]
        Endings of the results that will be written, such as ``.depth.png``.

    Raises
    ------
    ImageError
        If a file or folder does not exist or cannot be read, or a folder contains no image.
    SettingError
        If ``out`` is a file and there are several images; if two images would write the same file, or
        one would write over an image; if a later run would take the results for photos.
    """
    file = _preview_path(out)
    folder = out if file is None else out.parent
    own = set() if file is None else {real_path(path) for path in _results(file)}
    real_out = real_path(folder)
    tasks: list[Task] = []
    skipped = Counter[str]()
    searched: set[Path] = set()
    for path in images:
        if not _is_folder(path):
            tasks.append(Task(path, folder / path.stem))
            continue
        is_around_out = file is None and not real_path(path).is_relative_to(real_out)
        found = find_photos(path, real_out if is_around_out else None)
        photos = [photo for photo in found.photos if not own or real_path(photo) not in own]
        if not photos:
            raise _no_image(path, found)
        tasks += [Task(photo, folder / photo.relative_to(path).with_suffix("")) for photo in photos]
        skipped += found.skipped
        searched |= found.folders
    tasks = list({(real_path(task.source), task.target): task for task in tasks}.values())
    if file is not None:
        if len(tasks) > 1:
            raise SettingError(f"--out {out}: {len(tasks)} images need a folder, not a file.")
        tasks = [Task(tasks[0].source, file)]
    else:
        _check_not_searched(tasks, out, {each for each in searched if each.is_relative_to(real_out)})
        tasks = _distinct(tasks)
    _check_no_overwrite(tasks, tuple(endings))
    return Tasks(tasks, _in_words(skipped))


def _preview_path(out: Path) -> Path | None:
    """The preview that ``out`` names, without its ending; None if ``out`` is a folder."""
    # os.path.isdir is False for a path that the system refuses; writing there reports the reason.
    if out.suffix.lower() not in photo_endings() or os.path.isdir(out):  # noqa: PTH112
        return None
    if out.suffix.lower() != ".png":
        raise SettingError(f"--out {out}: the preview is a PNG; give a name that ends in .png.")
    return out.with_suffix("")


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(f"{path}: no such file.") from None
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or 'cannot be read'}.") from None


def _no_image(path: Path, found: Found) -> ImageError:
    skipped = _in_words(found.skipped)
    beside = f", only {skipped}" if skipped else ""
    known = ", ".join(sorted(photo_endings()))
    return ImageError(f"{path} contains no image{beside}; the known endings are: {known}.")


def _in_words(skipped: Counter[str]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in skipped.most_common())


def _results(target: Path) -> list[Path]:
    """Every file that a run may write at ``target``, whichever outputs are wanted."""
    return [target.with_name(f"{target.name}{ending}") for ending in ENDINGS.values()]


def _check_not_searched(tasks: Sequence[Task], out: Path, searched: set[Path]) -> None:
    """Refuse results in folders that are searched: the next run would take them for photos."""
    for folder in sorted({task.target.parent for task in tasks}) if searched else ():
        real = real_path(folder)
        if not searched.isdisjoint((real, *real.parents)):
            raise SettingError(
                f"--out {out}: {folder} is searched for photos, and the next run would take the results "
                f"for photos; give another folder, such as {out / 'depth'}."
            )


def _distinct(tasks: list[Task]) -> list[Task]:
    """The tasks, with the images' endings in the names of results that would be the same file."""
    while same := {task for task, *_ in _clashes(tasks) if task.target.name != task.source.name}:
        tasks = [
            Task(task.source, task.target.with_name(task.source.name)) if task in same else task
            for task in tasks
        ]
    for task, other, file in _clashes(tasks):
        if other is None:
            raise SettingError(
                f"{task.source} would write {file}, but that is a folder of other results; rename it."
            )
        raise SettingError(
            f"{other.source} and {task.source} would both write {file}; rename one of them, or run "
            "them separately."
        )
    return tasks


def _clashes(tasks: Sequence[Task]) -> Iterator[tuple[Task, Task | None, Path]]:
    """A task, the other one (None: a folder) that needs the same path, and that path.

    Both tasks of a pair are yielded. Outputs that are not wanted count too, so that names do not depend
    on what is wanted.
    """
    key = _file_keys()
    folders = {key(folder) for task in tasks for folder in (task.target.parent, *task.target.parents)}
    owners: dict[str, Task] = {}
    for task in tasks:
        for file in _results(task.target):
            name = key(file)
            other = owners.setdefault(name, task)
            if other is not task:
                yield task, other, file
                yield other, task, file
            if name in folders:
                yield task, None, file


def _file_keys() -> Callable[[Path], str]:
    """A function that gives two paths of one file the same text."""
    real = cache(os.path.realpath)
    ignores_case = sys.platform in ("darwin", "win32")

    def key(path: Path) -> str:
        text = os.path.join(real(path.parent), path.name)  # noqa: PTH118
        return unicodedata.normalize("NFC", text).casefold() if ignores_case else text

    return key


def _check_no_overwrite(tasks: Sequence[Task], endings: Sequence[str]) -> None:
    """Refuse to overwrite an input image with a result."""
    sources = {real_path(task.source) for task in tasks}
    for task in tasks:
        for ending in endings:
            file = task.target.with_name(f"{task.target.name}{ending}")
            if real_path(file) in sources:
                raise SettingError(f"--out: {file} is one of the images; choose another path.")
