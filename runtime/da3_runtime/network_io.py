"""Input and outputs of the networks: names, dtypes, symbolic shapes, and what their numbers are.

A new output of a network starts here; :mod:`da3_runtime.output.encode` makes a file of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

INPUT = "images"  # name of every graph's input
MAX_BATCH = 8  # images of a batch that engines are built for

_SYMBOLS: tuple[int | str, ...] = ("batch", "height", "width")

# Outputs of the two series of networks, in order, and what a ray branch adds.
ANYVIEW_OUTPUTS = ("depth", "confidence", "intrinsics", "extrinsics")
MONOCULAR_OUTPUTS = ("depth", "sky")
RAY_OUTPUTS = ("rays", "ray_confidence")


class OutputKind(StrEnum):
    """What the numbers of an output are; it decides how parity measures them."""

    MAP = "map"  # one positive number per pixel
    SPARSE_MAP = "sparse map"  # one number per pixel, zero over most of a photo
    RAYS = "rays"  # direction and origin of a ray per point
    INTRINSICS = "intrinsics"
    EXTRINSICS = "extrinsics"


class NetworkOutput(NamedTuple):
    """Kind and shape of an output; a string in the shape is a dynamic dimension."""

    kind: OutputKind
    shape: tuple[int | str, ...]


OUTPUTS = {
    "depth": NetworkOutput(OutputKind.MAP, _SYMBOLS),
    "confidence": NetworkOutput(OutputKind.MAP, _SYMBOLS),
    "sky": NetworkOutput(OutputKind.SPARSE_MAP, _SYMBOLS),
    "intrinsics": NetworkOutput(OutputKind.INTRINSICS, ("batch", 3, 3)),
    "extrinsics": NetworkOutput(OutputKind.EXTRINSICS, ("batch", 3, 4)),
    "rays": NetworkOutput(OutputKind.RAYS, ("batch", "ray_height", "ray_width", 6)),
    "ray_confidence": NetworkOutput(OutputKind.MAP, ("batch", "ray_height", "ray_width")),
}


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of an engine's input or output; a string is a dynamic dimension."""

    name: str
    dtype: str
    shape: list[int | str]


INPUTS = [TensorSpec(INPUT, "uint8", [*_SYMBOLS, 3])]


def output_specs(names: Iterable[str]) -> list[TensorSpec]:
    """Dtype and shape of the outputs called ``names``."""
    return [TensorSpec(name, "float32", list(OUTPUTS[name].shape)) for name in names]


class RawOutputs(NamedTuple):
    """One graph's outputs for a batch, FP32; which there are is the graph's choice.

    Attributes
    ----------
    depth : NDArray[np.float32]
        [B, H, W].
    confidence, sky : NDArray[np.float32] | None
        [B, H, W].
    intrinsics : NDArray[np.float32] | None
        [B, 3, 3], pixels of the model's input.
    extrinsics : NDArray[np.float32] | None
        [B, 3, 4], world to camera.
    rays : NDArray[np.float32] | None
        [B, 8 grid_h, 8 grid_w, 6], direction and origin of rays spread over the image.
    ray_confidence : NDArray[np.float32] | None
        [B, 8 grid_h, 8 grid_w], 1 and more.
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
        """The outputs that a graph gives in the order of its output ``names``."""
        return cls(**dict(zip(names, values, strict=True)))

    @classmethod
    def joined(cls, parts: Sequence[RawOutputs]) -> RawOutputs:
        """The outputs of several batches as those of one."""
        import numpy as np

        columns = zip(cls._fields, zip(*parts, strict=True), strict=True)
        return cls(**{name: np.concatenate(values) for name, values in columns if values[0] is not None})
