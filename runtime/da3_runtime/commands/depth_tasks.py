"""Which images ``da3-runtime depth`` processes, and where the results of each go.

Everything that can go wrong with names is found here, before a model is loaded.
"""

from __future__ import annotations

import os
import stat
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from da3_runtime.errors import ImageError, SettingError
from da3_runtime.image.folder import Found, find_photos, in_words, photo_endings, real_path
from da3_runtime.output.files import ENDINGS


class Task(NamedTuple):
    """One image file, and the path of its results. Text, as a run may have millions.

    Attributes
    ----------
    folder : Path
        The folder that was searched, or that of a file.
    name : str
        Path of the image below ``folder``.
    out : Path
        The folder of the results.
    stem : str
        Path of the results below ``out``, without the ending that each of them adds.
    """

    folder: Path
    name: str
    out: Path
    stem: str

    @property
    def source(self) -> Path:
        """The image."""
        return self.folder / self.name

    @property
    def target(self) -> Path:
        """Path of the results, without the ending that each of them adds."""
        return self.out / self.stem

    def named_whole(self) -> Task:
        """The same with the image's ending in the names of its results."""
        return self._replace(stem=(PurePosixPath(self.stem).parent / Path(self.name).name).as_posix())


class Tasks(NamedTuple):
    """All images of a run.

    Attributes
    ----------
    tasks : list[Task]
        In the order of the command line, and by path within a folder.
    skipped : str
        What the folders contain beside these images, in words; empty if nothing.
    folder : Path | None
        The folder of the results; None for a single image that was named.
    """

    tasks: list[Task]
    skipped: str
    folder: Path | None


@dataclass(frozen=True)
class Shard:
    """One of several parts of the images of a run, which different machines can do.

    An image's part depends on its own name only, so images that come later change no other's part.
    """

    number: int
    count: int

    @classmethod
    def of(cls, text: str) -> Shard:
        """The part that ``I/N`` names, from 1/N to N/N.

        Raises
        ------
        SettingError
            If the text names none.
        """
        number, slash, count = text.partition("/")
        if slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
            return cls(int(number), int(count))
        raise SettingError(f"--shard {text!r} is not I/N, such as 1/8 for the first of eight parts.")

    @property
    def part(self) -> str:
        """Its name in the names of files."""
        return f"{self.number}-of-{self.count}"

    def has(self, name: str) -> bool:
        """Whether the image with this path below its folder belongs to the part."""
        return zlib.crc32(os.fsencode(name)) % self.count == self.number - 1


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
    links: list[Path] = []
    skipped = Counter[str]()
    searched: set[Path] = set()
    for path in images:
        if not _is_folder(path):
            tasks.append(Task(path.parent, path.name, folder, path.stem))
            links.append(path)
            continue
        is_around_out = file is None and not real_path(path).is_relative_to(real_out)
        found = find_photos(path, real_out if is_around_out else None)
        names = [name for name in found.names if not own or real_path(path / name) not in own]
        if not names:
            raise _no_image(path, found)
        tasks += [Task(path, name, folder, name.rpartition(".")[0]) for name in names]
        links += [path / name for name in found.links]
        skipped += found.skipped
        searched |= found.folders
    tasks = _distinct(tasks, is_folder=file is None)
    if file is not None:
        if len(tasks) > 1:
            raise SettingError(f"--out {out}: {len(tasks)} images need a folder, not a file.")
        tasks = [tasks[0]._replace(stem=file.name)]
    else:
        _check_not_searched(tasks, out, {each for each in searched if each.is_relative_to(real_out)})
    _check_no_overwrite(tasks, tuple(endings), links)
    is_run = len(images) > 1 or bool(searched)
    return Tasks(tasks, in_words(skipped), folder if is_run and file is None else None)


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
    skipped = in_words(found.skipped)
    beside = f", only {skipped}" if skipped else ""
    known = ", ".join(sorted(photo_endings()))
    return ImageError(f"{path} contains no image{beside}; the known endings are: {known}.")


def _results(target: Path) -> list[Path]:
    """Every file that a run may write at ``target``, whichever outputs are wanted."""
    return [target.with_name(f"{target.name}{ending}") for ending in ENDINGS.values()]


def _check_not_searched(tasks: Sequence[Task], out: Path, searched: set[Path]) -> None:
    """Refuse results in folders that are searched: the next run would take them for photos."""
    for folder in sorted(_by_folder(tasks)) if searched else ():
        real = real_path(folder)
        if not searched.isdisjoint((real, *real.parents)):
            raise SettingError(
                f"--out {out}: {folder} is searched for photos, and the next run would take the results "
                f"for photos; give another folder, such as {out / 'depth'}."
            )


def _by_folder(tasks: Sequence[Task]) -> dict[Path, list[int]]:
    """Indices of the tasks by the folder of their results."""
    indices: dict[tuple[Path, str], list[int]] = {}
    for index, task in enumerate(tasks):
        indices.setdefault((task.out, os.path.dirname(task.stem)), []).append(index)  # noqa: PTH120
    return {out / below: found for (out, below), found in indices.items()}


def _distinct(tasks: list[Task], is_folder: bool) -> list[Task]:
    """The tasks, each once, with the images' endings in names of results that would be the same."""
    folders = _by_folder(tasks)
    around = {parent for folder in folders for parent in (folder, *folder.parents)}
    near = [index for each in folders.items() for index in _similar(tasks, *each, around)]
    once: dict[tuple[Path, Path], int] = {}
    for index in sorted(near):
        once.setdefault((real_path(tasks[index].source), tasks[index].target), index)
    some = [tasks[index] for index in once.values()]
    changed = dict(zip(once.values(), _renamed(some, around) if is_folder else some, strict=True))
    left_out = set(near) - set(changed)
    return [changed.get(i, task) for i, task in enumerate(tasks) if i not in left_out]


def _similar(
    tasks: Sequence[Task], folder: Path, found: Sequence[int], around: Collection[Path]
) -> list[int]:
    """The tasks in one folder whose results may have the same names as others' results, or folders.

    All of a task's results have one text up to their first period. Only tasks that share it can share
    a file.
    """
    by_start: dict[str, list[int]] = {}
    for index in found:
        by_start.setdefault(_start(os.path.basename(tasks[index].stem)), []).append(index)  # noqa: PTH119
    beside = {_start(path.name) for path in around if path.parent == folder}
    return [
        index
        for start, indices in by_start.items()
        for index in indices
        if len(indices) > 1 or start in beside
    ]


def _start(name: str) -> str:
    return unicodedata.normalize("NFC", name.partition(".")[0]).casefold()


def _renamed(tasks: list[Task], folders: Collection[Path]) -> list[Task]:
    """The tasks, with the images' endings in the names of results that would be the same file."""
    while same := {task for task, *_ in _clashes(tasks, folders) if task != task.named_whole()}:
        tasks = [task.named_whole() if task in same else task for task in tasks]
    for task, other, file in _clashes(tasks, folders):
        if other is None:
            raise SettingError(
                f"{task.source} would write {file}, but that is a folder of other results; rename it."
            )
        raise SettingError(
            f"{other.source} and {task.source} would both write {file}; rename one of them, or run "
            "them separately."
        )
    return tasks


def _clashes(
    tasks: Sequence[Task], folders: Collection[Path]
) -> Iterator[tuple[Task, Task | None, Path]]:
    """A task, the other one (None: a folder) that needs the same path, and that path.

    Both tasks of a pair are yielded. Outputs that are not wanted count too, so that names do not depend
    on what is wanted.
    """
    key = _file_keys()
    taken = {key(folder) for folder in folders} if tasks else set()
    owners: dict[str, Task] = {}
    for task in tasks:
        for file in _results(task.target):
            name = key(file)
            other = owners.setdefault(name, task)
            if other is not task:
                yield task, other, file
                yield other, task, file
            if name in taken:
                yield task, None, file


def _file_keys() -> Callable[[Path], str]:
    """A function that gives two paths of one file the same text."""
    real = cache(os.path.realpath)
    ignores_case = sys.platform in ("darwin", "win32")

    def key(path: Path) -> str:
        text = os.path.join(real(path.parent), path.name)  # noqa: PTH118
        return unicodedata.normalize("NFC", text).casefold() if ignores_case else text

    return key


def _check_no_overwrite(tasks: Sequence[Task], endings: Sequence[str], links: Sequence[Path]) -> None:
    """Refuse to overwrite an input image with a result; ``links`` are the images that may be links."""
    real = cache(real_path)
    written = {real(folder): found for folder, found in _by_folder(tasks).items()}
    read = (
        real(task.folder / os.path.dirname(task.name)) / os.path.basename(task.name)  # noqa: PTH119, PTH120
        for task in tasks
    )
    sources = {path for path in (*map(real_path, links), *read) if path.parent in written}
    for folder in {source.parent for source in sources}:
        for task in (tasks[index] for index in written[folder]):
            for ending in endings:
                file = task.target.with_name(f"{task.target.name}{ending}")
                if folder / file.name in sources:
                    raise SettingError(f"--out: {file} is one of the images; choose another path.")
