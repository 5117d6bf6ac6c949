"""Inputs and outputs of the networks: names, dtypes, symbolic shapes, and the kind of their numbers.

A new output of a network is declared here: its row in :data:`OUTPUTS`, the series of networks that
has it, and its field in :class:`RawOutputs`. Predictions carry it if it is one of :data:`MAPS`.
:mod:`da3_runtime.output.encode` decides how to write it to a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

INPUT = "images"  # name of every graph's only input
MAX_BATCH = 8  # largest batch that engines are built for
PATCH = 14  # side of a patch in pixels; height and width of an input are multiples of it
RAYS_PER_PATCH = 8  # rays that the ray branch returns along each side of a patch

INPUT_DTYPE, OUTPUT_DTYPE = "uint8", "float32"
_MAP: tuple[int | str, ...] = ("batch", "height", "width")
_RAYS: tuple[int | str, ...] = ("batch", "ray_height", "ray_width")

# Outputs of the two series of networks, in the graph's order, and those that a ray branch adds.
ANYVIEW_OUTPUTS = ("depth", "confidence", "intrinsics", "extrinsics")
MONOCULAR_OUTPUTS = ("depth", "sky")
RAY_OUTPUTS = ("rays", "ray_confidence")


class OutputKind(StrEnum):
    """Kind of an output's numbers; it decides how parity measures them."""

    MAP = "map"  # one positive number per pixel
    SPARSE_MAP = "sparse map"  # one number per pixel, zero over most of a photo
    RAYS = "rays"  # direction and origin of a ray per point
    INTRINSICS = "intrinsics"
    EXTRINSICS = "extrinsics"


class NetworkOutput(NamedTuple):
    """Kind and shape of an output; a string in the shape is dynamic, see :func:`shapes_of`."""

    kind: OutputKind
    shape: tuple[int | str, ...]


OUTPUTS = {
    "depth": NetworkOutput(OutputKind.MAP, _MAP),
    "confidence": NetworkOutput(OutputKind.MAP, _MAP),
    "sky": NetworkOutput(OutputKind.SPARSE_MAP, _MAP),
    "intrinsics": NetworkOutput(OutputKind.INTRINSICS, ("batch", 3, 3)),
    "extrinsics": NetworkOutput(OutputKind.EXTRINSICS, ("batch", 3, 4)),
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


INPUTS = [TensorSpec(INPUT, INPUT_DTYPE, [*_MAP, 3])]


def output_specs(names: Iterable[str]) -> list[TensorSpec]:
    """Specifications of the outputs called ``names``, in that order."""
    return [TensorSpec(name, OUTPUT_DTYPE, list(OUTPUTS[name].shape)) for name in names]


def shapes_of(outputs: Iterable[TensorSpec], images: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of outputs for an input of shape ``images``, [B, H, W, 3], in pixels."""
    batch, height, width, _ = images
    sizes = {
        "batch": batch,
        "height": height,
        "width": width,
        "ray_height": RAYS_PER_PATCH * height // PATCH,
        "ray_width": RAYS_PER_PATCH * width // PATCH,
    }
    return [
        tuple(sizes[side] if isinstance(side, str) else side for side in spec.shape) for spec in outputs
    ]


class RawOutputs(NamedTuple):
    """A graph's outputs for a batch, FP32; an output that the graph lacks is None.

    Attributes
    ----------
    depth : NDArray[np.float32]
        [B, H, W]; larger is farther.
    confidence : NDArray[np.float32] | None
        [B, H, W], confidence of depth, 1 and more.
    sky : NDArray[np.float32] | None
        [B, H, W], sky score, 0 and more; upstream calls a pixel sky from 0.3 on.
    intrinsics : NDArray[np.float32] | None
        [B, 3, 3], in pixels of the model's input.
    extrinsics : NDArray[np.float32] | None
        [B, 3, 4], world to camera.
    rays : NDArray[np.float32] | None
        [B, 8 H / 14, 8 W / 14, 6], direction and origin of rays spread evenly over the image.
    ray_confidence : NDArray[np.float32] | None
        [B, 8 H / 14, 8 W / 14], 1 and more.
    """

    depth: NDArray[np.float32]
    confidence: NDArray[np.float32] | None = None
    sky: NDArray[np.float32] | None = None
    intrinsics: NDArray[np.float32] | None = None
    extrinsics: NDArray[np.float32] | None = None
    rays: NDArray[np.float32] | None = None
    ray_confidence: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, names: Sequence[str], values: Sequence[NDArray[np.float32]]) -> RawOutputs:
        """Outputs from a graph's output ``names`` and the values in the same order."""
        return cls(**dict(zip(names, values, strict=True)))

    @classmethod
    def joined(cls, parts: Sequence[RawOutputs]) -> RawOutputs:
        """Concatenate the outputs of several batches of one graph."""
        import numpy as np

        columns = zip(cls._fields, zip(*parts, strict=True), strict=True)
        return cls(**{name: np.concatenate(values) for name, values in columns if values[0] is not None})
