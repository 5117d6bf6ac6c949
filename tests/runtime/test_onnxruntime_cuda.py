"""ONNX Runtime's backend for CUDA: its copies, its graphs and its memory, on a pretended GPU."""

import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest

import da3_runtime.backends.gpu.cuda
import da3_runtime.backends.onnxruntime_cuda
from da3_runtime.backends.base import MAX_SHAPES
from da3_runtime.backends.gpu.capture_gate import GATE
from da3_runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda, captures_graphs, shapes_of
from da3_runtime.errors import BackendUnavailableError, DeviceLostError, InferenceError, OutOfMemoryError
from da3_runtime.network_io import TensorSpec
from da3_runtime.store.find_engine import find_engine
from da3_runtime.store.manifest import Kind
from da3_runtime.store.settings import EngineSettings
from tests.conftest import NANO
from tests.support import fake_gpu

SHAPES = [(1, 84, 112, 3), (1, 126, 98, 3), (2, 84, 112, 3), (1, 140, 140, 3), (3, 98, 84, 3)]
NAMES = ("depth", "confidence", "intrinsics", "extrinsics")


def images_of(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


class Gpu:
    """A pretended GPU, and sessions on it."""

    def __init__(self, monkeypatch, engine):
        self.cudart = fake_gpu.Cudart()
        monkeypatch.setattr(da3_runtime.backends.gpu.cuda, "bindings", lambda: self.cudart)
        for name in ("has_bindings", "has_cuda_driver"):
            monkeypatch.setattr(da3_runtime.backends.gpu.cuda, name, lambda: True)
        folder, _ = find_engine(EngineSettings(engine_dir=engine.engine_dir, model_id=NANO))
        self.outputs = folder.manifest.graphs["model"].outputs
        path = folder.path / "model.fp32.onnx"
        self.onnx = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
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
        return OnnxRuntimeCuda(self.open_session, self.outputs, "fp16", trained=True)

    @property
    def session(self):
        (session,) = self.sessions
        return session

    def check(self, raw, images):
        for name, value in zip(NAMES, self.onnx.run(NAMES, {"images": images}), strict=True):
            np.testing.assert_array_equal(getattr(raw, name), value)


@pytest.fixture
def gpu(monkeypatch, engine):
    return Gpu(monkeypatch, engine)


def test_outputs_are_the_engines_whatever_shape_came_before(gpu):
    backend = gpu.load()
    kept = []
    for seed, shape in enumerate(random.Random(0).choices(SHAPES, k=25)):
        images = images_of(shape, seed)
        kept.append((backend.run(images), images))
    for raw, images in kept:
        gpu.check(raw, images)


def test_threads_get_their_own_answers(gpu):
    backend = gpu.load()
    batches = [images_of(SHAPES[seed % len(SHAPES)], seed) for seed in range(20)]
    with ThreadPoolExecutor(4) as threads:
        for raw, images in zip(threads.map(backend.run, batches), batches, strict=True):
            gpu.check(raw, images)


def test_one_copy_goes_up_and_one_comes_back(gpu):
    backend = gpu.load()
    for _ in range(4):
        before = gpu.cudart.calls.count("cudaMemcpyAsync")
        backend.run(images_of(SHAPES[0]))
        assert gpu.cudart.calls.count("cudaMemcpyAsync") == before + 2


def test_a_shape_that_comes_again_is_captured_once_and_replayed(gpu):
    backend = gpu.load()
    for seed in range(4):
        images = images_of(SHAPES[0], seed)
        gpu.check(backend.run(images), images)
    backend.run(images_of(SHAPES[1]))
    assert gpu.session.runs == ["-1", "0", "0", "0", "-1"]


def test_nothing_is_allocated_for_a_shape_that_is_captured(gpu):
    backend = gpu.load()
    for shape in SHAPES[:2] * 2:
        backend.run(images_of(shape))
    before = len(gpu.cudart.blocks), gpu.cudart.calls.count("cudaMalloc")
    for shape in SHAPES[:2] * 3:
        backend.run(images_of(shape))
    assert (len(gpu.cudart.blocks), gpu.cudart.calls.count("cudaMalloc")) == before


def test_only_so_many_shapes_are_captured_and_the_others_run_all_the_same(gpu):
    backend = gpu.load()
    shapes = [(1, 84, 84 + 14 * index, 3) for index in range(MAX_SHAPES + 3)]
    for seed, shape in enumerate(shapes * 3):
        images = images_of(shape, seed)
        gpu.check(backend.run(images), images)
    assert len(gpu.session.graphs) == MAX_SHAPES
    assert gpu.session.runs[-3:] == ["-1"] * 3


def test_what_came_once_is_not_remembered_for_ever(gpu, monkeypatch):
    monkeypatch.setattr(da3_runtime.backends.onnxruntime_cuda, "_KNOWN_SHAPES", 2)
    backend = gpu.load()
    for shape in (*SHAPES[:4], SHAPES[0]):
        backend.run(images_of(shape))
    assert gpu.session.runs == ["-1"] * 5
    assert len(backend._met) == 2


def test_every_thread_replays_the_one_graph(gpu):
    """ONNX Runtime keeps captured graphs by thread."""
    backend = gpu.load()
    images = images_of(SHAPES[0])
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(backend.run, [images] * 24))
    assert len(gpu.session.threads) == 1
    assert gpu.session.runs == ["-1", *["0"] * 23]


def test_nothing_is_captured_while_another_model_uses_the_gpu(gpu):
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
def test_no_graph_is_captured_by_a_release_that_replays_it_wrongly(gpu, monkeypatch, version, captures):
    monkeypatch.undo()
    monkeypatch.setattr(onnxruntime, "__version__", version)
    assert captures_graphs() is captures


def test_a_graph_with_nodes_on_the_cpu_runs_without_being_captured(gpu):
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
def test_a_lack_of_memory_gives_everything_back_and_smaller_batches_still_run(gpu, recurs):
    backend = gpu.load()
    for _ in range(2):
        backend.run(images_of(SHAPES[0]))
    large = (8, 504, 504, 3)
    if recurs:
        backend.run(images_of(large))
        gpu.cudart.memory = sum(map(len, gpu.cudart.blocks.values())) + 2**23
    else:
        gpu.cudart.memory = 2**24
    with pytest.raises(OutOfMemoryError, match="smaller processing_res") as caught:
        backend.run(images_of(large))
    assert not gpu.cudart.blocks
    gc.collect()
    assert not gpu.sessions, "captured graphs are given back with their session only"
    images = images_of(SHAPES[0], 1)
    gpu.check(backend.run(images), images)
    assert caught.value.status == 507


def test_a_lack_of_memory_when_the_session_is_opened_again_is_said(gpu):
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


def test_a_failure_that_is_no_lack_of_memory_costs_no_session(gpu, monkeypatch):
    backend = gpu.load()
    images = images_of(SHAPES[0])
    backend.run(images)
    with monkeypatch.context() as patch:
        patch.setattr(fake_gpu.Session, "run_with_iobinding", lambda *_: 1 / 0)
        with pytest.raises(InferenceError, match="failed on a batch"):
            backend.run(images)
    gpu.check(backend.run(images), images)
    assert len(gpu.opened) == 1


def test_a_lost_gpu_is_told_from_a_failed_run(gpu):
    backend = gpu.load()
    backend.run(images_of(SHAPES[0]))
    session = gpu.session
    gpu.cudart.lost = True
    for _ in range(2):
        with pytest.raises(DeviceLostError):
            backend.run(images_of(SHAPES[0]))
    assert backend._session is session, "giving it back on a lost GPU may end the process"


def test_closing_gives_everything_back(gpu):
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


def test_a_session_that_cannot_be_opened_leaves_nothing_behind(gpu):
    gpu.can_open = False
    with pytest.raises(BackendUnavailableError):
        gpu.load()
    assert not gpu.cudart.streams


class OnTheCpu(OnnxRuntimeCuda):
    """Real bindings, where there is no CUDA: the pretended GPU's memory is the host's."""

    name = "bound"
    kind = Kind.ONNX_FP32
    providers = ("CPUExecutionProvider",)
    shares_stream = False
    device = "cpu"

    @classmethod
    def _options(cls, provider, folder, settings):
        return {}


def test_a_real_session_reads_and_writes_what_is_bound(gpu, engine):
    settings = EngineSettings(engine_dir=engine.engine_dir, model_id=NANO)
    folder, _ = find_engine(settings)
    (graph,) = folder.variant.graphs
    backend = OnTheCpu.load(folder, graph, settings)
    for seed, shape in enumerate(SHAPES * 2):
        images = images_of(shape, seed)
        gpu.check(backend.run(images), images)
    backend.close()
    assert not gpu.cudart.blocks


def test_shapes_of_outputs_follow_the_manifest():
    specs = [
        TensorSpec("depth", "float32", ["batch", "height", "width"]),
        TensorSpec("intrinsics", "float32", ["batch", 3, 3]),
        TensorSpec("rays", "float32", ["batch", "ray_height", "ray_width", 6]),
    ]
    assert shapes_of(specs, (2, 84, 140, 3)) == [(2, 84, 140), (2, 3, 3), (2, 48, 80, 6)]
