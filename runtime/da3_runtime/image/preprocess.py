"""RGB array -> the model's input, equal to upstream's to the byte.

Source: ``InputProcessor`` in upstream's ``depth_anything_3/utils/io/input_processor.py``, method
``upper_bound_resize``. The engine takes bytes and does upstream's ToTensor and Normalize itself.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import ImageError, SettingError
from da3_runtime.variants import MAX_SIDE, MIN_SIDE, PATCH


def nearest_multiple(side: int, multiple: int = PATCH) -> int:
    """The multiple of ``multiple`` nearest to ``side``; the larger one on a tie."""
    down = side // multiple * multiple
    up = down + multiple
    return up if up - side <= side - down else down


def bounded_size(width: int, height: int, processing_res: int) -> tuple[int, int]:
    """Width and height after the first resize: longest side ``processing_res``, same aspect ratio."""
    longest = max(width, height)
    if longest == processing_res:
        return width, height
    scale = processing_res / float(longest)
    return max(1, round(width * scale)), max(1, round(height * scale))


def divisible_size(width: int, height: int) -> tuple[int, int]:
    """Width and height rounded to multiples of 14; 1 instead of 0, as upstream does."""
    return max(1, nearest_multiple(width)), max(1, nearest_multiple(height))


def resize_to_input(rgb: NDArray[np.uint8], processing_res: int = 504) -> NDArray[np.uint8]:
    """Resize an image so that its longest side is ``processing_res``, then to multiples of 14.

    Parameters
    ----------
    rgb : NDArray[np.uint8]
        [H, W, 3].
    processing_res : int
        Longest side before rounding, in pixels.

    Returns
    -------
    NDArray[np.uint8]
        [h, w, 3], contiguous.
    """
    height, width = rgb.shape[:2]
    bounded = bounded_size(width, height, processing_res)
    if bounded != (width, height):
        rgb = _resize(rgb, bounded, processing_res > max(width, height))
    divisible = divisible_size(*bounded)
    if divisible != bounded:
        rgb = _resize(rgb, divisible, divisible[0] > bounded[0] or divisible[1] > bounded[1])
    return np.ascontiguousarray(rgb)


def _resize(rgb: NDArray[np.uint8], size: tuple[int, int], enlarge: bool) -> NDArray[np.uint8]:
    interpolation = cv2.INTER_CUBIC if enlarge else cv2.INTER_AREA
    return np.asarray(cv2.resize(rgb, size, interpolation=interpolation), dtype=np.uint8)


def fitting_resolution(width: int, height: int, processing_res: int) -> int:
    """``processing_res``, raised as far as the short side of the network's input needs it.

    Raises
    ------
    SettingError
        If ``processing_res`` rounds to a side above :data:`MAX_SIDE`.
    ImageError
        If the short side would be below :data:`MIN_SIDE` even at :data:`MAX_SIDE`.
    """
    if nearest_multiple(processing_res) > MAX_SIDE:
        raise SettingError(
            f"processing_res {processing_res} is too large for the engine: send at most {MAX_SIDE}."
        )
    for longest in range(processing_res, MAX_SIDE + 1):
        if min(divisible_size(*bounded_size(width, height, longest))) >= MIN_SIDE:
            return longest
    new_width, new_height = divisible_size(*bounded_size(width, height, MAX_SIDE))
    raise ImageError(
        f"The image of {width} x {height} pixels is too elongated: at the largest processing_res, "
        f"{MAX_SIDE}, it becomes {new_width} x {new_height}; both sides must be at least {MIN_SIDE}. "
        "Crop it."
    )


def model_input(rgb: NDArray[np.uint8], processing_res: int = 504) -> NDArray[np.uint8]:
    """The engine's input for one photo: :func:`resize_to_input` at the :func:`fitting_resolution`.

    Returns
    -------
    NDArray[np.uint8]
        [1, 1, h, w, 3], a scene of one view.

    Raises
    ------
    SettingError, ImageError
        As :func:`fitting_resolution`.
    """
    height, width = rgb.shape[:2]
    return resize_to_input(rgb, fitting_resolution(width, height, processing_res))[None, None]
