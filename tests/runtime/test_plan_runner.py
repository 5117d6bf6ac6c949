"""Plans run on a pretended GPU (tests/fake_gpu.py): buffers, shapes, graphs, caches, and what fails."""

import base64
import gc
import inspect
import random
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

import da3_export.parity.cases
import da3_export.parity.measure
import da3_runtime.backends.gpu.cuda
import da3_runtime.backends.tensorrt
import da3_runtime.inference.backend_choice
from da3_export.onnx_to_plan import RTX_GPUS
from da3_export.parity.cases import Case
from da3_runtime.backends.gpu import plan_runner
from da3_runtime.backends.gpu.rtx_kernel_cache import SUFFIX
from da3_runtime.backends.tensorrt import TensorRT, TensorRTRTX
from da3_runtime.errors import BackendUnavailableError, DeviceLostError, InferenceError, OutOfMemoryError
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.network_io import RawOutputs
from da3_runtime.serve.service import Service
from da3_runtime.settings import Settings
from da3_runtime.store.manifest import Kind, read_manifest
from tests.conftest import NANO, PHOTOS, damage
from tests.support import fake_gpu

MODULES = {TensorRT: "tensorrt", TensorRTRTX: "tensorrt_rtx"}
SHAPES = [(1, 84, 112), (1, 126, 98), (2, 84, 112), (1, 140, 140), (3, 98, 84)]
VERSION = "11.4.0.106"


class Gpu:
    """A pretended GPU, its library, and an engine folder with a plan of it."""

    def __init__(self, monkeypatch, engine_copy, backend, capability="9.0"):
        self.backend, self.folder = backend, engine_copy.folder
        self.settings = Settings(engine_dir=engine_copy.engine_dir, model_id=NANO, backend=backend.name)
        self.cudart = fake_gpu.Cudart(capability)
        plan = self.folder / "model.fp16.rtx.plan"
        self.change(library=VERSION, compute_capabilities=["9.0"])
        manifest = read_manifest(self.folder)
        entry = manifest.graphs["model"]
        outputs = [spec.name for spec in entry.outputs]
        profiles = [(p.minimum, p.optimum, p.maximum) for p in manifest.profiles]
        self.library = fake_gpu.Library(
            MODULES[backend],
            VERSION,
            self.cudart,
            plan,
            self.folder / "model.fp32.onnx",
            outputs,
            profiles,
        )
        monkeypatch.setitem(sys.modules, MODULES[backend], self.library)
        monkeypatch.setattr(self.library, "__spec__", object(), raising=False)
        monkeypatch.setattr(da3_runtime.backends.gpu.cuda, "bindings", lambda: self.cudart)
        for name in ("has_bindings", "has_cuda_driver"):
            monkeypatch.setattr(da3_runtime.backends.gpu.cuda, name, lambda: True)

    def change(self, **fields):
        """Put the plan into the manifest as one of this backend, with other fields."""
        manifest = read_manifest(self.folder)
        entry = manifest.graphs["model"]
        (old,) = [each for each in entry.artefacts.values() if each.files[0].name.endswith(".plan")]
        kept = {name: each for name, each in entry.artefacts.items() if each is not old}
        plan = replace(old, kind=self.backend.kind, **fields)
        graphs = {"model": replace(entry, artefacts=kept | {plan.name: plan})}
        path = self.folder / "manifest.json"
        damage(path, replace(manifest, graphs=graphs).to_json().encode())

    def load(self, **changes):
        return load_backend(replace(self.settings, **changes))

    def expected(self, images):
        return self.library.run(images)

    def count(self, name):
        return self.cudart.calls.count(name)

    @property
    def allocations(self):
        return self.count("cudaMalloc") + self.count("cudaMallocHost")


@pytest.fixture(params=[TensorRT, TensorRTRTX], ids=lambda cls: cls.name)
def gpu(monkeypatch, engine_copy, request):
    return Gpu(monkeypatch, engine_copy, request.param)


@pytest.fixture
def trt(monkeypatch, engine_copy):
    return Gpu(monkeypatch, engine_copy, TensorRT)


@pytest.fixture
def rtx(monkeypatch, engine_copy):
    return Gpu(monkeypatch, engine_copy, TensorRTRTX)


def images_of(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def check(gpu, raw, images):
    for name, values in gpu.expected(images).items():
        assert getattr(raw, name).dtype == np.float32
        np.testing.assert_array_equal(getattr(raw, name), values)


def test_outputs_are_the_engine_s_whatever_shape_came_before(gpu):
    loaded = gpu.load()
    assert (loaded.backend.name, loaded.backend.precision) == (gpu.backend.name, "fp16")
    order = random.Random(0).choices(SHAPES, k=25)
    kept = []
    for seed, shape in enumerate(order):
        images = images_of(shape, seed)
        kept.append((loaded.run(images)["model"], images))
    for raw, images in kept:
        check(gpu, raw, images)


def test_threads_get_their_own_answers(gpu):
    loaded = gpu.load()
    batches = [images_of(shape, seed) for seed, shape in enumerate(SHAPES * 3)]
    with ThreadPoolExecutor(5) as threads:
        for raw, images in zip(threads.map(loaded.run, batches), batches, strict=True):
            check(gpu, raw["model"], images)


def test_nothing_is_allocated_for_shapes_that_fit(gpu):
    loaded = gpu.load()
    loaded.run(images_of((3, 140, 140)))
    before = gpu.allocations
    for shape in SHAPES * 2:
        loaded.run(images_of(shape))
    assert gpu.allocations == before
    assert gpu.count("cudaStreamCreateWithFlags") == 1


def test_there_is_one_copy_in_and_one_out(rtx):
    loaded = rtx.load()
    for runs in (1, 2, 3):
        loaded.run(images_of((1, 84, 84)))
        assert rtx.count("cudaMemcpyAsync") == 2 * runs


def test_tensorrt_replays_a_graph_from_the_second_batch_of_a_shape_on(trt):
    loaded = trt.load()
    for runs, launches in ((1, 0), (2, 1), (3, 2), (4, 3)):
        images = images_of((1, 84, 84), runs)
        check(trt, loaded.run(images)["model"], images)
        assert trt.count("cudaGraphLaunch") == launches
    assert trt.count("cudaGraphInstantiate") == 1
    (context,) = trt.library.engines[0].contexts
    assert context.executed == 2, "once to run, once to be captured"


def test_tensorrt_rtx_captures_by_itself(rtx):
    loaded = rtx.load()
    for _ in range(3):
        loaded.run(images_of((1, 84, 84)))
    assert rtx.count("cudaStreamBeginCapture") == 0
    (context,) = rtx.library.engines[0].contexts
    assert context.strategy.cuda_graph_strategy == "whole"
    assert context.strategy.strategy == "user"


def test_a_larger_shape_moves_the_memory_and_every_graph_is_captured_anew(trt):
    loaded = trt.load()
    small, large = images_of((1, 84, 84)), images_of((1, 504, 504))
    for images in (small, small, large, small, small, small):
        check(trt, loaded.run(images)["model"], images)
    assert trt.count("cudaGraphInstantiate") == 2
    assert trt.count("cudaGraphExecDestroy") == 1


def test_where_a_graph_cannot_be_captured_it_is_not_tried_again(trt):
    trt.cudart.can_capture = False
    loaded = trt.load()
    for seed in range(4):
        images = images_of((1, 84, 84), seed)
        check(trt, loaded.run(images)["model"], images)
    assert trt.count("cudaStreamBeginCapture") == 1
    assert trt.count("cudaGraphLaunch") == 0


def test_contexts_do_not_grow_in_number_with_the_shapes(gpu):
    loaded = gpu.load()
    shapes = [(1, 84, 84 + 14 * n) for n in range(plan_runner.MAX_SHAPES + 3)]
    for shape in shapes + shapes:
        images = images_of(shape)
        check(gpu, loaded.run(images)["model"], images)
    (engine,) = gpu.library.engines
    assert len(engine.contexts) <= plan_runner.MAX_SHAPES


def test_a_batch_that_no_profile_takes_is_refused_and_hurts_nothing(gpu):
    loaded = gpu.load()
    with pytest.raises(InferenceError, match="failed on a batch of shape"):
        loaded.run(images_of((9, 84, 84)))
    images = images_of((2, 84, 84))
    check(gpu, loaded.run(images)["model"], images)


def test_everything_is_given_back(gpu):
    loaded = gpu.load()
    for shape in SHAPES * 3:
        loaded.run(images_of(shape))
    assert gpu.cudart.blocks
    engine = weakref.ref(gpu.library.engines.pop())
    loaded.close()
    gc.collect()
    assert engine() is None
    with pytest.raises(InferenceError):
        loaded.run(images_of(SHAPES[0]))
    assert not gpu.cudart.blocks
    assert not gpu.cudart.graphs
    assert not gpu.cudart.streams


def memory_for(shape):
    """Bytes that one batch of a shape takes, in the steps that memory is asked for."""
    pixels = int(np.prod(shape))
    step = da3_runtime.backends.gpu.cuda._GROW_BY
    sizes = [pixels * 3, pixels * 3, pixels * 8 + 512, pixels * 8 + 512, pixels * 3 * fake_gpu.SCRATCH]
    return sum(-(-size // step) * step for size in sizes)


def test_without_memory_for_a_batch_the_images_go_one_by_one(gpu):
    loaded = gpu.load()
    gpu.cudart.memory = memory_for((2, 252, 252))
    images = images_of((4, 252, 252))
    raw = loaded.run(images)["model"]
    for index in range(len(images)):
        one = {
            name: values[index : index + 1]
            for name, values in raw._asdict().items()
            if values is not None
        }
        check(gpu, RawOutputs(**one), images[index : index + 1])


def test_without_memory_for_one_image_it_is_said_and_smaller_ones_still_run(gpu):
    loaded = gpu.load()
    gpu.cudart.memory = memory_for((1, 84, 84))
    with pytest.raises(OutOfMemoryError, match="smaller processing_res") as caught:
        loaded.run(images_of((1, 504, 504)))
    assert caught.value.status == 507
    images = images_of((1, 84, 84))
    check(gpu, loaded.run(images)["model"], images)


def test_a_lack_of_memory_that_only_the_library_s_log_tells_is_known(gpu):
    loaded = gpu.load()
    gpu.library.fails = "Requested amount of GPU memory (9 bytes) could not be allocated: out of memory"
    with pytest.raises(OutOfMemoryError):
        loaded.run(images_of((1, 84, 84)))
    gpu.library.fails = "Assertion failed"
    with pytest.raises(InferenceError) as caught:
        loaded.run(images_of((1, 84, 84)))
    assert type(caught.value) is InferenceError
    gpu.library.fails = ""
    images = images_of((1, 84, 84))
    check(gpu, loaded.run(images)["model"], images)


def test_a_lost_gpu_is_told_from_a_failed_run(gpu):
    loaded = gpu.load()
    loaded.run(images_of((1, 84, 84)))
    gpu.cudart.lost = True
    with pytest.raises(DeviceLostError):
        loaded.run(images_of((1, 84, 84)))


def test_a_service_whose_gpu_is_lost_asks_for_a_fresh_worker(gpu):
    service = Service(replace(gpu.settings, processing_res=140))
    job = {"image_base64": base64.b64encode((PHOTOS / "cat.jpg").read_bytes()).decode()}
    assert service.answer(job, "1")["backend"] == gpu.backend.name
    gpu.cudart.lost = True
    for number in ("2", "3"):
        answer = service.answer(job, number)
        assert (answer["status"], answer["refresh_worker"]) == (500, True)
        assert "fresh one" in answer["error"]
    gpu.cudart.lost = False
    assert service.answer(job, "4")["refresh_worker"], "once lost, the process is not trusted again"


def test_a_service_without_memory_answers_507_and_goes_on(gpu):
    service = Service(gpu.settings)
    job = {"image_base64": base64.b64encode((PHOTOS / "cat.jpg").read_bytes()).decode()}
    gpu.cudart.memory = memory_for((1, 140, 140))
    answer = service.answer(job | {"processing_res": 504}, "1")
    assert answer["status"] == 507
    assert "processing_res" in answer["error"]
    assert service.answer(job | {"processing_res": 140}, "2")["backend"] == gpu.backend.name


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"compute_capabilities": ["8.9"]}, "is for compute capability 8.9, and this GPU has 9.0"),
        ({"compute_capabilities": ["10.0+"]}, r"for compute capability 10.0\+, and this GPU has 9.0"),
        (
            {"compute_capabilities": [*RTX_GPUS]},
            r"capability 8.0, 8.6, 8.9, 12.0\+, and this GPU has 9.0",
        ),
        ({"library": "11.3.0.99"}, "was built with version 11.3.0.99, and .* 11.4.0.106 is installed"),
        ({"library": "11.3.0.99", "version_compatible": True}, "was built with version 11.3.0.99"),
        ({"library": "11.5.0.1", "version_compatible": True}, "was built with version 11.5.0.1"),
    ],
)
def test_a_plan_that_cannot_run_here_is_passed_over_before_it_is_read(gpu, fields, reason):
    gpu.change(**fields)
    (gpu.folder / "model.fp16.rtx.plan").unlink()
    with pytest.raises(BackendUnavailableError, match=reason):
        gpu.load()
    loaded = gpu.load(backend="auto")
    assert loaded.backend.name == "onnxruntime-cpu"
    assert any(f"{gpu.backend.name} was skipped" in warning for warning in loaded.warnings)


@pytest.mark.parametrize(
    "fields",
    [
        {"compute_capabilities": ["8.0+"]},
        {"compute_capabilities": ["8.6", "9.0"]},
    ],
)
def test_a_plan_made_for_more_than_this_runs(gpu, fields):
    gpu.change(**fields)
    assert gpu.load().backend.name == gpu.backend.name


def test_the_plan_made_for_just_this_gpu_goes_first(trt):
    (entry,) = read_manifest(trt.folder).graphs.values()
    (plan,) = entry.of_kind(Kind.TENSORRT)
    for_all = replace(plan, compute_capabilities=["8.0+"])
    chosen = da3_runtime.backends.tensorrt.runnable([for_all, plan], "9.0", "tensorrt", VERSION)
    assert chosen is plan
    assert da3_runtime.backends.tensorrt.runnable([plan, for_all], "8.6", "tensorrt", VERSION) is for_all


def test_tensorrt_lean_takes_version_compatible_plans_only(trt):
    (entry,) = read_manifest(trt.folder).graphs.values()
    (plan,) = entry.of_kind(Kind.TENSORRT)
    lean = da3_runtime.backends.tensorrt.LEAN
    with pytest.raises(BackendUnavailableError, match="is not version-compatible"):
        da3_runtime.backends.tensorrt.runnable([plan], "9.0", lean, VERSION)
    compatible = replace(plan, version_compatible=True)
    assert da3_runtime.backends.tensorrt.runnable([compatible], "9.0", lean, VERSION) is compatible


def test_tensorrt_lean_answers_where_it_is_all_there_is(monkeypatch, engine_copy):
    monkeypatch.setitem(MODULES, TensorRT, da3_runtime.backends.tensorrt.LEAN)
    monkeypatch.delattr(fake_gpu.Runtime, "get_engine_validity")
    gpu = Gpu(monkeypatch, engine_copy, TensorRT)
    gpu.change(version_compatible=True)
    images = images_of(SHAPES[0])
    check(gpu, gpu.load().backend.run(images), images)


def test_what_the_library_says_of_a_plan_is_the_reason(gpu):
    gpu.library.validity, gpu.library.causes = gpu.library.EngineValidity.INVALID, 2
    with pytest.raises(BackendUnavailableError, match=r"cannot run here \(UNSUPPORTED_CC\)"):
        gpu.load()


def test_a_damaged_plan_is_passed_over(gpu):
    path = gpu.folder / "model.fp16.rtx.plan"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    damage(path, bytes(data))
    with pytest.raises(BackendUnavailableError, match="does not match the digest"):
        gpu.load()
    assert gpu.load(backend="auto").backend.name == "onnxruntime-cpu"


@pytest.fixture
def quick_parity(monkeypatch):
    """Measure plans only, on one batch that a profile takes and one that none takes."""
    cases = [Case(84, 112, 1), Case(84, 1036, 2)]
    monkeypatch.setattr(da3_export.parity.cases, "all_cases", lambda large: cases)
    monkeypatch.setattr(da3_export.parity.measure, "SUBJECTS", dict.fromkeys(Kind, ()))


def test_where_there_is_a_gpu_parity_runs_the_plan(gpu, quick_parity):
    report = da3_export.parity.measure.measure_engine(gpu.settings)
    assert {(row.artefact, row.height, row.width, row.batch) for row in report.rows} == {
        (gpu.backend.kind, 84, 112, 1)
    }
    assert report.ok
    assert report.not_checked == {}
    assert "fp16 on Pretended GPU" in report.table()
    assert not gpu.cudart.blocks


def test_parity_finds_a_plan_that_errs(gpu, quick_parity, monkeypatch):
    right = gpu.library.run
    monkeypatch.setattr(
        gpu.library, "run", lambda images: right(images) | {"depth": right(images)["depth"] * 1.01}
    )
    report = da3_export.parity.measure.measure_engine(gpu.settings)
    assert not report.ok
    assert {row.output for row in report.rows if not row.ok} == {"depth"}


def test_parity_says_why_a_plan_was_not_run(gpu, quick_parity):
    gpu.change(compute_capabilities=["8.9"])
    report = da3_export.parity.measure.measure_engine(gpu.settings)
    (reason,) = report.not_checked.values()
    assert "is for compute capability 8.9, and this GPU has 9.0" in reason


def cache_files(folder):
    return sorted(folder.glob(f"*{SUFFIX}"))


def test_specialised_kernels_are_kept_next_to_the_engine_and_found_again(rtx):
    loaded = rtx.load()
    loaded.run(images_of((1, 84, 84)))
    (path,) = cache_files(rtx.folder)
    loaded.run(images_of((1, 84, 98)))
    loaded.close()
    assert cache_files(rtx.folder) == [path]
    saved = path.read_bytes()
    again = rtx.load()
    assert rtx.library.cache.shapes == [b"1x84x84x3", b"1x84x98x3"]
    again.run(images_of((1, 84, 98)))
    again.close()
    assert path.read_bytes() == saved


@pytest.mark.parametrize("content", [b"", b"garbage", "one bit", "truncated"])
def test_a_damaged_cache_is_ignored_and_made_anew(rtx, content):
    first = rtx.load()
    first.run(images_of((1, 84, 84)))
    first.close()
    (path,) = cache_files(rtx.folder)
    good = path.read_bytes()
    spoiled = {"one bit": good[:-1] + bytes([good[-1] ^ 1]), "truncated": good[:-3]}
    path.write_bytes(spoiled.get(content, content))
    second = rtx.load()
    assert rtx.library.cache.shapes == []
    images = images_of((1, 84, 84))
    check(rtx, second.run(images)["model"], images)
    assert path.read_bytes() == good


def test_a_cache_of_another_machine_is_made_anew(rtx):
    first = rtx.load()
    first.run(images_of((1, 84, 84)))
    first.close()
    rtx.library.machine = b"another driver"
    second = rtx.load()
    assert rtx.library.cache.shapes == []
    second.run(images_of((1, 84, 84)))
    (path,) = cache_files(rtx.folder)
    assert b"another driver" in path.read_bytes()


def test_where_the_engine_cannot_be_written_the_cache_lies_elsewhere(rtx, tmp_path, monkeypatch):
    monkeypatch.setattr("da3_runtime.backends.gpu.rtx_kernel_cache.os.access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    rtx.load().run(images_of((1, 84, 84)))
    assert cache_files(rtx.folder) == []
    assert len(cache_files(tmp_path / "user" / "da3-engines")) == 1
    rtx.load(runtime_cache_dir=tmp_path / "named").run(images_of((1, 84, 84)))
    assert len(cache_files(tmp_path / "named")) == 1


def test_a_cache_that_cannot_be_saved_stops_nothing(rtx, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    loaded = rtx.load(runtime_cache_dir=tmp_path / "file")
    images = images_of((1, 84, 84))
    check(rtx, loaded.run(images)["model"], images)
    assert "cannot be saved" in caplog.text


REAL = {
    fake_gpu.Engine: "ICudaEngine",
    fake_gpu.Context: "IExecutionContext",
    fake_gpu.Config: "IRuntimeConfig",
    fake_gpu.Cache: "IRuntimeCache",
    fake_gpu.Runtime: "Runtime",
}
OWN = {"library"}


@pytest.mark.parametrize("pretended", REAL, ids=lambda cls: cls.__name__)
def test_the_pretended_library_has_nothing_that_the_real_one_lacks(pretended):
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    real = getattr(trt, REAL[pretended])
    methods = [
        (name, value)
        for name, value in vars(pretended).items()
        if not name.startswith("_") and name not in OWN
    ]
    assert methods
    for name, method in methods:
        assert hasattr(real, name), name
        taken = list(inspect.signature(method).parameters)[1:]
        documented = getattr(real, name).__doc__
        for parameter in taken:
            assert f"{parameter}:" in documented, (name, parameter)
    properties = {
        "num_io_tensors", "num_optimization_profiles", "active_optimization_profile",
        "cuda_graph_strategy",
    }  # fmt: skip
    assert all(any(hasattr(getattr(trt, cls), name) for cls in REAL.values()) for name in properties)


def test_the_pretended_module_has_nothing_that_the_real_one_lacks():
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert trt.ExecutionContextAllocationStrategy.USER_MANAGED is not None
    assert trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE is not None
    assert trt.ILogger.Severity.ERROR is not None
    for name, value in fake_gpu.Library.EngineInvalidityDiagnostics.__members__.items():
        assert int(getattr(trt.EngineInvalidityDiagnostics, name)) == value
    assert int(trt.EngineValidity.INVALID) == fake_gpu.Library.EngineValidity.INVALID
    assert trt.uint8 != trt.float32
