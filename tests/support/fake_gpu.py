"""A fake GPU: the interfaces of CUDA, TensorRT and ONNX Runtime over host memory, with ONNX Runtime on the CPU
as the engine.

It is stricter than a real GPU where that finds mistakes. Queued work runs only when the stream is synchronized.
Access to freed memory or past the end of a block loses the device for good, as a bad address does. A captured
graph fails if its context has changed since.
"""

# ruff: noqa: N802, N815  (the names are CUDA's)

from __future__ import annotations

import enum
import functools
import threading
from types import SimpleNamespace

import numpy as np
import onnxruntime

import da3_runtime.backends.gpu.cuda
from da3_runtime.network_io import shapes_of


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class CpuSession:
    """A session on the CPU that remembers what it computed, because tests compute what they expect too."""

    def __init__(self, onnx):
        options = onnxruntime.SessionOptions()
        self.session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        self.known = {}

    def run(self, outputs, inputs):
        key = (*outputs, *((name, value.shape, value.tobytes()) for name, value in inputs.items()))
        if key not in self.known:
            if len(self.known) == 64:
                self.known.pop(next(iter(self.known)))
            self.known[key] = self.session.run(outputs, inputs)
        return [value.copy() for value in self.known[key]]


@functools.cache
def cpu_session(onnx):
    """A session for the path of an ONNX file; opened once for all tests."""
    return CpuSession(onnx)


class Stream:
    def __init__(self, handle):
        self.handle = handle
        self.queued = []
        self.recording = None

    def __int__(self):
        return self.handle

    def add(self, work):
        (self.queued if self.recording is None else self.recording).append(work)


class Graph:
    def __init__(self, works):
        self.works = works


class Cudart:
    """cuda.bindings.runtime: every function returns a status first.

    Attributes
    ----------
    memory : int
        Bytes of memory in all, host and device.
    calls : list[str]
        Names of the functions called.
    lost : bool
        Whether every call fails, as after a fatal error.
    """

    cudaError_t = Status
    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down")
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
    )

    def __init__(self, capability="9.0", memory=2**33):
        self.capability = dict(zip(("major", "minor"), map(int, capability.split(".")), strict=True))
        self.memory = memory
        self.blocks = {}
        self.streams = {}
        self.graphs = set()
        self.calls = []
        self.lost = False
        self.can_capture = True

    def __getattribute__(self, name):
        if name.startswith("cuda") and callable(found := object.__getattribute__(self, name)):
            if isinstance(found, type):
                return found
            self.calls.append(name)
        return object.__getattribute__(self, name)

    def _status(self, *values):
        if self.lost:
            return (Status.cudaErrorIllegalAddress, *([None] * len(values)))
        return (Status.cudaSuccess, *values)

    def _allocate(self, size):
        if self.lost:
            return self._status(0)
        if size + sum(len(block) for block in self.blocks.values()) > self.memory:
            return Status.cudaErrorMemoryAllocation, None
        room = np.full(size + 256, 0xAB, np.uint8)
        start = -room.ctypes.data % 256
        block = room[start : start + size]
        self.blocks[block.ctypes.data] = block
        return Status.cudaSuccess, block.ctypes.data

    def array(self, address, size):
        """The bytes at an address; the device is lost if they are not inside one live block."""
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + len(block):
                return block[address - start :][:size]
        self.lost = True
        return None

    def cudaGetDevice(self):
        return self._status(0)

    def cudaGetDeviceProperties(self, device):
        return self._status(SimpleNamespace(name=b"Fake GPU\0\0\0"))

    def cudaDeviceGetAttribute(self, attribute, device):
        return self._status(self.capability[attribute])

    def cudaGetLastError(self):
        return self._status()

    def cudaDeviceSynchronize(self):
        return self._status()

    def cudaMalloc(self, size):
        return self._allocate(size)

    def cudaMallocHost(self, size):
        return self._allocate(size)

    def cudaFree(self, address):
        self.blocks.pop(address)
        return self._status()

    def cudaFreeHost(self, address):
        self.blocks.pop(address)
        return self._status()

    def cudaStreamCreateWithFlags(self, flags):
        stream = Stream(len(self.streams) + 1)
        self.streams[stream.handle] = stream
        return self._status(stream)

    def cudaStreamDestroy(self, stream):
        assert not stream.queued
        del self.streams[stream.handle]
        return self._status()

    def cudaStreamSynchronize(self, stream):
        works, stream.queued = stream.queued, []
        for work in works:
            if not self.lost:
                work()
        return self._status()

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        def copy():
            written, read = self.array(target, size), self.array(source, size)
            if not self.lost:
                written[:] = read

        stream.add(copy)
        return self._status()

    def cudaStreamBeginCapture(self, stream, mode):
        stream.recording = []
        return self._status()

    def cudaStreamEndCapture(self, stream):
        works, stream.recording = stream.recording, None
        if not self.can_capture:
            return Status.cudaErrorStreamCaptureUnsupported, None
        graph = Graph(works)
        self.graphs.add(graph)
        return self._status(graph)

    def cudaGraphInstantiate(self, graph, flags):
        executable = Graph(graph.works)
        self.graphs.add(executable)
        return self._status(executable)

    def cudaGraphLaunch(self, graph, stream):
        assert graph in self.graphs
        stream.queued += graph.works
        return self._status()

    def cudaGraphDestroy(self, graph):
        self.graphs.remove(graph)
        return self._status()

    def cudaGraphExecDestroy(self, graph):
        self.graphs.remove(graph)
        return self._status()


SCRATCH = 40  # bytes of scratch memory per byte of input


class Engine:
    """ICudaEngine over an ONNX file.

    ``inputs`` and ``outputs`` are their specifications, ``profiles`` shapes of the images.
    """

    def __init__(self, library, inputs, outputs, profiles):
        self.library = library
        self.inputs = [spec.name for spec in inputs]
        self.tensors = {spec.name: spec for spec in (*inputs, *outputs)}
        self.names = list(self.tensors)
        self.profiles = profiles
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = len(profiles)
        self.contexts = []

    def get_tensor_name(self, index):
        return self.names[index]

    def get_tensor_dtype(self, name):
        return self.tensors[name].dtype

    def get_tensor_profile_shape(self, name, profile_index):
        return [self.shape_of(name, shape) for shape in self.profiles[profile_index]]

    def shape_of(self, name, images):
        (shape,) = shapes_of([self.tensors[name]], images)
        return shape

    def create_execution_context(self, strategy):
        context = Context(self, strategy)
        self.contexts.append(context)
        return context

    def create_runtime_config(self):
        return Config(self.library)


class Context:
    """IExecutionContext."""

    def __init__(self, engine, strategy):
        self.engine = engine
        self.strategy = strategy
        self.active_optimization_profile = 0
        self.version = 0
        self.shapes = {}
        self.addresses = {}
        self.scratch = (0, 0)
        self.executed = 0

    def set_optimization_profile_async(self, profile_index, stream_handle):
        assert stream_handle in self.engine.library.cudart.streams
        self.active_optimization_profile, self.shapes = profile_index, {}
        self.version += 1
        return True

    def set_input_shape(self, name, shape):
        low, _, high = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
        if not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            return False
        self.shapes[name] = tuple(shape)
        self.version += 1
        return True

    @property
    def shape(self):
        """Shape of the images."""
        return self.shapes["images"]

    def infer_shapes(self):
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name):
        return self.engine.shape_of(name, self.shape)

    def update_device_memory_size_for_shapes(self):
        return int(np.prod(self.shape)) * SCRATCH

    def set_tensor_address(self, name, memory):
        self.addresses[name] = memory
        return memory % 256 == 0

    def set_device_memory(self, memory, size):
        self.scratch = (memory, size)
        self.version += 1

    def execute_async_v3(self, stream_handle):
        cudart, library = self.engine.library.cudart, self.engine.library
        if self.infer_shapes() or set(self.addresses) != set(self.engine.names):
            return False
        shapes, version, scratch = dict(self.shapes), self.version, self.scratch
        shape, addresses = self.shape, dict(self.addresses)
        if scratch[1] < int(np.prod(shape)) * SCRATCH:
            return False
        self.executed += 1

        def work():
            inputs = {}
            for name in self.engine.inputs:
                dtype = np.dtype(self.engine.tensors[name].dtype)
                size = int(np.prod(shapes[name])) * dtype.itemsize
                inputs[name] = cudart.array(addresses[name], size)
                if inputs[name] is not None:
                    inputs[name] = inputs[name].view(dtype).reshape(shapes[name])
            space = cudart.array(*scratch)
            if cudart.lost or self.version != version:
                cudart.lost = True
                return
            space[:] = 0xCD
            values = library.run(**inputs)
            for name, value in values.items():
                memory = cudart.array(addresses[name], value.nbytes)
                if memory is not None:
                    memory[:] = value.reshape(-1).view(np.uint8)

        if self.engine.library.fails:
            self.engine.library.log.log(1, self.engine.library.fails)
            return False
        cudart.streams[stream_handle].add(work)
        self.engine.library.specialize(shape)
        return True


class Config:
    """IRuntimeConfig."""

    def __init__(self, library):
        self.library = library
        self.cuda_graph_strategy = "disabled"

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return Cache(self.library)

    def set_runtime_cache(self, cache):
        self.library.cache = cache
        return True


class Cache:
    """IRuntimeCache: a header that names the machine, and the shapes that have specialized kernels."""

    def __init__(self, library):
        self.machine = library.machine
        self.shapes = []

    def deserialize(self, blob):
        machine, _, shapes = bytes(blob).partition(b"|")
        if machine != self.machine:
            return False
        self.shapes = shapes.split(b";") if shapes else []
        return True

    def serialize(self):
        return self.machine + b"|" + b";".join(self.shapes)


class Runtime:
    """IRuntime."""

    def __init__(self, log):
        self.log = log

    @property
    def library(self):
        return self.log.library

    def get_engine_validity(self, buffer):
        assert self.library.is_plan(buffer)
        return self.library.validity, self.library.causes

    def deserialize_cuda_engine(self, serialized_engine):
        if not self.library.is_plan(serialized_engine):
            self.log.log(1, "not a plan")
            return None
        engine = Engine(self.library, *self.library.tensors, self.library.profiles)
        self.library.engines.append(engine)
        return engine


class Library:
    """The Python module of a TensorRT library. It knows one plan and runs an ONNX file for it.

    Parameters
    ----------
    plan : Path
        The plan that it can deserialize.
    onnx : Path
        The ONNX file that computes the plan's outputs.
    entry : GraphEntry
        The plan's inputs and outputs.
    """

    uint8, int64, float32 = "uint8", "int64", "float32"
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")

    class EngineValidity(enum.IntEnum):
        VALID = 0
        SUBOPTIMAL = 1
        INVALID = 2

    class EngineInvalidityDiagnostics(enum.IntEnum):
        VERSION_MISMATCH = 1
        UNSUPPORTED_CC = 2

    class ILogger:
        Severity = SimpleNamespace(ERROR=1)

        def __init__(self):
            self.library = Library.current

    def __init__(self, name, version, cudart, plan, onnx, entry, profiles):
        Library.current = self
        self.__name__, self.__version__ = name, version
        self.cudart = cudart
        self.plan = plan.read_bytes()
        self.session = cpu_session(str(onnx))
        self.tensors = (entry.inputs, entry.outputs)
        self.profiles = profiles
        self.engines = []
        self.validity, self.causes = self.EngineValidity.VALID, 0
        self.machine = b"this machine"
        self.cache = None
        self.fails = ""
        self.log = None

    def Runtime(self, log):
        self.log = log
        return Runtime(log)

    def is_plan(self, buffer):
        return bytes(buffer) == self.plan

    def run(self, **inputs):
        outputs = [spec.name for spec in self.tensors[1]]
        inputs = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        values = self.session.run(outputs, inputs)
        return dict(zip(outputs, values, strict=True))

    def specialize(self, shape):
        """Add the kernels for a shape to the cache, once."""
        name = "x".join(map(str, shape)).encode()
        if self.cache is not None and name not in self.cache.shapes:
            self.cache.shapes.append(name)


class Binding:
    """IOBinding: dtype, shape and address of a session's inputs and outputs."""

    def __init__(self):
        self.inputs = {}
        self.outputs = {}

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        assert (device_type, device_id) == ("cuda", 0)
        self.inputs[name] = np.dtype(element_type), tuple(shape), buffer_ptr

    def bind_output(self, name, device_type, device_id, element_type, shape, buffer_ptr):
        assert (device_type, device_id) == ("cuda", 0)
        self.outputs[name] = np.dtype(element_type), tuple(shape), buffer_ptr


class Session:
    """InferenceSession of the CUDA provider on the caller's stream.

    A captured graph is replayed with the addresses of its capture, not those of the current binding.

    Parameters
    ----------
    session : onnxruntime.InferenceSession
        Session on the CPU that computes the outputs.
    stream : int
        ``user_compute_stream``.
    captures : bool
        ``enable_cuda_graph``.
    """

    def __init__(self, cudart, session, stream, captures):
        self.cudart, self.session, self.stream, self.captures = cudart, session, stream, captures
        self.graphs = {}
        self.runs = []
        self.threads = set()

    def io_binding(self):
        return Binding()

    def run_with_iobinding(self, binding, options):
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        graph = options.get_run_config_entry("gpu_graph_id")
        self.runs.append(graph)
        self.threads.add(threading.get_ident())
        if graph != "-1" and self.captures:
            binding = self.graphs.setdefault(graph, binding)
        self.cudart.streams[self.stream].add(lambda: self._compute(binding))

    def _compute(self, binding):
        feeds = {
            name: self.cudart.array(address, int(np.prod(shape)) * dtype.itemsize)
            .view(dtype)
            .reshape(shape)
            for name, (dtype, shape, address) in binding.inputs.items()
        }
        if self.cudart.lost:
            return
        values = self.session.run(list(binding.outputs), feeds)
        for (dtype, shape, address), value in zip(binding.outputs.values(), values, strict=True):
            assert (value.dtype, value.shape) == (dtype, shape)
            memory = self.cudart.array(address, value.nbytes)
            if memory is not None:
                memory[:] = value.reshape(-1).view(np.uint8)


# Fake classes of TensorRT, and the classes they replace; OWN are attributes that the real ones lack.
REAL = {
    Engine: "ICudaEngine",
    Context: "IExecutionContext",
    Config: "IRuntimeConfig",
    Cache: "IRuntimeCache",
    Runtime: "Runtime",
}
OWN = {"library", "shape", "shape_of"}


def install(monkeypatch, cudart):
    """Make the runtime use the fake GPU."""
    cuda = da3_runtime.backends.gpu.cuda
    monkeypatch.setattr(cuda, "bindings", lambda: cudart)
    monkeypatch.setattr(cuda, "missing_package", lambda *_: None)
    monkeypatch.setattr(cuda, "has_cuda_driver", lambda: True)
