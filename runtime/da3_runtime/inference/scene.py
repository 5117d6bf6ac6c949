"""Several photos of one scene: what the network sees of each, and which one is the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import SceneTooLargeError, SettingError
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.network_io import CHOOSE
from da3_runtime.postprocess.camera import Camera, Lens, move_center
from da3_runtime.postprocess.depth import Prediction

AUTO, FIRST, MIDDLE = "auto", "first", "middle"


class Crop(NamedTuple):
    """The part of a network input that a scene uses, in pixels of that input."""

    left: int
    top: int
    width: int
    height: int

    def of(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The part of an input [h, w, 3]."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class View:
    """One photo of a scene.

    Attributes
    ----------
    prediction : Prediction
        Depth, camera and maps of the part of the photo that the scene uses.
    left, top : float
        Left upper corner of that part, in pixels of the maps; 0 unless the photo was cropped.
    width, height : int
        Size of the whole photo in pixels of the maps.
    """

    prediction: Prediction
    left: float
    top: float
    width: int
    height: int

    @property
    def camera(self) -> Camera | None:
        """The camera with intrinsics in pixels of the whole photo."""
        camera = self.prediction.camera
        if camera is None:
            return None
        return camera._replace(intrinsics=move_center(camera.intrinsics, self.left, self.top))


class SceneEstimate(NamedTuple):
    """The views of a scene in the order of its photos, and the index of the reference view.

    The reference is None if the model sees each photo alone.
    """

    views: list[View]
    reference: int | None


def reference_index(reference: str | int, views: int) -> int:
    """The index of the wanted reference view, or :data:`CHOOSE`.

    Parameters
    ----------
    reference : str | int
        ``auto``, ``first``, ``middle``, or an index from 0.

    Raises
    ------
    SettingError
        If it is none of these.
    """
    named = {AUTO: CHOOSE, FIRST: 0, MIDDLE: views // 2}
    text = str(reference).strip().lower()
    index = named.get(text, int(text) if text.isdecimal() else views)
    if index >= views or isinstance(reference, bool):
        known = ", ".join(named)
        raise SettingError(
            f"reference {reference!r} is not one of: {known}, or an index from 0 to {views - 1}."
        )
    return index


def common_crops(sizes: Sequence[tuple[int, int]]) -> list[Crop]:
    """The middle of each input that all inputs have in size, as upstream crops them.

    Parameters
    ----------
    sizes : Sequence[tuple[int, int]]
        Width and height of each input, multiples of 14.
    """
    width, height = (min(sides) for sides in zip(*sizes, strict=True))
    return [Crop((w - width) // 2, (h - height) // 2, width, height) for w, h in sizes]


def known_cameras(lenses: Sequence[Lens | None], extrinsics: NDArray[np.floating]) -> list[Camera]:
    """The known camera of each view, from its lens in pixels of the network's input and its pose.

    Raises
    ------
    SettingError
        If a view has no lens.
    """
    for index, lens in enumerate(lenses):
        if lens is None:
            raise SettingError(
                f"images[{index}]: extrinsics need intrinsics or focal_length_px of the same photo."
            )
    return [
        Camera(lens.intrinsics, pose)
        for lens, pose in zip(lenses, extrinsics, strict=True)
        if lens is not None
    ]


def check_scene(loaded: Loaded, views: int, height: int, width: int) -> None:
    """Check that a model can run a scene at once.

    Raises
    ------
    SceneTooLargeError
        If it has too many views of this size.
    """
    if loaded.largest_batch(views, height, width):
        return
    fewer = range(views - 1, 0, -1)
    most = next((count for count in fewer if loaded.largest_batch(count, height, width)), 0)
    raise SceneTooLargeError(
        f"The scene has {views} views of {width} x {height} pixels, and {loaded.backend.name} takes at "
        f"most {most} of this size: send fewer photos, or a smaller processing_res."
    )
