"""Runs a deserialized plan of TensorRT or TensorRT-RTX: images in, outputs out.

A batch is one copy to the device, the network, and one copy back: the outputs are adjacent in device
memory. Memory is reused between batches and grows for a larger shape. For TensorRT the second batch of a
shape is captured as a CUDA graph, copies included, and later ones replay it; TensorRT-RTX captures by
itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from da3_runtime.backends.base import MAX_SHAPES
from da3_runtime.backends.gpu.capture_gate import GATE
from da3_runtime.backends.gpu.cuda import Memory, Stream, destroy_graph
from da3_runtime.backends.gpu.staging import Layout, Staging, Tensor, lay_out, tensors_of
from da3_runtime.errors import InferenceError
from da3_runtime.network_io import IMAGES, TensorSpec
from da3_runtime.store.manifest import Profile

logger = logging.getLogger(__name__)

_MIN_SCRATCH = 256  # bytes: even a network without scratch memory must get an address
_EMPTY = Layout(0, 0, [], [])


@dataclass
class _Binding:
    """An execution context and the shape that it is set up for; None means that it must be set up again.

    A captured graph refers to the state of its context, so two shapes with graphs never share a context.
    """

    context: Any
    shape: tuple[int, ...] | None = None
    layout: Layout = _EMPTY
    runs: int = 0
    graph: Any = None
    can_capture: bool = True

    def forget(self) -> None:
        """Drop the shape and the graph."""
        if self.graph is not None:
            destroy_graph(self.graph)
        self.shape, self.graph, self.runs, self.can_capture = None, None, 0, True


class PlanRunner:
    """Runs one batch at a time; any thread may call it.

    Parameters
    ----------
    engine : ICudaEngine
        The deserialized plan.
    inputs, outputs : Sequence[TensorSpec]
        Its inputs, images [B, S, H, W, 3] among them, and its outputs, in the order of :meth:`run`'s.
    new_context : Callable[[], IExecutionContext]
        Creates an execution context; the runner provides its device memory.
    captures : bool
        Whether the runner captures CUDA graphs; if not, the library does.
    """

    def __init__(
        self,
        engine: Any,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        new_context: Callable[[], Any],
        captures: bool,
    ) -> None:
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._new_context: Callable[[], Any] | None = new_context
        self._captures = captures
        self._profiles = [
            Profile(*(list(dims) for dims in engine.get_tensor_profile_shape(IMAGES, index)))
            for index in range(engine.num_optimization_profiles)
        ]
        self._lock = threading.Lock()
        self._bindings: dict[Hashable, _Binding] = {}  # least recently used first
        self._staging = Staging()
        self._scratch = Memory()
        self._stream = Stream()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run a batch.

        Parameters
        ----------
        inputs : Mapping[str, NDArray]
            The inputs by name, in their order.

        Returns
        -------
        list[NDArray]
            The outputs, in their order.

        Raises
        ------
        OutOfMemoryError, InferenceError
            If the batch cannot be run. The runner has released its memory then and can be used again.
        """
        with self._lock:
            if self._new_context is None:
                raise InferenceError("The plan has been unloaded.")
            try:
                binding = self._bound(inputs[IMAGES].shape)
                self._staging.put(binding.layout, inputs.values())
                self._queue(binding)
                self._stream.wait()
            except BaseException:
                self._free()
                raise
            binding.runs += 1
            return self._staging.take(binding.layout.outputs)

    def largest_batch(self, views: int, height: int, width: int) -> int:
        """Largest batch of scenes of this shape that a profile accepts; 0 if none does."""
        return max(
            profile.maximum[0] if profile.fits((profile.maximum[0], views, height, width, 3)) else 0
            for profile in self._profiles
        )

    def free(self) -> None:
        """Release all memory but the weights; the next batch allocates again."""
        with self._lock:
            self._free()

    def close(self) -> None:
        """Release everything, the engine too. The runner cannot be used afterwards."""
        with self._lock:
            self._free()
            self._stream.close()
            self._new_context = None

    def _free(self) -> None:
        self._stream.drain()
        for binding in self._bindings.values():
            binding.forget()
        self._bindings.clear()
        self._staging.free()
        self._scratch.free()

    def _bound(self, shape: tuple[int, ...]) -> _Binding:
        """A binding set up for ``shape``."""
        fitting = [index for index, profile in enumerate(self._profiles) if profile.fits(shape)]
        if not fitting:
            largest = " or ".join(str(profile.maximum) for profile in self._profiles)
            raise InferenceError(f"The plan accepts batches up to {largest}, not {list(shape)}.")
        profile = fitting[0]
        key: Hashable = shape if self._captures else profile
        binding = self._bindings.pop(key, None) or self._unused_binding()
        self._bindings[key] = binding
        if binding.shape != shape:
            self._bind(binding, shape, profile)
        return binding

    def _unused_binding(self) -> _Binding:
        """A new binding, or the least recently used one if there are :data:`MAX_SHAPES`."""
        if len(self._bindings) < MAX_SHAPES:
            assert self._new_context is not None
            return _Binding(self._new_context())
        return self._bindings.pop(next(iter(self._bindings)))

    def _bind(self, binding: _Binding, shape: tuple[int, ...], profile: int) -> None:
        binding.forget()
        context = binding.context
        if context.active_optimization_profile != profile:
            _require(context.set_optimization_profile_async(profile, self._stream.handle), "profile")
            self._stream.wait()
        inputs = tensors_of(self._inputs, shape)
        for spec, tensor in zip(self._inputs, inputs, strict=True):
            _require(context.set_input_shape(spec.name, tensor.shape), "input shape")
        _require(not context.infer_shapes(), "output shapes")
        layout = lay_out(
            inputs,
            (
                Tensor(tuple(context.get_tensor_shape(spec.name)), np.dtype(spec.dtype))
                for spec in self._outputs
            ),
        )
        scratch_size = max(context.update_device_memory_size_for_shapes(), _MIN_SCRATCH)
        self._reserve(layout, scratch_size)
        for specs, tensors, memory in (
            (self._inputs, layout.inputs, self._staging.device_in),
            (self._outputs, layout.outputs, self._staging.device_out),
        ):
            for spec, tensor in zip(specs, tensors, strict=True):
                address = memory.address + tensor.offset
                _require(context.set_tensor_address(spec.name, address), spec.name)
        context.set_device_memory(self._scratch.address, self._scratch.size)
        binding.shape, binding.layout = shape, layout

    def _reserve(self, layout: Layout, scratch_size: int) -> None:
        """Allocate the memory for a batch, if it does not fit."""
        if self._staging.has_room(layout) and scratch_size <= self._scratch.size:
            return
        # Memory will move, and every context and graph refers to its addresses.
        for binding in self._bindings.values():
            binding.forget()
        self._staging.reserve(layout)
        self._scratch.reserve(scratch_size)

    def _queue(self, binding: _Binding) -> None:
        """Queue the copies and the network; from the second batch of a shape on, as a CUDA graph."""
        if self._captures and binding.graph is None and binding.runs and binding.can_capture:
            with GATE.capture() as may_capture:
                if may_capture:
                    self._capture(binding)
        if binding.graph is not None:
            self._stream.launch(binding.graph)
        else:
            self._queue_each(binding)

    def _capture(self, binding: _Binding) -> None:
        try:
            binding.graph = self._stream.capture(lambda: self._queue_each(binding))
        except InferenceError as error:
            logger.info("no CUDA graph for %s: %s", binding.shape, error)
            binding.can_capture = False

    def _queue_each(self, binding: _Binding) -> None:
        self._staging.upload(self._stream, binding.layout)
        _require(binding.context.execute_async_v3(self._stream.handle), "execution")
        self._staging.download(self._stream, binding.layout)


def _require(done: bool, what: str) -> None:
    """Raise if a TensorRT call returned False; the library's log has the reason."""
    if not done:
        raise InferenceError(f"TensorRT refused the call for: {what}.")
