"""Files of known cameras -> one camera for each photo: COLMAP's text model, or a ``scene.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import SettingError
from da3_runtime.postprocess.camera import Lens, resize_intrinsics
from da3_runtime.postprocess.poses import rotation

SOURCE = "cameras"  # of a lens that such a file gives
# Parameters of COLMAP's camera models without lens distortion: places of fx, fy, cx and cy.
_COLMAP_MODELS = {"SIMPLE_PINHOLE": (0, 0, 1, 2), "PINHOLE": (0, 1, 2, 3)}
_COLMAP_FILES = ("cameras.txt", "images.txt")
# Share by which the shape of a photo may differ from its camera's: sizes are whole pixels.
_SHAPE_TOLERANCE = 0.01


class KnownCamera(NamedTuple):
    """A camera of a file.

    Attributes
    ----------
    image : str
        Name of its photo, or its path.
    width, height : int
        Size that the intrinsics are for, in pixels.
    intrinsics : NDArray[np.float32]
        [3, 3].
    extrinsics : NDArray[np.float64]
        [3, 4], world to camera.
    """

    image: str
    width: int
    height: int
    intrinsics: NDArray[np.float32]
    extrinsics: NDArray[np.float64]

    def lens(self, width: int, height: int) -> Lens:
        """Its lens for the photo of ``width`` x ``height`` pixels.

        Raises
        ------
        SettingError
            If the photo has another shape.
        """
        across, down = width / self.width, height / self.height
        if abs(across / down - 1) > _SHAPE_TOLERANCE:
            raise SettingError(
                f"{Path(self.image).name} has {width} x {height} pixels, and its camera {self.width} x "
                f"{self.height}: give the camera of the upright photo."
            )
        return Lens(resize_intrinsics(self.intrinsics, across, down), SOURCE)


def cameras_of(path: Path, photos: Sequence[Path]) -> list[KnownCamera]:
    """The camera of each photo in a file of cameras, found by the photo's name.

    Parameters
    ----------
    path : Path
        A folder with COLMAP's ``cameras.txt`` and ``images.txt``, or a JSON file with the ``views`` of a
        ``scene.json``: ``image``, ``width``, ``height``, ``intrinsics`` and ``extrinsics`` of each.

    Raises
    ------
    SettingError
        If it cannot be read, or has not exactly one camera for each photo.
    """
    try:
        known = _read_colmap(path) if path.is_dir() else _read_json(path)
    except OSError as error:
        name = Path(error.filename or path).name
        raise SettingError(f"{path}: {name}: {error.strerror or 'cannot be read'}.") from None
    except UnicodeDecodeError:
        raise SettingError(f"{path} is not text.") from None
    return [_find(path, known, photo) for photo in photos]


def lenses_and_poses(
    known: Sequence[KnownCamera], sizes: Sequence[tuple[int, int]]
) -> tuple[list[Lens], NDArray[np.float64]]:
    """The lenses of known cameras for photos of these widths and heights, and extrinsics [S, 3, 4].

    Raises as :meth:`KnownCamera.lens`.
    """
    lenses = [camera.lens(*size) for camera, size in zip(known, sizes, strict=True)]
    return lenses, np.stack([camera.extrinsics for camera in known])


def _find(path: Path, known: Sequence[KnownCamera], photo: Path) -> KnownCamera:
    """The camera whose name shares most of its last parts with the photo's path, at least the name."""
    shared = [_shared_parts(Path(camera.image), photo.absolute()) for camera in known]
    most = max(shared, default=0)
    if most == 0:
        raise SettingError(f"{path} has no camera for {photo}: leave the photo out, or add its camera.")
    if shared.count(most) > 1:
        raise SettingError(
            f"{path} has {shared.count(most)} cameras for {photo}: give their folders too."
        )
    return known[shared.index(most)]


def _shared_parts(one: Path, other: Path) -> int:
    pairs = list(zip(reversed(one.parts), reversed(other.parts), strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _read_json(path: Path) -> list[KnownCamera]:
    text = path.read_text(encoding="utf-8")
    try:
        views: Any = json.loads(text)["views"]
        return [
            _camera(view["image"], view["width"], view["height"], view["intrinsics"], view["extrinsics"])
            for view in views
        ]
    except (ValueError, KeyError, TypeError) as error:
        what = f"a view lacks {error}" if isinstance(error, KeyError) else str(error)
        raise SettingError(
            f'{path} must be JSON, {{"views": [{{"image", "width", "height", "intrinsics": 3 x 3, '
            f'"extrinsics": 3 x 4}}, ...]}}, as scene.json is: {what}.'
        ) from None


def _camera(image: str, width: int, height: int, intrinsics: object, extrinsics: object) -> KnownCamera:
    lens, pose = np.array(intrinsics, np.float32), np.array(extrinsics, np.float64)
    if lens.shape != (3, 3) or pose.shape != (3, 4):
        raise ValueError("intrinsics are 3 rows of 3 numbers, and extrinsics 3 rows of 4")
    if not (np.isfinite(lens).all() and np.isfinite(pose).all() and min(lens[0, 0], lens[1, 1]) >= 1):
        raise ValueError("every number must be finite, and fx and fy at least 1")
    if min(int(width), int(height)) < 1:
        raise ValueError("width and height are at least 1")
    return KnownCamera(str(image), int(width), int(height), lens, pose)


def _read_colmap(folder: Path) -> list[KnownCamera]:
    """The cameras of COLMAP's text model (its documentation, "Output format")."""
    if not (folder / _COLMAP_FILES[0]).is_file() and (folder / "cameras.bin").is_file():
        raise SettingError(
            f"{folder} is a binary COLMAP model: convert it with 'colmap model_converter --output_type "
            "TXT'."
        )
    cameras, images = (_lines(folder / name) for name in _COLMAP_FILES)
    lenses = {}
    try:
        for line in cameras:
            number, model, width, height, *values = line.split()
            lenses[number] = (model, int(width), int(height), [float(value) for value in values])
        # Two lines for each image: the second one has its points and may be empty.
        return [_colmap_camera(folder, line.split(maxsplit=9), lenses) for line in images[::2] if line]
    except (ValueError, IndexError, KeyError, ZeroDivisionError):
        raise SettingError(f"{folder} is not a whole COLMAP text model.") from None


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = [line.strip() for line in lines if not line.startswith("#")]
    while lines and not lines[0]:
        del lines[0]
    return lines if path.name == _COLMAP_FILES[1] else [line for line in lines if line]


def _colmap_camera(
    folder: Path, words: list[str], lenses: dict[str, tuple[str, int, int, list[float]]]
) -> KnownCamera:
    _, *numbers, camera, name = words
    w, x, y, z, tx, ty, tz = map(float, numbers)
    model, width, height, values = lenses[camera]
    if model not in _COLMAP_MODELS:
        raise SettingError(
            f"{folder}: camera {camera} has the model {model}; without lens distortion are "
            f"{' and '.join(_COLMAP_MODELS)}. Undistort the photos with 'colmap image_undistorter'."
        )
    fx, fy, cx, cy = (values[place] for place in _COLMAP_MODELS[model])
    pose = np.column_stack((rotation(x, y, z, w), (tx, ty, tz)))
    return _camera(name, width, height, [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], pose)
