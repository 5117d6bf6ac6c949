"""Inputs that parity is measured on: real photographs in several shapes and batch sizes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from da3_export.photos import read_photo
from da3_runtime.errors import ParityError

SHAPES = ((364, 504), (504, 280), (504, 504), (84, 1036))
BATCHES = (1, 3)
# For models with more than 500 million parameters: fewer and smaller, to keep the check affordable.
LARGE_SHAPES = ((84, 140), (140, 98), (280, 378))
LARGE_BATCHES = (1, 2)
PHOTOS = Path(__file__).resolve().parent / "samples"


class Case(NamedTuple):
    """One input shape: height and width in pixels, images in the batch."""

    height: int
    width: int
    batch: int


def all_cases(large: bool) -> list[Case]:
    """Cases of a model: every shape with every batch size, in that order.

    For ``large`` models the largest shape is measured with one image only.
    """
    if not large:
        return [Case(height, width, batch) for height, width in SHAPES for batch in BATCHES]
    *small, (height, width) = LARGE_SHAPES
    return [Case(h, w, b) for h, w in small for b in LARGE_BATCHES] + [Case(height, width, 1)]


def case_images(case: Case) -> NDArray[np.uint8]:
    """Photographs resized to the case's shape, uint8 [B, H, W, 3].

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
    resized = [cv2.resize(rgb, size, interpolation=cv2.INTER_AREA) for rgb in chosen]
    return np.stack([np.asarray(image, np.uint8) for image in resized])
