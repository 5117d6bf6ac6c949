"""Inputs that parity is measured on: real photographs, and scenes of overlapping views."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from da3_export.photos import read_photo
from da3_runtime.errors import ParityError
from da3_runtime.postprocess.poses import normalized

SHAPES = ((364, 504), (504, 280), (504, 504), (84, 1036))
BATCHES = (1, 3)
# For models with more than 500 million parameters: fewer and smaller, to keep the check affordable.
LARGE_SHAPES = ((84, 140), (140, 98), (280, 378))
LARGE_BATCHES = (1, 2)
# Scenes of every model: small, because there are many.
SCENE_SHAPES = ((84, 126), (140, 112))
VIEWS = (2, 3, 5)
SCENES = (1, 2)
KNOWN_VIEWS = 3  # of scenes whose first scene has known cameras
# A view of a scene shows this share of the photo's width and height.
VIEW_SHARE = 0.7
PHOTOS = Path(__file__).resolve().parent / "samples"


class Case(NamedTuple):
    """One input: height and width in pixels, scenes in the batch, views of each.

    ``known`` says whether the cameras of the batch's first scene are known.
    """

    height: int
    width: int
    batch: int
    views: int = 1
    known: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the input."""
        return (self.batch, self.views, self.height, self.width, 3)

    def __str__(self) -> str:
        return " x ".join(map(str, self.shape[:-1])) + (" known" if self.known else "")


def all_cases(large: bool, known: bool) -> list[Case]:
    """Cases of a graph: photos of every shape in batches of every size, then scenes.

    For ``large`` models the largest shape is measured with one photo only. ``known`` adds scenes with
    known cameras, which monocular graphs ignore.
    """
    scenes = [
        Case(*shape, batch, views) for shape in SCENE_SHAPES for views in VIEWS for batch in SCENES
    ]
    if known:
        pairs = zip(SCENE_SHAPES, SCENES, strict=True)
        scenes += [Case(*shape, batch, KNOWN_VIEWS, known=True) for shape, batch in pairs]
    if not large:
        return [Case(*shape, batch) for shape in SHAPES for batch in BATCHES] + scenes
    *small, largest = LARGE_SHAPES
    photos = [Case(*shape, batch) for shape in small for batch in LARGE_BATCHES]
    return [*photos, Case(*largest, 1), *scenes]


def case_images(case: Case) -> NDArray[np.uint8]:
    """Photographs resized to the case's shape, uint8 [B, S, H, W, 3].

    The views of a scene are parts of one photo, each a little further to the right and down.

    Raises
    ------
    ParityError
        If this installation lacks the photographs.
    """
    photos = sorted(PHOTOS.glob("*.jpg"))
    if not photos:
        raise ParityError(
            "The photographs that parity is measured on are missing; install da3-export again."
        )
    chosen = [read_photo(photos[i % len(photos)]).rgb for i in range(case.batch)]
    size = (case.width, case.height)
    views = [view for rgb in chosen for view in _views(rgb, case.views)]
    resized = [cv2.resize(view, size, interpolation=cv2.INTER_AREA) for view in views]
    return np.stack([np.asarray(image, np.uint8) for image in resized]).reshape(case.shape)


def _views(rgb: NDArray[np.uint8], count: int) -> list[NDArray[np.uint8]]:
    """Overlapping parts of a photo [H, W, 3]; the whole photo if there is only one."""
    if count == 1:
        return [rgb]
    height, width = (int(side * VIEW_SHARE) for side in rgb.shape[:2])
    steps = np.linspace(0, 1, count)
    tops = (steps**2 * (rgb.shape[0] - height)).astype(int)
    lefts = (steps * (rgb.shape[1] - width)).astype(int)
    return [rgb[top : top + height, left : left + width] for top, left in zip(tops, lefts, strict=True)]


class Cameras(NamedTuple):
    """Known cameras of a scene.

    Attributes
    ----------
    extrinsics : NDArray[np.float64]
        [S, 3, 4], world to camera, relative to the first camera and normalized.
    intrinsics : NDArray[np.float64]
        [S, 3, 3], in pixels.
    """

    extrinsics: NDArray[np.float64]
    intrinsics: NDArray[np.float64]


def case_cameras(case: Case) -> Cameras | None:
    """Cameras of the case's first scene that move and turn a little from view to view, if it has any."""
    if not case.known:
        return None
    steps = np.arange(case.views)[:, None]
    turns = [cv2.Rodrigues(np.asarray(turn))[0] for turn in steps * (0.1, 0.2, -0.05)]
    moves = steps * (0.4, 0.1, 0.2) + steps**2 * (0, -0.05, 0.1)
    extrinsics = np.concatenate((np.stack(turns), moves[:, :, None]), axis=2)
    focal = 0.8 * max(case.height, case.width)
    lens = np.array([[focal, 0, case.width / 2], [0, focal, case.height / 2], [0, 0, 1]])
    return Cameras(normalized(extrinsics), np.repeat(lens[None], case.views, axis=0))
