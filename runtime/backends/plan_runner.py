"""Runs a deserialised plan of TensorRT or TensorRT-RTX: images in, outputs out.

For every batch there is one copy to the device, the network, and one copy back: the outputs lie one
behind the other in device memory. Memory is kept between batches and grows when a larger shape comes.
Where the library leaves CUDA graphs to its user (TensorRT), the second batch of a shape is captured,
copies included, and later ones replay it; TensorRT-RTX captures by itself.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backends.base import INPUT, MAX_SHAPES
from runtime.backends.cuda import Memory, Stream, destroy_graph
from runtime.errors import InferenceError
from runtime.manifest import Profile

logger = logging.getLogger(__name__)

_ALIGNMENT = 256  # bytes, of the outputs in device memory
_FLOAT = np.dtype(np.float32).itemsize


@dataclass(frozen=True)
class _Output:
    """Where one output of a bound shape lies."""

    shape: tuple[int, ...]
    offset: int


@dataclass
class _Binding:
    """An execution context and the shape it is set up for; without a shape it has to be set up again.

    A captured graph refers to the state of its context, so that no two shapes share one.
    """

    context: Any
    shape: tuple[int, ...] | None = None
    outputs: list[_Output] = field(default_factory=list)
    out_size: int = 0
    runs: int = 0
    graph: Any = None
    can_capture: bool = True

    @property
    def in_size(self) -> int:
        return math.prod(self.shape or (0,))

    def forget(self) -> None:
        """Drop the shape and the graph."""
        if self.graph is not None:
            destroy_graph(self.graph)
        self.shape, self.graph, self.runs, self.can_capture = None, None, 0, True


class PlanRunner:
    """Runs batches one after the other, whichever threads they come from.

    Parameters
    ----------
    engine : ICudaEngine
        The deserialised plan: one uint8 input ``images`` [B, H, W, 3], FP32 outputs.
    outputs : Sequence[str]
        Names of the outputs to return, in this order.
    new_context : Callable[[], IExecutionContext]
        Makes an execution context whose device memory is the runner's to give.
    captures : bool
        Whether the runner captures CUDA graphs; else the library does.
    """

    def __init__(
        self, engine: Any, outputs: Sequence[str], new_context: Callable[[], Any], captures: bool
    ) -> None:
        self._outputs = tuple(outputs)
        self._new_context: Callable[[], Any] | None = new_context
        self._captures = captures
        self._profiles = [
            Profile(*(list(dims) for dims in engine.get_tensor_profile_shape(INPUT, index)))
            for index in range(engine.num_optimization_profiles)
        ]
        self._lock = threading.Lock()
        self._bindings: dict[Hashable, _Binding] = {}  # least recently used first
        self._host_in, self._host_out = Memory(pinned=True), Memory(pinned=True)
        self._device_in, self._device_out, self._scratch = Memory(), Memory(), Memory()
        self._stream = Stream()

    def run(self, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """The outputs for a batch.

        Parameters
        ----------
        images : NDArray[np.uint8]
            [B, H, W, 3].

        Raises
        ------
        OutOfMemoryError, InferenceError
            If it cannot be run; the runner has given everything back then and can be used again.
        """
        with self._lock:
            if self._new_context is None:
                raise InferenceError("The plan has been unloaded.")
            try:
                binding = self._bound(images.shape)
                np.copyto(self._host_in.view(0, images.shape, np.uint8), images)
                self._queue(binding)
                self._stream.wait()
            except BaseException:
                self._free()
                raise
            binding.runs += 1
            host = self._host_out
            return [host.view(out.offset, out.shape, np.float32).copy() for out in binding.outputs]

    def largest_batch(self, height: int, width: int) -> int:
        """How many images of this size one of the plan's profiles takes; 0 for none."""
        return max(
            profile.maximum[0] if profile.fits((profile.maximum[0], height, width, 3)) else 0
            for profile in self._profiles
        )

    def free(self) -> None:
        """Give back all memory but the weights; the next batch takes what it needs again."""
        with self._lock:
            self._free()

    def close(self) -> None:
        """Give everything back for good, the engine too."""
        with self._lock:
            self._free()
            self._stream.close()
            self._new_context = None

    def _free(self) -> None:
        self._stream.drain()
        for binding in self._bindings.values():
            binding.forget()
        self._bindings.clear()
        for memory in self._memories:
            memory.free()

    @property
    def _memories(self) -> tuple[Memory, ...]:
        return self._host_in, self._device_in, self._host_out, self._device_out, self._scratch

    def _bound(self, shape: tuple[int, ...]) -> _Binding:
        """A binding set up for ``shape``."""
        fitting = [index for index, profile in enumerate(self._profiles) if profile.fits(shape)]
        if not fitting:
            largest = " or ".join(str(profile.maximum) for profile in self._profiles)
            raise InferenceError(f"The plan takes batches up to {largest}, not {list(shape)}.")
        profile = fitting[0]
        key: Hashable = shape if self._captures else profile
        binding = self._bindings.pop(key, None) or self._unused()
        self._bindings[key] = binding
        if binding.shape != shape:
            self._bind(binding, shape, profile)
        return binding

    def _unused(self) -> _Binding:
        if len(self._bindings) < MAX_SHAPES:
            assert self._new_context is not None
            return _Binding(self._new_context())
        oldest = self._bindings.pop(next(iter(self._bindings)))
        oldest.forget()
        return oldest

    def _bind(self, binding: _Binding, shape: tuple[int, ...], profile: int) -> None:
        binding.forget()
        context = binding.context
        if context.active_optimization_profile != profile:
            _require(context.set_optimization_profile_async(profile, self._stream.handle), "profile")
            self._stream.wait()
        _require(context.set_input_shape(INPUT, shape), "input shape")
        _require(not context.infer_shapes(), "output shapes")
        offset, outputs = 0, []
        for name in self._outputs:
            outputs.append(_Output(tuple(context.get_tensor_shape(name)), offset))
            size = math.prod(outputs[-1].shape) * _FLOAT
            offset += -(-size // _ALIGNMENT) * _ALIGNMENT
        in_size = math.prod(shape)
        # A network that needs none is given an address all the same.
        scratch_size = max(context.update_device_memory_size_for_shapes(), _ALIGNMENT)
        self._reserve((in_size, in_size, offset, offset, scratch_size))
        _require(context.set_tensor_address(INPUT, self._device_in.address), INPUT)
        for name, output in zip(self._outputs, outputs, strict=True):
            address = self._device_out.address + output.offset
            _require(context.set_tensor_address(name, address), name)
        context.set_device_memory(self._scratch.address, self._scratch.size)
        binding.shape, binding.outputs, binding.out_size = shape, outputs, offset

    def _reserve(self, sizes: tuple[int, ...]) -> None:
        """See that there is memory of these sizes."""
        wanted = list(zip(self._memories, sizes, strict=True))
        if all(size <= memory.size for memory, size in wanted):
            return
        # What is bound has the addresses.
        for binding in self._bindings.values():
            binding.forget()
        for memory, size in wanted:
            memory.reserve(size)

    def _queue(self, binding: _Binding) -> None:
        """Queue the copies and the network, as a CUDA graph from the second batch of a shape on."""
        if self._captures and binding.graph is None and binding.runs and binding.can_capture:
            try:
                binding.graph = self._stream.capture(lambda: self._queue_each(binding))
            except InferenceError as error:
                logger.info("no CUDA graph for %s: %s", binding.shape, error)
                binding.can_capture = False
        if binding.graph is not None:
            self._stream.launch(binding.graph)
        else:
            self._queue_each(binding)

    def _queue_each(self, binding: _Binding) -> None:
        self._stream.upload(self._device_in, self._host_in, binding.in_size)
        _require(binding.context.execute_async_v3(self._stream.handle), "execution")
        self._stream.download(self._host_out, self._device_out, binding.out_size)


def _require(done: bool, what: str) -> None:
    """TensorRT says by False that it refuses; why is in its log."""
    if not done:
        raise InferenceError(f"The plan's library refused: {what}.")
