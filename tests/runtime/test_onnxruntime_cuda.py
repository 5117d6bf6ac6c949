"""The CUDA backend of ONNX Runtime on the fake GPU of tests/support: copies, CUDA graphs, memory, failures."""

import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest

import da3_runtime.backends.onnxruntime_cuda
from da3_runtime.backends.base import MAX_SHAPES
from da3_runtime.backends.gpu.capture_gate import GATE
from da3_runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda, captures_graphs
from da3_runtime.errors import BackendUnavailableError, DeviceLostError, InferenceError, OutOfMemoryError
from da3_runtime.network_io import ANYVIEW_INPUTS, ANYVIEW_OUTPUTS, inputs_of
from da3_runtime.store.find_engine import find_engine
from da3_runtime.store.manifest import Kind
from da3_runtime.store.settings import EngineSettings
from tests.support import fake_gpu
from tests.support.paths import NANO

# Scenes, views, height, width, channels.
SHAPES = [
    (1, 1, 84, 112, 3), (1, 1, 126, 98, 3), (2, 1, 84, 112, 3), (1, 1, 140, 140, 3), (3, 1, 98, 84, 3), (1, 3, 84, 84, 3),
]  # fmt: skip
NAMES = ANYVIEW_OUTPUTS


def images_of(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class Gpu:
    """A fake GPU, and sessions on it."""

    def __init__(self, monkeypatch, engine):
        self.cudart = fake_gpu.Cudart()
        fake_gpu.install(monkeypatch, self.cudart)
        folder, _ = find_engine(EngineSettings(engine_dir=engine.engine_dir, model_id=NANO))
        self.entry = folder.manifest.graphs["model"]
        self.onnx = fake_gpu.cpu_session(str(folder.path / "model.fp32.onnx"))
        monkeypatch.setattr(da3_runtime.backends.onnxruntime_cuda, "captures_graphs", lambda: True)
        self.can_capture = self.can_open = True
        self.sessions = weakref.WeakSet()
        self.opened = []

    def open_session(self, more):
        self.opened.append(more)
        captures = more.get("enable_cuda_graph") == "1"
        if not self.can_open or (captures and not self.can_capture):
            cause = RuntimeError(
                "This session cannot use the graph capture feature"
                if self.can_open
                else "CUDA failure 2"
            )
            raise BackendUnavailableError("ONNX Runtime cannot load it.") from cause
        session = fake_gpu.Session(self.cudart, self.onnx, int(more["user_compute_stream"]), captures)
        self.sessions.add(session)
        return session

    def load(self):
        return OnnxRuntimeCuda(self.open_session, self.entry, "fp16", trained=True)

    @property
    def session(self):
        (session,) = self.sessions
        return session

    def check(self, raw, images):
        values = self.onnx.run(NAMES, inputs_of(ANYVIEW_INPUTS, images))
        for name, value in zip(NAMES, values, strict=True):
            np.testing.assert_array_equal(getattr(raw, name), value)


@pytest.fixture
def gpu(monkeypatch, engine):
    return Gpu(monkeypatch, engine)


def test_outputs_are_right_whatever_shape_ran_before(gpu):
    backend = gpu.load()
    kept = []
    for seed, shape in enumerate(random.Random(0).choices(SHAPES, k=25)):
        images = images_of(shape, seed)
        kept.append((backend.run(images), images))
    for raw, images in kept:
        gpu.check(raw, images)


def test_each_thread_gets_the_outputs_of_its_own_batch(gpu):
    backend = gpu.load()
    batches = [images_of(SHAPES[seed % len(SHAPES)], seed) for seed in range(20)]
    with ThreadPoolExecutor(4) as threads:
        for raw, images in zip(threads.map(backend.run, batches), batches, strict=True):
            gpu.check(raw, images)


def test_a_batch_is_one_copy_to_the_device_and_one_back(gpu):
    backend = gpu.load()
    for _ in range(4):
        before = gpu.cudart.calls.count("cudaMemcpyAsync")
        backend.run(images_of(SHAPES[0]))
        assert gpu.cudart.calls.count("cudaMemcpyAsync") == before + 2


def test_a_shape_is_captured_at_its_second_batch_and_then_replayed(gpu):
    backend = gpu.load()
    for seed in range(4):
        images = images_of(SHAPES[0], seed)
        gpu.check(backend.run(images), images)
    backend.run(images_of(SHAPES[1]))
    assert gpu.session.runs == ["-1", "0", "0", "0", "-1"]


def test_a_captured_shape_allocates_nothing(gpu):
    backend = gpu.load()
    for shape in SHAPES[:2] * 2:
        backend.run(images_of(shape))
    before = len(gpu.cudart.blocks), gpu.cudart.calls.count("cudaMalloc")
    for shape in SHAPES[:2] * 3:
        backend.run(images_of(shape))
    assert (len(gpu.cudart.blocks), gpu.cudart.calls.count("cudaMalloc")) == before


def test_the_number_of_captured_shapes_is_bounded_and_others_run_without_a_graph(gpu):
    backend = gpu.load()
    shapes = [(1, 1, 84, 84 + 14 * index, 3) for index in range(MAX_SHAPES + 3)]
    for seed, shape in enumerate(shapes * 3):
        images = images_of(shape, seed)
        gpu.check(backend.run(images), images)
    assert len(gpu.session.graphs) == MAX_SHAPES
    assert gpu.session.runs[-3:] == ["-1"] * 3


def test_the_number_of_remembered_shapes_is_bounded(gpu, monkeypatch):
    monkeypatch.setattr(da3_runtime.backends.onnxruntime_cuda, "_MAX_SHAPES_SEEN", 2)
    backend = gpu.load()
    for shape in (*SHAPES[:4], SHAPES[0]):
        backend.run(images_of(shape))
    assert gpu.session.runs == ["-1"] * 5
    assert len(backend._seen) == 2


def test_calls_from_every_thread_replay_the_same_graph(gpu):
    """ONNX Runtime ties a captured graph to the thread that ran it."""
    backend = gpu.load()
    images = images_of(SHAPES[0])
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(backend.run, [images] * 24))
    assert len(gpu.session.threads) == 1
    assert gpu.session.runs == ["-1", *["0"] * 23]


def test_no_graph_is_captured_while_another_model_uses_the_gpu(gpu):
    backend = gpu.load()
    images = images_of(SHAPES[0])
    with GATE.use(), GATE.use():
        for _ in range(3):
            gpu.check(backend.run(images), images)
    assert gpu.session.runs == ["-1"] * 3
    with GATE.use():
        for _ in range(2):
            gpu.check(backend.run(images), images)
    assert gpu.session.runs[3:] == ["0"] * 2


@pytest.mark.parametrize(
    ("version", "captures"), [("1.26.0", False), ("1.30.2", False), ("1.31.1", True)]
)
def test_graphs_are_off_for_releases_that_replay_them_wrongly(gpu, monkeypatch, version, captures):
    monkeypatch.undo()
    monkeypatch.setattr(onnxruntime, "__version__", version)
    assert captures_graphs() is captures


def test_a_network_with_nodes_on_the_cpu_runs_without_cuda_graphs(gpu):
    gpu.can_capture = False
    backend = gpu.load()
    assert [more.get("enable_cuda_graph") for more in gpu.opened] == ["1", None]
    for seed in range(3):
        images = images_of(SHAPES[0], seed)
        gpu.check(backend.run(images), images)
    assert gpu.session.runs == ["-1"] * 3
    backend.free()
    backend.run(images_of(SHAPES[0]))
    assert [more.get("enable_cuda_graph") for more in gpu.opened] == ["1", None, None]


@pytest.mark.parametrize("recurs", [False, True])
def test_out_of_memory_releases_everything_and_smaller_batches_still_run(gpu, recurs):
    backend = gpu.load()
    for _ in range(2):
        backend.run(images_of(SHAPES[0]))
    large = (8, 1, 336, 336, 3)
    if recurs:
        backend.run(images_of(large))
        gpu.cudart.memory = sum(map(len, gpu.cudart.blocks.values())) + 2**22
    else:
        gpu.cudart.memory = 2**23
    with pytest.raises(OutOfMemoryError, match="smaller processing_res") as caught:
        backend.run(images_of(large))
    assert not gpu.cudart.blocks
    gc.collect()
    assert not gpu.sessions, "captured graphs are freed only with their session"
    images = images_of(SHAPES[0], 1)
    gpu.check(backend.run(images), images)
    assert caught.value.status == 507


def test_out_of_memory_while_reopening_the_session_is_reported(gpu):
    backend = gpu.load()
    backend.free()
    gpu.can_open = False
    with pytest.raises(OutOfMemoryError):
        backend.run(images_of(SHAPES[0]))
    gpu.can_open = True
    images = images_of(SHAPES[0])
    for _ in range(2):
        gpu.check(backend.run(images), images)
    assert gpu.session.runs == ["-1", "0"], "graphs are captured as before"


def test_other_failures_keep_the_session_open(gpu, monkeypatch):
    backend = gpu.load()
    images = images_of(SHAPES[0])
    backend.run(images)
    with monkeypatch.context() as patch:
        patch.setattr(fake_gpu.Session, "run_with_iobinding", lambda *_: 1 / 0)
        with pytest.raises(InferenceError, match="failed on a batch"):
            backend.run(images)
    gpu.check(backend.run(images), images)
    assert len(gpu.opened) == 1


def test_a_lost_gpu_is_distinguished_from_a_failed_run(gpu):
    backend = gpu.load()
    backend.run(images_of(SHAPES[0]))
    session = gpu.session
    gpu.cudart.lost = True
    for _ in range(2):
        with pytest.raises(DeviceLostError):
            backend.run(images_of(SHAPES[0]))
    assert backend._session is session, "freeing it on a lost GPU may end the process"


def test_close_releases_everything(gpu):
    backend = gpu.load()
    for shape in SHAPES * 2:
        backend.run(images_of(shape))
    backend.close()
    gc.collect()
    assert not gpu.cudart.blocks
    assert not gpu.cudart.streams
    assert not gpu.sessions
    with pytest.raises(InferenceError, match="unloaded"):
        backend.run(images_of(SHAPES[0]))
    backend.close()


def test_a_failed_load_leaves_no_stream_behind(gpu):
    gpu.can_open = False
    with pytest.raises(BackendUnavailableError):
        gpu.load()
    assert not gpu.cudart.streams


class OnTheCpu(OnnxRuntimeCuda):
    """The backend with a real CPU session bound to the fake GPU's memory, which is host memory."""

    name = "bound"
    kind = Kind.ONNX_FP32
    providers = ("CPUExecutionProvider",)
    shares_stream = False
    device = "cpu"

    @classmethod
    def kind_in(cls, folder, graph, settings):
        return cls.kind

    @classmethod
    def _options(cls, provider, folder, entry, settings):
        return {}


def test_a_real_session_reads_and_writes_the_bound_memory(gpu, engine):
    settings = EngineSettings(engine_dir=engine.engine_dir, model_id=NANO)
    folder, _ = find_engine(settings)
    (graph,) = folder.variant.graphs
    backend = OnTheCpu.load(folder, graph, settings)
    for seed, shape in enumerate(SHAPES * 2):
        images = images_of(shape, seed)
        gpu.check(backend.run(images), images)
    backend.close()
    assert not gpu.cudart.blocks
