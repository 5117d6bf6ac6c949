"""Thin wrappers of CUDA through cuda-bindings: memory, streams, graphs, and errors by kind.

cuda-bindings is imported at the first call.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import BackendUnavailableError, DeviceLostError, InferenceError, OutOfMemoryError
from da3_runtime.util.extras import missing_package

NO_DRIVER = "this machine has no NVIDIA GPU, or no driver for it"
_GROW_BY = 2 * 2**20  # bytes; allocations are multiples of it
_NO_MEMORY = re.compile(
    r"out of memory|OutOfMemory|Failed to allocate memory|ALLOC_FAILED|CUDA failure 2\b", re.IGNORECASE
)


def has_cuda_driver() -> bool:
    """Whether an NVIDIA driver is loaded on this machine."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def bindings() -> Any:
    """The module of CUDA's runtime API."""
    from cuda.bindings import runtime

    return runtime


def cuda_missing(extra: str = "gpu") -> str | None:
    """Why CUDA cannot be called here, or None if it can; ``extra`` installs cuda-bindings."""
    if not has_cuda_driver():
        return NO_DRIVER
    return missing_package("cuda.bindings", extra, "cuda-bindings")


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of cuda-bindings, check its status, and return its value.

    Raises
    ------
    OutOfMemoryError
        If the GPU has not enough free memory.
    InferenceError
        If the call fails for another reason; the message has the name of CUDA's error.
    """
    status, *values = function(*args)
    cudart = bindings()
    if status == cudart.cudaError_t.cudaSuccess:
        return values[0] if values else None
    # Clears an error that is not fatal; the next call would report it again.
    cudart.cudaGetLastError()
    if status == cudart.cudaError_t.cudaErrorMemoryAllocation:
        raise OutOfMemoryError("The GPU has not enough free memory.")
    raise InferenceError(f"The GPU failed ({cudart.cudaError_t(status).name}).")


def _release(function: Callable[..., Any], handle: Any) -> None:
    """Free a resource and ignore errors: on a lost GPU the call fails, and nothing is left to free."""
    function(handle)


def compute_capability() -> str:
    """Compute capability of the current GPU, such as ``9.0``.

    Raises
    ------
    BackendUnavailableError
        If no GPU can be used.
    """
    cudart = bindings()
    attributes = cudart.cudaDeviceAttr
    try:
        device = call(cudart.cudaGetDevice)
        major = call(cudart.cudaDeviceGetAttribute, attributes.cudaDevAttrComputeCapabilityMajor, device)
        minor = call(cudart.cudaDeviceGetAttribute, attributes.cudaDevAttrComputeCapabilityMinor, device)
    except InferenceError as error:
        raise BackendUnavailableError(f"No GPU can be used: {error}") from None
    return f"{major}.{minor}"


def device_name() -> str:
    """Name of the current GPU, such as ``NVIDIA H200``."""
    cudart = bindings()
    properties = call(cudart.cudaGetDeviceProperties, call(cudart.cudaGetDevice))
    return bytes(properties.name).split(b"\0")[0].decode(errors="replace")


def is_lost() -> bool:
    """Whether the process has lost the GPU: after some errors every CUDA call fails until it exits."""
    if cuda_missing() is not None:
        return False
    cudart = bindings()
    cudart.cudaGetLastError()
    (status,) = cudart.cudaDeviceSynchronize()
    return bool(status != cudart.cudaError_t.cudaSuccess)


def failure(
    what: str,
    shape: tuple[int, ...],
    error: Exception,
    log_text: str = "",
    is_lost: Callable[[], bool] = is_lost,
) -> InferenceError:
    """The error to report for a failed batch: lost GPU, out of memory, or any other failure.

    Parameters
    ----------
    what : str
        The backend's name.
    shape : tuple[int, ...]
        Shape of the batch.
    error : Exception
        Exception that the library raised.
    log_text : str
        Errors that the library wrote to its log, or the causes of the exception.
    is_lost : Callable[[], bool]
        Returns whether the process can no longer use the GPU.
    """
    if is_lost():
        return DeviceLostError()
    if isinstance(error, OutOfMemoryError) or _NO_MEMORY.search(f"{error} {log_text}"):
        return OutOfMemoryError(
            f"The GPU has not enough free memory for a batch of shape {list(shape)}: "
            "send a smaller processing_res."
        )
    return InferenceError(f"{what} failed on a batch of shape {list(shape)}.")


class Memory:
    """A block of device memory or pinned host memory that grows and never shrinks.

    Parameters
    ----------
    pinned : bool
        Whether it is pinned host memory, which the GPU reads and writes directly.

    Attributes
    ----------
    address : int
        Address of the block; 0 if it is empty.
    size : int
        Bytes.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self.address = 0
        self.size = 0

    def reserve(self, size: int) -> bool:
        """Grow to at least ``size`` bytes; return whether the block moved. Nothing may be using it.

        Raises
        ------
        OutOfMemoryError
            If not enough memory is free; the block is empty then.
        """
        if size <= self.size:
            return False
        self.free()
        cudart = bindings()
        size = -(-size // _GROW_BY) * _GROW_BY
        self.address = int(call(cudart.cudaMallocHost if self._pinned else cudart.cudaMalloc, size))
        self.size = size
        return True

    def free(self) -> None:
        """Free the block."""
        address, self.address, self.size = self.address, 0, 0
        if address:
            cudart = bindings()
            _release(cudart.cudaFreeHost if self._pinned else cudart.cudaFree, address)

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Pinned memory from byte ``offset`` on, as an array; valid until the block moves."""
        assert self._pinned
        count = int(np.prod(shape)) * dtype.itemsize
        assert offset + count <= self.size
        block = (ctypes.c_uint8 * count).from_address(self.address + offset)
        return np.frombuffer(memoryview(block), dtype).reshape(shape)


class Stream:
    """A CUDA stream: its operations run one after the other, independent of other streams.

    Attributes
    ----------
    handle : int
        Address of the stream, as TensorRT and ONNX Runtime expect it.
    """

    def __init__(self) -> None:
        cudart = bindings()
        self._stream = call(cudart.cudaStreamCreateWithFlags, cudart.cudaStreamNonBlocking)
        self.handle = int(self._stream)

    def upload(self, device: Memory, host: Memory, size: int) -> None:
        """Queue a copy of ``size`` bytes of pinned memory to the device."""
        kind = bindings().cudaMemcpyKind.cudaMemcpyHostToDevice
        call(bindings().cudaMemcpyAsync, device.address, host.address, size, kind, self._stream)

    def download(self, host: Memory, device: Memory, size: int) -> None:
        """Queue a copy of ``size`` bytes of device memory to the pinned memory."""
        kind = bindings().cudaMemcpyKind.cudaMemcpyDeviceToHost
        call(bindings().cudaMemcpyAsync, host.address, device.address, size, kind, self._stream)

    def wait(self) -> None:
        """Wait until all queued operations are done; raise the error if one of them failed."""
        call(bindings().cudaStreamSynchronize, self._stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """Record the operations that ``work`` queues as a CUDA graph, without running them.

        Other threads are not affected. If ``work`` raises, the recording is discarded.
        """
        cudart = bindings()
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(cudart.cudaStreamBeginCapture, self._stream, mode)
        try:
            work()
        except BaseException:
            _, graph = cudart.cudaStreamEndCapture(self._stream)
            if graph:
                _release(cudart.cudaGraphDestroy, graph)
            cudart.cudaGetLastError()
            raise
        graph = call(cudart.cudaStreamEndCapture, self._stream)
        try:
            return call(cudart.cudaGraphInstantiate, graph, 0)
        finally:
            _release(cudart.cudaGraphDestroy, graph)

    def drain(self) -> None:
        """Wait until all queued operations have ended, and ignore their errors."""
        bindings().cudaStreamSynchronize(self._stream)

    def launch(self, graph: Any) -> None:
        """Queue a captured graph."""
        call(bindings().cudaGraphLaunch, graph, self._stream)

    def close(self) -> None:
        """Destroy the stream."""
        _release(bindings().cudaStreamDestroy, self._stream)


def destroy_graph(graph: Any) -> None:
    """Free a captured graph."""
    _release(bindings().cudaGraphExecDestroy, graph)
