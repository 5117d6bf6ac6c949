"""Photos with known depth: what they are, and what reads their files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from da3_export.photos import read_photo
from da3_runtime.errors import ImageError, SettingError
from da3_runtime.image.decode import Photo

Truth = NDArray[np.float64]
Size = tuple[int, int]  # height and width


@dataclass(frozen=True)
class Source:
    """Where a data set is, and what its files do not state.

    Attributes
    ----------
    path : Path
        The folder, or NYU's .mat file.
    depth_scale : float | None
        Depth of one step of an integer image in a plain folder.
    split : Path | None
        File with the list of KITTI's photos.
    """

    path: Path
    depth_scale: float | None = None
    split: Path | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """A photo with known depth.

    Attributes
    ----------
    name : str
        Path of the photo below the data set's folder.
    files : tuple[Path, ...]
        What it is read from.
    photo : Callable[[], Photo]
        Reads the photo.
    truth : Callable[[Size], Truth]
        Reads the known depth, given the photo's height and width. What is not positive and finite is
        unknown.
    focal_px : float | None
        Mean of fx and fy in pixels of the known depth.
    scene : str | None
        Name of the scene whose cameras are known.
    extrinsics : NDArray[np.float64] | None
        The camera, world to camera, [3, 4].
    """

    name: str
    files: tuple[Path, ...]
    photo: Callable[[], Photo]
    truth: Callable[[Size], Truth]
    focal_px: float | None = None
    scene: str | None = None
    extrinsics: NDArray[np.float64] | None = None

    @property
    def depth_name(self) -> str:
        """Name of the file with its depth."""
        return self.files[:2][-1].name


def read_depth(path: Path, depth_scale: float | None = None) -> Truth:
    """Depth [H, W] from a file: .npz with the array ``depth``, .npy, .pfm, or a PNG or TIFF image.

    Parameters
    ----------
    depth_scale : float | None
        Depth of one step of an image of integers.

    Raises
    ------
    SettingError
        If the file cannot be read, is not a map, or has integers of an unknown scale.
    """
    try:
        values = _read_array(path)
    except (OSError, ValueError, KeyError, cv2.error):
        raise SettingError(
            f"{path.name} is not a depth file: give an .npz with the array 'depth', an .npy, a .pfm, a "
            "16-bit gray PNG, or a gray TIFF of 16-bit integers or floats."
        ) from None
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        shape = " x ".join(map(str, values.shape))
        raise SettingError(
            f"{path.name} holds {shape} {values.dtype}: depth is a map [H, W] of numbers."
        )
    is_scaled = values.dtype == np.uint16 and path.suffix.lower() not in (".npy", ".npz")
    if is_scaled and depth_scale is None:
        raise SettingError(
            f"{path.name}: integers need --depth-scale, the depth of one step (0.001 for millimeters)."
        )
    return values.astype(np.float64) * (depth_scale if is_scaled and depth_scale else 1.0)


def _read_array(path: Path) -> NDArray[np.generic]:
    if path.suffix.lower() in (".npy", ".npz"):
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return np.asarray(loaded["depth"])
    image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype == np.uint8:
        raise ValueError(path.name)
    return np.asarray(image)


def sample_of(source: Source, photo: Path, depth: Path, truth: Callable[[Size], Truth]) -> Sample:
    """A sample of two files, named after the photo."""
    name = photo.relative_to(source.path).as_posix()
    return Sample(name, (photo, depth), partial(photo_of, photo), truth)


def photo_of(path: Path) -> Photo:
    """Read a photo; raises SettingError with the file's name if it is no image."""
    try:
        return read_photo(path)
    except ImageError as error:
        raise SettingError(f"{path.name}: {error}") from None


def files_below(folder: Path, pattern: str) -> list[Path]:
    """Files in a folder and the folders below it whose last parts fit a pattern, sorted.

    Links to folders are followed, as data sets are often linked; each folder is searched once.
    """
    seen: set[str] = set()
    found = []
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        paths = (Path(here, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.match(pattern)]
    return sorted(found)


def existing(source: Source, *candidates: Path) -> Path:
    """The first of some files that exists; raises SettingError with their names if none does."""
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        names = " or ".join(path.relative_to(source.path).as_posix() for path in candidates)
        raise SettingError(f"{names} is missing in {source.path}.")
    return found


def truth_of(path: Path, depth_scale: float | None, _: Size) -> Truth:
    """:func:`read_depth`, for :attr:`Sample.truth`."""
    return read_depth(path, depth_scale)


def lines_of(path: Path) -> list[str]:
    """Lines of a text file; raises SettingError with its name."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise SettingError(f"{path.name} is not a text file that can be read.") from None


def rows_of(path: Path) -> list[list[str]]:
    """Words of the lines that are not comments."""
    return [line.split() for line in lines_of(path) if line.strip() and not line.startswith("#")]
