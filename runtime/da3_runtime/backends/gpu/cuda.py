"""What a plan's runner needs of CUDA, through cuda-bindings: memory, a stream, graphs, its failures.

Nothing here imports cuda-bindings before it is used.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from da3_runtime.errors import BackendUnavailableError, DeviceLostError, InferenceError, OutOfMemoryError

_GROW_BY = 2 * 2**20  # memory is asked for in whole steps of this many bytes
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
    """The runtime interface of cuda-bindings."""
    from cuda.bindings import runtime

    return runtime


def has_bindings() -> bool:
    """Whether cuda-bindings is installed."""
    return find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


def missing() -> str | None:
    """What of CUDA is not there; None where it can be called."""
    if not has_bindings():
        return "cuda-bindings is not installed"
    if not has_cuda_driver():
        return "there is no NVIDIA driver"
    return None


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Call one of cuda-bindings' functions and return what it gives beside its status.

    Raises
    ------
    OutOfMemoryError
        If there is no memory.
    InferenceError
        With the error's name, if it fails otherwise.
    """
    status, *values = function(*args)
    cudart = bindings()
    if status == cudart.cudaError_t.cudaSuccess:
        return values[0] if values else None
    # Not fatal ones are reported once more by the next call otherwise.
    cudart.cudaGetLastError()
    if status == cudart.cudaError_t.cudaErrorMemoryAllocation:
        raise OutOfMemoryError("The GPU has not enough free memory.")
    raise InferenceError(f"The GPU failed ({cudart.cudaError_t(status).name}).")


def _give_back(function: Callable[..., Any], handle: Any) -> None:
    """Free something. That fails where the GPU is lost, and then there is nothing left to free."""
    function(handle)


def compute_capability() -> str:
    """Compute capability of the GPU in use, as ``9.0``.

    Raises
    ------
    BackendUnavailableError
        If there is none.
    """
    cudart = bindings()
    attributes = cudart.cudaDeviceAttr
    try:
        device = call(cudart.cudaGetDevice)
        major = call(cudart.cudaDeviceGetAttribute, attributes.cudaDevAttrComputeCapabilityMajor, device)
        minor = call(cudart.cudaDeviceGetAttribute, attributes.cudaDevAttrComputeCapabilityMinor, device)
    except InferenceError as error:
        raise BackendUnavailableError(f"There is no usable GPU: {error}") from None
    return f"{major}.{minor}"


def device_name() -> str:
    """The GPU's name."""
    cudart = bindings()
    properties = call(cudart.cudaGetDeviceProperties, call(cudart.cudaGetDevice))
    return bytes(properties.name).split(b"\0")[0].decode(errors="replace")


def is_lost() -> bool:
    """Whether the process's CUDA context is poisoned: every call fails until the process ends."""
    if missing() is not None:
        return False
    cudart = bindings()
    cudart.cudaGetLastError()
    (status,) = cudart.cudaDeviceSynchronize()
    return bool(status != cudart.cudaError_t.cudaSuccess)


def failure(
    what: str,
    shape: tuple[int, ...],
    error: Exception,
    said: str = "",
    is_lost: Callable[[], bool] = is_lost,
) -> InferenceError:
    """The error for a batch that a backend failed on, told apart by what became of the GPU.

    Parameters
    ----------
    what : str
        The backend's name.
    error, said : Exception, str
        What its library raised, and what it wrote to its log.
    is_lost : Callable[[], bool]
        Whether the GPU takes no more work.
    """
    if is_lost():
        return DeviceLostError()
    if isinstance(error, OutOfMemoryError) or _NO_MEMORY.search(f"{error} {said}"):
        return OutOfMemoryError(
            f"The GPU has not enough free memory for a batch of shape {list(shape)}; "
            "a smaller processing_res takes less."
        )
    return InferenceError(f"{what} failed on a batch of shape {list(shape)}.")


class Memory:
    """A block of device or pinned host memory that only ever grows.

    Parameters
    ----------
    pinned : bool
        Whether it is host memory that the GPU reads and writes directly.

    Attributes
    ----------
    address : int
        Where it is; 0 before anything was reserved.
    size : int
        Bytes.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self.address = 0
        self.size = 0

    def reserve(self, size: int) -> bool:
        """See that it has at least ``size`` bytes; True if it had to move. Nothing may be using it.

        Raises
        ------
        OutOfMemoryError
            If there is not so much; it is empty then.
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
        """Give it back."""
        address, self.address, self.size = self.address, 0, 0
        if address:
            cudart = bindings()
            _give_back(cudart.cudaFreeHost if self._pinned else cudart.cudaFree, address)

    def view(self, offset: int, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """Pinned memory as an array, valid until it moves."""
        assert self._pinned
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert offset + count <= self.size
        block = (ctypes.c_uint8 * count).from_address(self.address + offset)
        return np.frombuffer(memoryview(block), dtype).reshape(shape)


class Stream:
    """A stream of its own, on which one thing follows another.

    Attributes
    ----------
    handle : int
        As TensorRT takes it.
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
        """Wait until everything queued is done; raises what went wrong with it."""
        call(bindings().cudaStreamSynchronize, self._stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """The CUDA graph of what ``work`` queues, which is not done yet.

        Other threads' work is not hindered. If ``work`` raises, what was recorded is thrown away.
        """
        cudart = bindings()
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(cudart.cudaStreamBeginCapture, self._stream, mode)
        try:
            work()
        except BaseException:
            _, graph = cudart.cudaStreamEndCapture(self._stream)
            if graph:
                _give_back(cudart.cudaGraphDestroy, graph)
            cudart.cudaGetLastError()
            raise
        graph = call(cudart.cudaStreamEndCapture, self._stream)
        try:
            return call(cudart.cudaGraphInstantiate, graph, 0)
        finally:
            _give_back(cudart.cudaGraphDestroy, graph)

    def drain(self) -> None:
        """Wait until nothing is queued any more, whatever became of it."""
        bindings().cudaStreamSynchronize(self._stream)

    def launch(self, graph: Any) -> None:
        """Queue a captured graph."""
        call(bindings().cudaGraphLaunch, graph, self._stream)

    def close(self) -> None:
        """Give it back."""
        _give_back(bindings().cudaStreamDestroy, self._stream)


def destroy_graph(graph: Any) -> None:
    """Give a captured graph back."""
    _give_back(bindings().cudaGraphExecDestroy, graph)
