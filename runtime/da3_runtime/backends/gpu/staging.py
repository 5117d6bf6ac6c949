"""Input and outputs of a batch, in pinned memory of the host and in the device's: one copy each way."""

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
    """Where one output lies: its shape, and the byte it begins at."""

    shape: tuple[int, ...]
    offset: int


class Layout(NamedTuple):
    """A batch's input and outputs, FP32, one behind the other.

    Attributes
    ----------
    in_size, out_size : int
        Bytes.
    outputs : list[Output]
        In the order in which they are returned.
    """

    in_size: int
    out_size: int
    outputs: list[Output]


def lay_out(images: tuple[int, ...], outputs: Iterable[tuple[int, ...]]) -> Layout:
    """The layout of a batch of uint8 ``images`` and of FP32 ``outputs`` of these shapes."""
    offset, placed = 0, []
    for shape in outputs:
        placed.append(Output(shape, offset))
        offset += -(-math.prod(shape) * _FLOAT // _ALIGNMENT) * _ALIGNMENT
    return Layout(math.prod(images), offset, placed)


class Staging:
    """The memory of a batch on its way, which only grows."""

    def __init__(self) -> None:
        self._host_in, self._host_out = Memory(pinned=True), Memory(pinned=True)
        self.device_in, self.device_out = Memory(), Memory()

    def has_room(self, layout: Layout) -> bool:
        """Whether :meth:`reserve` would move nothing."""
        return layout.in_size <= self.device_in.size and layout.out_size <= self.device_out.size

    def reserve(self, layout: Layout) -> None:
        """Have room for a batch; nothing may be using what was there.

        Raises
        ------
        OutOfMemoryError
            If there is none.
        """
        for memory in (self._host_in, self.device_in):
            memory.reserve(layout.in_size)
        for memory in (self._host_out, self.device_out):
            memory.reserve(layout.out_size)

    def put(self, images: NDArray[np.uint8]) -> None:
        """Have the next upload send these images, [B, H, W, 3]; the one before must be done."""
        np.copyto(self._host_in.view(0, images.shape, np.uint8), images)

    def upload(self, stream: Stream, layout: Layout) -> None:
        """Queue the input's copy to the device."""
        stream.upload(self.device_in, self._host_in, layout.in_size)

    def download(self, stream: Stream, layout: Layout) -> None:
        """Queue the outputs' copy to the host."""
        stream.download(self._host_out, self.device_out, layout.out_size)

    def take(self, outputs: Sequence[Output]) -> list[NDArray[np.float32]]:
        """Copies of the outputs that the last download brought; it must be done."""
        return [self._host_out.view(out.offset, out.shape, np.float32).copy() for out in outputs]

    def free(self) -> None:
        """Give everything back."""
        for memory in (self._host_in, self.device_in, self._host_out, self.device_out):
            memory.free()
