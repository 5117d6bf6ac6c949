"""Inputs and outputs of the networks: names, dtypes, symbolic shapes, and the kind of their numbers.

A new output of a network is declared here: its row in :data:`OUTPUTS`, the series of networks that
has it, and its field in :class:`RawOutputs`. Predictions carry it if it is one of :data:`MAPS`.
:mod:`da3_runtime.output.encode` decides how to write it to a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IMAGES = "images"
# The view that the cameras of each scene refer to; an input of any-view graphs.
WANTED_REFERENCE = "wanted_reference"
CHOOSE = -1  # wanted reference: the network chooses
# Encodings of known cameras, zeros where they are unknown; an input of any-view graphs. Nine numbers:
# camera to world translation and quaternion (scalar last), vertical and horizontal field of view.
POSES = "poses"
POSE_ENCODING = 9
POSE_FOV = 7  # place of the vertical field of view, which no known camera has at zero
MAX_BATCH = 8  # most scenes of one batch that engines are built for
MAX_VIEWS = 16  # most views of a scene that engines are built for
MOST_VIEWS = 256  # of a scene that PyTorch or ONNX Runtime runs
PATCH = 14  # side of a patch in pixels; height and width of an input are multiples of it
RAYS_PER_PATCH = 8  # rays that the ray branch returns along each side of a patch

_MAP: tuple[int | str, ...] = ("scenes", "views", "height", "width")
_RAYS: tuple[int | str, ...] = ("scenes", "views", "ray_height", "ray_width")

# Inputs and outputs of the two series of networks, in the graph's order, and the outputs that a ray
# branch adds.
ANYVIEW_INPUTS = (IMAGES, WANTED_REFERENCE, POSES)
MONOCULAR_INPUTS = (IMAGES,)
ANYVIEW_OUTPUTS = ("depth", "confidence", "intrinsics", "extrinsics", "reference")
MONOCULAR_OUTPUTS = ("depth", "sky")
RAY_OUTPUTS = ("rays", "ray_confidence")


class OutputKind(StrEnum):
    """Kind of an output's numbers; it decides how parity measures them."""

    MAP = "map"  # one positive number per pixel
    SPARSE_MAP = "sparse map"  # one number per pixel, zero over most of a photo
    RAYS = "rays"  # direction and origin of a ray per point
    INTRINSICS = "intrinsics"
    EXTRINSICS = "extrinsics"
    VIEW = "view"  # index of one of the views


class NetworkOutput(NamedTuple):
    """Kind and shape of an output; a string in the shape is dynamic, see :func:`shapes_of`."""

    kind: OutputKind
    shape: tuple[int | str, ...]


OUTPUTS = {
    "depth": NetworkOutput(OutputKind.MAP, _MAP),
    "confidence": NetworkOutput(OutputKind.MAP, _MAP),
    "sky": NetworkOutput(OutputKind.SPARSE_MAP, _MAP),
    "intrinsics": NetworkOutput(OutputKind.INTRINSICS, ("scenes", "views", 3, 3)),
    "extrinsics": NetworkOutput(OutputKind.EXTRINSICS, ("scenes", "views", 3, 4)),
    "reference": NetworkOutput(OutputKind.VIEW, ("scenes",)),
    "rays": NetworkOutput(OutputKind.RAYS, (*_RAYS, 6)),
    "ray_confidence": NetworkOutput(OutputKind.MAP, _RAYS),
}
# Outputs with one number per pixel, beside depth.
MAPS = tuple(name for name, output in OUTPUTS.items() if output.shape == _MAP and name != "depth")


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of an engine's input or output; a string is a dynamic dimension."""

    name: str
    dtype: str
    shape: list[int | str]


INPUTS = {
    IMAGES: TensorSpec(IMAGES, "uint8", [*_MAP, 3]),
    WANTED_REFERENCE: TensorSpec(WANTED_REFERENCE, "int64", ["scenes"]),
    POSES: TensorSpec(POSES, "float32", ["scenes", "views", POSE_ENCODING]),
}


def input_specs(names: Iterable[str]) -> list[TensorSpec]:
    """Specifications of the inputs called ``names``, in that order."""
    return [INPUTS[name] for name in names]


def output_specs(names: Iterable[str]) -> list[TensorSpec]:
    """Specifications of the outputs called ``names``, in that order."""
    return [
        TensorSpec(
            name,
            "int64" if OUTPUTS[name].kind is OutputKind.VIEW else "float32",
            list(OUTPUTS[name].shape),
        )
        for name in names
    ]


def shapes_of(specs: Iterable[TensorSpec], images: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of inputs or outputs for images of shape ``images``, [B, S, H, W, 3], in pixels."""
    scenes, views, height, width, _ = images
    sizes = {
        "scenes": scenes,
        "views": views,
        "height": height,
        "width": width,
        "ray_height": RAYS_PER_PATCH * height // PATCH,
        "ray_width": RAYS_PER_PATCH * width // PATCH,
    }
    return [
        tuple(sizes[side] if isinstance(side, str) else side for side in spec.shape) for spec in specs
    ]


class Conditions(NamedTuple):
    """What is wanted or known of each scene of a batch, beside its images.

    Attributes
    ----------
    reference : NDArray[np.int64]
        Index of the view that the cameras refer to, or :data:`CHOOSE`, [B].
    poses : NDArray[np.float32]
        Encodings of known cameras, [B, S, 9]; zeros for a scene whose cameras are unknown.
    """

    reference: NDArray[np.int64]
    poses: NDArray[np.float32]

    @classmethod
    def none(cls, scenes: int, views: int) -> Conditions:
        """Nothing is known, and the network chooses."""
        import numpy as np

        return cls(
            np.full(scenes, CHOOSE, np.int64), np.zeros((scenes, views, POSE_ENCODING), np.float32)
        )

    @classmethod
    def joined(cls, parts: Sequence[Conditions]) -> Conditions:
        """The conditions of several batches as one."""
        import numpy as np

        return cls(
            np.concatenate([part.reference for part in parts]),
            np.concatenate([part.poses for part in parts]),
        )

    def scene(self, index: int) -> Conditions:
        """One scene's share, as a batch of one scene."""
        one = slice(index, index + 1)
        return Conditions(self.reference[one], self.poses[one])


def inputs_of(
    names: Iterable[str], images: NDArray[np.uint8], conditions: Conditions | None = None
) -> dict[str, NDArray[Any]]:
    """The values of a graph's inputs called ``names``, in that order.

    Parameters
    ----------
    images : NDArray[np.uint8]
        [B, S, H, W, 3].
    conditions : Conditions | None
        What is wanted or known of the scenes; None is nothing.
    """
    reference, poses = conditions or Conditions.none(*images.shape[:2])
    values: dict[str, NDArray[Any]] = {IMAGES: images, WANTED_REFERENCE: reference, POSES: poses}
    return {name: values[name] for name in names}


class RawOutputs(NamedTuple):
    """A graph's outputs for a batch of scenes; an output that the graph lacks is None.

    Attributes
    ----------
    depth : NDArray[np.float32]
        [B, S, H, W]; larger is farther.
    confidence : NDArray[np.float32] | None
        [B, S, H, W], confidence of depth, 1 and more.
    sky : NDArray[np.float32] | None
        [B, S, H, W], sky score, 0 and more; upstream calls a pixel sky from 0.3 on.
    intrinsics : NDArray[np.float32] | None
        [B, S, 3, 3], in pixels of the model's input.
    extrinsics : NDArray[np.float32] | None
        [B, S, 3, 4], world to camera.
    rays : NDArray[np.float32] | None
        [B, S, 8 H / 14, 8 W / 14, 6], direction and origin of rays spread evenly over the image.
    ray_confidence : NDArray[np.float32] | None
        [B, S, 8 H / 14, 8 W / 14], 1 and more.
    reference : NDArray[np.int64] | None
        [B], index of the view that a scene's cameras refer to.
    """

    depth: NDArray[np.float32]
    confidence: NDArray[np.float32] | None = None
    sky: NDArray[np.float32] | None = None
    intrinsics: NDArray[np.float32] | None = None
    extrinsics: NDArray[np.float32] | None = None
    rays: NDArray[np.float32] | None = None
    ray_confidence: NDArray[np.float32] | None = None
    reference: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, names: Sequence[str], values: Sequence[NDArray[Any]]) -> RawOutputs:
        """Outputs from a graph's output ``names`` and the values in the same order."""
        return cls(**dict(zip(names, values, strict=True)))

    @classmethod
    def joined(cls, parts: Sequence[RawOutputs]) -> RawOutputs:
        """Concatenate the outputs of several batches of one graph."""
        import numpy as np

        columns = zip(cls._fields, zip(*parts, strict=True), strict=True)
        return cls(**{name: np.concatenate(values) for name, values in columns if values[0] is not None})

    def scene(self, index: int) -> RawOutputs:
        """One scene's share of the outputs: each without the dimension of scenes."""
        return RawOutputs(*(None if value is None else value[index] for value in self))  # type: ignore[arg-type]
