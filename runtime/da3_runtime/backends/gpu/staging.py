"""Buffers for a batch in pinned host memory and in device memory: one copy each way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from da3_runtime.backends.gpu.cuda import Memory, Stream
from da3_runtime.network_io import TensorSpec, shapes_of

_ALIGNMENT = 256  # bytes, of each tensor


class Tensor(NamedTuple):
    """Shape and dtype of an input or output, and its offset in the buffer in bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int = 0


class Layout(NamedTuple):
    """Sizes of a batch's buffers, and the positions of its inputs and outputs.

    Attributes
    ----------
    in_size, out_size : int
        Bytes of all inputs and of all outputs.
    inputs, outputs : list[Tensor]
        In the order of the graph's.
    """

    in_size: int
    out_size: int
    inputs: list[Tensor]
    outputs: list[Tensor]


def tensors_of(specs: Sequence[TensorSpec], images: Sequence[int]) -> list[Tensor]:
    """Inputs or outputs for images of shape [B, S, H, W, 3]."""
    shapes = shapes_of(specs, images)
    return [Tensor(shape, np.dtype(spec.dtype)) for spec, shape in zip(specs, shapes, strict=True)]


def lay_out(inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> Layout:
    """Layout of a batch; the given offsets do not count."""
    placed_in, in_size = _place(inputs)
    placed_out, out_size = _place(outputs)
    return Layout(in_size, out_size, placed_in, placed_out)


def _place(tensors: Iterable[Tensor]) -> tuple[list[Tensor], int]:
    """The tensors one after another, and the bytes that they take."""
    offset, placed = 0, []
    for tensor in tensors:
        placed.append(tensor._replace(offset=offset))
        offset += -(-math.prod(tensor.shape) * tensor.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return placed, offset


class Staging:
    """Buffers for a batch's inputs and outputs, on host and device; they grow and never shrink."""

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

    def put(self, layout: Layout, inputs: Iterable[NDArray[Any]]) -> None:
        """Copy the inputs to their buffer. The previous upload must be done."""
        for tensor, values in zip(layout.inputs, inputs, strict=True):
            np.copyto(self._host_in.view(tensor.offset, tensor.shape, tensor.dtype), values)

    def upload(self, stream: Stream, layout: Layout) -> None:
        """Queue the copy of the inputs to the device."""
        stream.upload(self.device_in, self._host_in, layout.in_size)

    def download(self, stream: Stream, layout: Layout) -> None:
        """Queue the copy of the outputs to the host."""
        stream.download(self._host_out, self.device_out, layout.out_size)

    def take(self, outputs: Sequence[Tensor]) -> list[NDArray[Any]]:
        """Copies of the outputs of the last download, which must be done."""
        return [self._host_out.view(out.offset, out.shape, out.dtype).copy() for out in outputs]

    def free(self) -> None:
        """Free the buffers."""
        for memory in (self._host_in, self.device_in, self._host_out, self.device_out):
            memory.free()
