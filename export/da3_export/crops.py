"""Photos for distillation: random crops to learn from, and photos that are held out to measure on."""

from __future__ import annotations

import hashlib
import os
import signal
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from da3_export.photos import read_photo, search
from da3_runtime.errors import ImageError, SettingError
from da3_runtime.image.folder import in_words, photo_endings
from da3_runtime.image.preprocess import model_input
from da3_runtime.variants import PATCH

Item = TypeVar("Item")

MOST_HELD_OUT = 64  # photos: more would cost more than they tell
SMALLEST = 0.6  # longest side of the smallest crop, as a share of the largest
ASPECTS = (4 / 3, 3 / 4, 3 / 2, 1.0)
_LEAST_PATCHES = 6  # of a side of a crop
LEAST_LONGEST = _LEAST_PATCHES * PATCH


@dataclass(frozen=True)
class PhotoFolder:
    """The photos of a folder and the folders below it.

    Attributes
    ----------
    folder : Path
        The folder.
    names : tuple[str, ...]
        Path of each photo below it, sorted.
    skipped : str
        The other files, in words.
    """

    folder: Path
    names: tuple[str, ...]
    skipped: str = ""

    @classmethod
    def find(cls, folder: Path) -> PhotoFolder:
        """Search a folder.

        Raises
        ------
        SettingError
            If it does not exist, or has fewer than two photos.
        ImageError
            If a folder cannot be read.
        """
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.is_file() else "no such folder"
            raise SettingError(f"--images {folder}: {what}; give a folder of photos.")
        found = search(folder)
        skipped = in_words(found.skipped)
        if not found.names:
            beside = f", only {skipped}" if skipped else ""
            known = ", ".join(sorted(photo_endings()))
            raise SettingError(
                f"--images {folder} contains no photo{beside}; the known endings are: {known}."
            )
        if len(found.names) == 1:
            raise SettingError(
                f"--images {folder} contains one photo; give two or more, as one is held out."
            )
        return cls(folder, tuple(found.names), skipped)

    def digest(self) -> str:
        """The first digits of a digest of the names, in hexadecimal."""
        return hashlib.sha256(os.fsencode("\0".join(self.names))).hexdigest()[:12]

    def read(self, name: str) -> NDArray[np.uint8] | str:
        """A photo, uint8 [H, W, 3], or why it cannot be read."""
        try:
            return read_photo(self.folder / name).rgb
        except ImageError as error:
            return str(error)
        except OSError as error:
            return f"{error.strerror or 'cannot be read'}."


class Split(NamedTuple):
    """Photos to learn from and photos to measure on.

    Attributes
    ----------
    training : list[str]
        Names of the former.
    held_out : dict[str, Tensor]
        The latter by name, uint8 [1, 1, h, w, 3], as the network sees them.
    unreadable : dict[str, str]
        Why photos cannot be read, by name, as far as they were tried.
    """

    training: list[str]
    held_out: dict[str, Tensor]
    unreadable: dict[str, str]


def split(photos: PhotoFolder, percent: float, longest: int) -> Split:
    """Hold out some photos: those whose path has a small hash, at least one, at most 64.

    The choice depends on the paths only, so a photo stays on its side when others are added.

    Parameters
    ----------
    percent : float
        Share of the photos to hold out.
    longest : int
        Longest side of the held-out photos in pixels.

    Raises
    ------
    SettingError
        If fewer than two photos can be read.
    """
    held_out: dict[str, Tensor] = {}
    unreadable: dict[str, str] = {}
    ordered = sorted((_hash(name), name) for name in photos.names)
    for position, name in ordered:
        if held_out and (position >= 2**32 * percent / 100 or len(held_out) == MOST_HELD_OUT):
            break
        rgb = photos.read(name)
        if isinstance(rgb, str):
            unreadable[name] = rgb
            continue
        try:
            held_out[name] = torch.from_numpy(model_input(rgb, longest))
        except ImageError as error:  # it is too long and narrow
            unreadable[name] = str(error)
    training = [name for name in photos.names if name not in held_out and name not in unreadable]
    if not held_out or not training:
        name = min(unreadable)
        what = "one" if held_out else "none"
        raise SettingError(
            f"--images {photos.folder}: {what} of the {len(photos.names)} photos can be read, two are "
            f"needed. {name}: {unreadable[name]}"
        )
    return Split(training, held_out, unreadable)


def _hash(name: str) -> int:
    """A number from 0 to 2^32 - 1 that a path always has."""
    return zlib.crc32(os.fsencode(name))


class Crops(NamedTuple):
    """The images of one step.

    Attributes
    ----------
    images : Tensor | None
        uint8 [B, H, W, 3]; None if no photo can be read.
    unreadable : dict[str, str]
        Why photos cannot be read, by name: those that this process met for the first time.
    """

    images: Tensor | None
    unreadable: dict[str, str]


class RandomCrops(Dataset[Crops]):
    """A batch of random image crops for every step.

    Parameters
    ----------
    photos : PhotoFolder
        Where the photos are.
    names : list[str]
        Those to take.
    batch, longest : int
        Images of a step, longest side of the largest crop in pixels.
    seed : int
        Decides every crop, together with the step.
    """

    def __init__(
        self, photos: PhotoFolder, names: list[str], batch: int, longest: int, seed: int
    ) -> None:
        self.photos, self.names = photos, names
        self.batch, self.longest, self.seed = batch, longest, seed
        self._unreadable: dict[str, str] = {}

    def __getitem__(self, step: int) -> Crops:
        rng = np.random.default_rng([self.seed, step, 2])
        longest, aspect = self.longest * rng.uniform(SMALLEST, 1), rng.choice(ASPECTS)
        width, height = (longest, longest / aspect) if aspect >= 1 else (longest * aspect, longest)
        size = [max(_LEAST_PATCHES, round(side / PATCH)) * PATCH for side in (height, width)]
        known = set(self._unreadable)
        crops = []
        for _ in range(self.batch):
            rgb = self._photo(rng)
            if rgb is None:
                break
            crops.append(_crop(rng, rgb, *size))
        new = {name: why for name, why in self._unreadable.items() if name not in known}
        return Crops(torch.from_numpy(np.stack(crops)) if len(crops) == self.batch else None, new)

    def _photo(self, rng: np.random.Generator) -> NDArray[np.uint8] | None:
        """A random photo, or the next one that can be read; None if none can."""
        first = int(rng.integers(len(self.names)))
        for i in range(len(self.names)):
            name = self.names[(first + i) % len(self.names)]
            if name not in self._unreadable:
                rgb = self.photos.read(name)
                if not isinstance(rgb, str):
                    return rgb
                self._unreadable[name] = rgb
        return None


def _crop(
    rng: np.random.Generator, rgb: NDArray[np.uint8], height: int, width: int
) -> NDArray[np.uint8]:
    """A random crop resized to the shape, at least half as large as possible, mirrored or not."""
    largest = min(rgb.shape[0] / height, rgb.shape[1] / width)
    scale = largest * rng.uniform(0.5, 1)
    h, w = max(1, int(height * scale)), max(1, int(width * scale))
    top, left = rng.integers(rgb.shape[0] - h + 1), rng.integers(rgb.shape[1] - w + 1)
    crop = rgb[top : top + h, left : left + w]
    if rng.uniform() < 0.5:
        crop = crop[:, ::-1]
    mode = cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC
    resized = cv2.resize(np.ascontiguousarray(crop), (width, height), interpolation=mode)
    return np.asarray(resized, np.uint8)


def in_order(data: Dataset[Item], start: int, end: int, workers: int) -> Iterator[Item]:
    """Items of the steps from ``start`` to ``end``, read by ``workers`` processes; 0 reads them here."""
    loader: DataLoader[Item] = DataLoader(
        data,
        batch_size=None,
        sampler=range(start, end),
        num_workers=workers,
        worker_init_fn=_use_one_thread,
    )
    yield from loader


def _use_one_thread(worker: int) -> None:
    """Keep a process that loads data to one core, and leave an interruption to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
