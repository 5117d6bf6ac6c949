"""Buffers for a batch in pinned host memory and in device memory: one copy each way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.backends.gpu.cuda import Memory, Stream

_ALIGNMENT = 256  # bytes, of each output
_FLOAT = np.dtype(np.float32).itemsize


class Output(NamedTuple):
    """Shape of an output, and its offset in the buffer in bytes."""

    shape: tuple[int, ...]
    offset: int


class Layout(NamedTuple):
    """Sizes of a batch's buffers, and the positions of its FP32 outputs.

    Attributes
    ----------
    in_size, out_size : int
        Bytes of the input and of all outputs.
    outputs : list[Output]
        In the order of the graph's outputs.
    """

    in_size: int
    out_size: int
    outputs: list[Output]


def lay_out(images: tuple[int, ...], outputs: Iterable[tuple[int, ...]]) -> Layout:
    """Layout for uint8 images of shape ``images`` and FP32 outputs of shapes ``outputs``."""
    offset, placed = 0, []
    for shape in outputs:
        placed.append(Output(shape, offset))
        offset += -(-math.prod(shape) * _FLOAT // _ALIGNMENT) * _ALIGNMENT
    return Layout(math.prod(images), offset, placed)


class Staging:
    """Buffers for a batch's input and outputs, on host and device; they grow and never shrink."""

    def __init__(self) -> None:
        self._host_in, self._host_out = Memory(pinned=True), Memory(pinned=True)
        self.device_in, self.device_out = Memory(), Memory()

    def has_room(self, layout: Layout) -> bool:
        """Whether the device buffers are large enough for a batch."""
        return layout.in_size <= self.device_in.size and layout.out_size <= self.device_out.size

    def reserve(self, layout: Layout) -> None:
        """Make the buffers large enough for a batch; nothing may be using them.

        Raises
        ------
        OutOfMemoryError
            If not enough memory is free.
        """
        for memory in (self._host_in, self.device_in):
            memory.reserve(layout.in_size)
        for memory in (self._host_out, self.device_out):
            memory.reserve(layout.out_size)

    def put(self, images: NDArray[np.uint8]) -> None:
        """Copy images, [B, H, W, 3], to the input buffer. The previous upload must be done."""
        np.copyto(self._host_in.view(0, images.shape, np.uint8), images)

    def upload(self, stream: Stream, layout: Layout) -> None:
        """Queue the copy of the input to the device."""
        stream.upload(self.device_in, self._host_in, layout.in_size)

    def download(self, stream: Stream, layout: Layout) -> None:
        """Queue the copy of the outputs to the host."""
        stream.download(self._host_out, self.device_out, layout.out_size)

    def take(self, outputs: Sequence[Output]) -> list[NDArray[np.float32]]:
        """Copies of the outputs of the last download, which must be done."""
        return [self._host_out.view(out.offset, out.shape, np.float32).copy() for out in outputs]

    def free(self) -> None:
        """Free the buffers."""
        for memory in (self._host_in, self.device_in, self._host_out, self.device_out):
            memory.free()
