"""TensorRT plans on the fake GPU of tests/support: buffers, shapes, CUDA graphs, kernel caches, failures."""

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
from da3_runtime.backends.gpu.capture_gate import GATE
from da3_runtime.backends.gpu.rtx_kernel_cache import SUFFIX
from da3_runtime.backends.tensorrt import TensorRT, TensorRTRTX
from da3_runtime.errors import BackendUnavailableError, DeviceLostError, InferenceError, OutOfMemoryError
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.inference.settings import InferenceSettings
from da3_runtime.network_io import ANYVIEW_INPUTS, RawOutputs, inputs_of
from da3_runtime.serve.service import Service
from da3_runtime.settings import Settings
from da3_runtime.store.manifest import Kind, Parity, describe, read_manifest
from da3_runtime.store.settings import EngineSettings
from tests.support import fake_gpu
from tests.support.engines import damage
from tests.support.paths import NANO, PHOTOS

MODULES = {TensorRT: "tensorrt", TensorRTRTX: "tensorrt_rtx"}
# Scenes, views, height, width.
SHAPES = [
    (1, 1, 84, 112), (1, 1, 126, 98), (2, 1, 84, 112), (1, 1, 140, 140), (3, 1, 98, 84), (1, 3, 84, 84),
]  # fmt: skip
VERSION = "11.4.0.106"


class Gpu:
    """A fake GPU, a fake TensorRT library, and an engine folder with a plan for both."""

    def __init__(self, monkeypatch, engine_copy, backend, capability="9.0"):
        self.backend, self.folder = backend, engine_copy.folder
        self.settings = EngineSettings(
            engine_dir=engine_copy.engine_dir, model_id=NANO, backend=backend.name
        )
        self.cudart = fake_gpu.Cudart(capability)
        plan = self.folder / "model.fp16.rtx.plan"
        # The fake library knows a plan by its bytes, and every test reads them: a few do as well as 48 MB.
        damage(plan, random.Random(0).randbytes(100_000))
        self.change(library=VERSION, compute_capabilities=["9.0"], files=[describe(plan)])
        manifest = read_manifest(self.folder)
        entry = manifest.graphs["model"]
        profiles = [(p.minimum, p.optimum, p.maximum) for p in manifest.profiles]
        self.library = fake_gpu.Library(
            MODULES[backend],
            VERSION,
            self.cudart,
            plan,
            self.folder / "model.fp32.onnx",
            entry,
            profiles,
        )
        monkeypatch.setitem(sys.modules, MODULES[backend], self.library)
        monkeypatch.setattr(self.library, "__spec__", object(), raising=False)
        fake_gpu.install(monkeypatch, self.cudart)

    def change(self, **fields):
        """List the plan in the manifest as one of this backend, with other values of ``fields``."""
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
        return self.library.run(**inputs_of(ANYVIEW_INPUTS, images))

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
        np.testing.assert_array_equal(getattr(raw, name), values)


def test_outputs_are_right_whatever_shape_ran_before(gpu):
    loaded = gpu.load()
    assert (loaded.backend.name, loaded.backend.precision) == (gpu.backend.name, "fp16")
    order = random.Random(0).choices(SHAPES, k=25)
    kept = []
    for seed, shape in enumerate(order):
        images = images_of(shape, seed)
        kept.append((loaded.run(images)["model"], images))
    for raw, images in kept:
        check(gpu, raw, images)


def test_each_thread_gets_the_outputs_of_its_own_batch(gpu):
    loaded = gpu.load()
    batches = [images_of(shape, seed) for seed, shape in enumerate(SHAPES * 3)]
    with ThreadPoolExecutor(5) as threads:
        for raw, images in zip(threads.map(loaded.run, batches), batches, strict=True):
            check(gpu, raw["model"], images)


def test_shapes_that_fit_the_buffers_allocate_nothing(gpu):
    loaded = gpu.load()
    loaded.run(images_of((3, 1, 140, 140)))
    before = gpu.allocations
    for shape in SHAPES * 2:
        loaded.run(images_of(shape))
    assert gpu.allocations == before
    assert gpu.count("cudaStreamCreateWithFlags") == 1


def test_a_batch_is_one_copy_to_the_device_and_one_back(rtx):
    loaded = rtx.load()
    for runs in (1, 2, 3):
        loaded.run(images_of((1, 1, 84, 84)))
        assert rtx.count("cudaMemcpyAsync") == 2 * runs


def test_tensorrt_replays_a_cuda_graph_from_the_second_batch_of_a_shape_on(trt):
    loaded = trt.load()
    for runs, launches in ((1, 0), (2, 1), (3, 2), (4, 3)):
        images = images_of((1, 1, 84, 84), runs)
        check(trt, loaded.run(images)["model"], images)
        assert trt.count("cudaGraphLaunch") == launches
    assert trt.count("cudaGraphInstantiate") == 1
    (context,) = trt.library.engines[0].contexts
    assert context.executed == 2, "the first batch, and the capture"


def test_tensorrt_captures_no_graph_while_another_model_uses_the_gpu(trt):
    loaded = trt.load()
    images = images_of((1, 1, 84, 84))
    with GATE.use(), GATE.use():
        for _ in range(3):
            check(trt, loaded.run(images)["model"], images)
    assert trt.count("cudaStreamBeginCapture") == 0
    loaded.run(images)
    assert trt.count("cudaStreamBeginCapture") == 1


def test_tensorrt_rtx_captures_graphs_itself(rtx):
    loaded = rtx.load()
    for _ in range(3):
        loaded.run(images_of((1, 1, 84, 84)))
    assert rtx.count("cudaStreamBeginCapture") == 0
    (context,) = rtx.library.engines[0].contexts
    assert context.strategy.cuda_graph_strategy == "whole"
    assert context.strategy.strategy == "user"


def test_a_larger_shape_moves_the_buffers_and_graphs_are_captured_again(trt):
    loaded = trt.load()
    small, large = images_of((1, 1, 84, 84)), images_of((1, 1, 504, 504))
    for images in (small, small, large, small, small, small):
        check(trt, loaded.run(images)["model"], images)
    assert trt.count("cudaGraphInstantiate") == 2
    assert trt.count("cudaGraphExecDestroy") == 1


def test_a_failed_capture_is_not_tried_again(trt):
    trt.cudart.can_capture = False
    loaded = trt.load()
    for seed in range(4):
        images = images_of((1, 1, 84, 84), seed)
        check(trt, loaded.run(images)["model"], images)
    assert trt.count("cudaStreamBeginCapture") == 1
    assert trt.count("cudaGraphLaunch") == 0


def test_the_number_of_contexts_is_bounded(gpu):
    loaded = gpu.load()
    shapes = [(1, 1, 84, 84 + 14 * n) for n in range(plan_runner.MAX_SHAPES + 3)]
    for shape in shapes + shapes:
        images = images_of(shape)
        check(gpu, loaded.run(images)["model"], images)
    (engine,) = gpu.library.engines
    assert len(engine.contexts) <= plan_runner.MAX_SHAPES


def test_a_batch_outside_every_profile_is_refused_and_the_next_one_runs(gpu):
    loaded = gpu.load()
    with pytest.raises(InferenceError, match="failed on a batch of shape"):
        loaded.run(images_of((9, 1, 84, 84)))
    images = images_of((2, 1, 84, 84))
    check(gpu, loaded.run(images)["model"], images)


def test_close_releases_everything(gpu):
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
    """Bytes that the runner allocates for a batch of a shape."""
    pixels = int(np.prod(shape))
    step = da3_runtime.backends.gpu.cuda._GROW_BY
    sizes = [pixels * 3, pixels * 3, pixels * 8 + 512, pixels * 8 + 512, pixels * 3 * fake_gpu.SCRATCH]
    return sum(-(-size // step) * step for size in sizes)


def test_out_of_memory_for_a_batch_runs_its_images_one_by_one(gpu):
    loaded = gpu.load()
    gpu.cudart.memory = memory_for((2, 252, 252))
    images = images_of((4, 1, 252, 252))
    raw = loaded.run(images)["model"]
    for index in range(len(images)):
        one = {
            name: values[index : index + 1]
            for name, values in raw._asdict().items()
            if values is not None
        }
        check(gpu, RawOutputs(**one), images[index : index + 1])


def test_out_of_memory_for_one_image_is_507_and_smaller_ones_still_run(gpu):
    loaded = gpu.load()
    gpu.cudart.memory = memory_for((1, 84, 84))
    with pytest.raises(OutOfMemoryError, match="smaller processing_res") as caught:
        loaded.run(images_of((1, 1, 504, 504)))
    assert caught.value.status == 507
    images = images_of((1, 1, 84, 84))
    check(gpu, loaded.run(images)["model"], images)


def test_out_of_memory_is_recognized_in_the_library_s_log(gpu):
    loaded = gpu.load()
    gpu.library.fails = "Requested amount of GPU memory (9 bytes) could not be allocated: out of memory"
    with pytest.raises(OutOfMemoryError):
        loaded.run(images_of((1, 1, 84, 84)))
    gpu.library.fails = "Assertion failed"
    with pytest.raises(InferenceError) as caught:
        loaded.run(images_of((1, 1, 84, 84)))
    assert type(caught.value) is InferenceError
    gpu.library.fails = ""
    images = images_of((1, 1, 84, 84))
    check(gpu, loaded.run(images)["model"], images)


def test_a_lost_gpu_is_distinguished_from_a_failed_run(gpu):
    loaded = gpu.load()
    loaded.run(images_of((1, 1, 84, 84)))
    gpu.cudart.lost = True
    with pytest.raises(DeviceLostError):
        loaded.run(images_of((1, 1, 84, 84)))


def test_a_service_with_a_lost_gpu_asks_for_a_new_worker(gpu):
    service = Service(Settings(engine=gpu.settings, inference=InferenceSettings(processing_res=140)))
    job = {"image_base64": base64.b64encode((PHOTOS / "cat.jpg").read_bytes()).decode()}
    answer = service.answer(job, "1")
    assert (answer["backend"], answer["parity"]) == (gpu.backend.name, "unverified")
    gpu.cudart.lost = True
    for number in ("2", "3"):
        answer = service.answer(job, number)
        assert (answer["status"], answer["refresh_worker"]) == (500, True)
        assert answer["error"] == str(DeviceLostError())
    gpu.cudart.lost = False
    assert service.answer(job, "4")["refresh_worker"], "the process stays unusable after a lost GPU"


def test_a_service_out_of_memory_returns_507_and_serves_the_next_request(gpu):
    service = Service(Settings(engine=gpu.settings))
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
def test_an_unsuitable_plan_is_skipped_without_reading_its_file(gpu, fields, reason):
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
def test_a_plan_built_for_several_gpus_runs_on_each(gpu, fields):
    gpu.change(**fields)
    assert gpu.load().backend.name == gpu.backend.name


def test_a_plan_built_only_for_this_gpu_is_preferred(trt):
    (entry,) = read_manifest(trt.folder).graphs.values()
    (plan,) = entry.of_kind(Kind.TENSORRT)
    for_all = replace(plan, compute_capabilities=["8.0+"])
    chosen = da3_runtime.backends.tensorrt.runnable([for_all, plan], "9.0", "tensorrt", VERSION)
    assert chosen is plan
    assert da3_runtime.backends.tensorrt.runnable([plan, for_all], "8.6", "tensorrt", VERSION) is for_all


def test_tensorrt_lean_runs_only_version_compatible_plans(trt):
    (entry,) = read_manifest(trt.folder).graphs.values()
    (plan,) = entry.of_kind(Kind.TENSORRT)
    lean = da3_runtime.backends.tensorrt.LEAN
    with pytest.raises(BackendUnavailableError, match="is not version-compatible"):
        da3_runtime.backends.tensorrt.runnable([plan], "9.0", lean, VERSION)
    compatible = replace(plan, version_compatible=True)
    assert da3_runtime.backends.tensorrt.runnable([compatible], "9.0", lean, VERSION) is compatible


def test_tensorrt_lean_is_used_if_tensorrt_is_not_installed(monkeypatch, engine_copy):
    monkeypatch.setitem(MODULES, TensorRT, da3_runtime.backends.tensorrt.LEAN)
    monkeypatch.delattr(fake_gpu.Runtime, "get_engine_validity")
    gpu = Gpu(monkeypatch, engine_copy, TensorRT)
    gpu.change(version_compatible=True)
    images = images_of(SHAPES[0])
    check(gpu, gpu.load().backend.run(images), images)


def test_the_library_s_reason_for_refusing_a_plan_is_reported(gpu):
    gpu.library.validity, gpu.library.causes = gpu.library.EngineValidity.INVALID, 2
    with pytest.raises(BackendUnavailableError, match=r"cannot run here \(UNSUPPORTED_CC\)"):
        gpu.load()


def test_a_damaged_plan_is_skipped(gpu):
    path = gpu.folder / "model.fp16.rtx.plan"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    damage(path, bytes(data))
    with pytest.raises(BackendUnavailableError, match="does not match the digest"):
        gpu.load()
    assert gpu.load(backend="auto").backend.name == "onnxruntime-cpu"


@pytest.fixture
def quick_parity(monkeypatch):
    """Measure only plans, on a batch inside a profile and one outside every profile."""
    cases = [Case(84, 112, 1), Case(84, 1036, 2)]
    monkeypatch.setattr(da3_export.parity.cases, "all_cases", lambda *_: cases)
    monkeypatch.setattr(da3_export.parity.measure, "SUBJECTS", dict.fromkeys(Kind, ()))


def plan_parity(gpu):
    (plan,) = read_manifest(gpu.folder).graphs["model"].of_kind(gpu.backend.kind)
    return plan.parity


def test_parity_runs_the_plan_if_there_is_a_gpu(gpu, quick_parity):
    report = da3_export.parity.measure.measure_engine(gpu.settings)
    assert {(row.artefact, row.height, row.width, row.batch) for row in report.rows} == {
        (gpu.backend.kind, 84, 112, 1)
    }
    assert report.ok
    assert report.not_checked == {}
    assert "fp16 on Fake GPU" in report.table()
    assert plan_parity(gpu) == gpu.load().backend.parity == Parity.VERIFIED
    assert not gpu.cudart.blocks


def test_parity_fails_for_a_plan_with_wrong_depth(gpu, quick_parity, monkeypatch):
    right = gpu.library.run

    def wrong(**inputs):
        outputs = right(**inputs)
        return outputs | {"depth": outputs["depth"] * 1.01}

    monkeypatch.setattr(gpu.library, "run", wrong)
    report = da3_export.parity.measure.measure_engine(gpu.settings)
    assert not report.ok
    assert {row.output for row in report.rows if not row.ok} == {"depth"}
    assert plan_parity(gpu) == gpu.load().backend.parity == Parity.UNVERIFIED


def test_parity_reports_why_a_plan_was_not_run(gpu, quick_parity):
    gpu.change(compute_capabilities=["8.9"])
    report = da3_export.parity.measure.measure_engine(gpu.settings)
    (reason,) = report.not_checked.values()
    assert "is for compute capability 8.9, and this GPU has 9.0" in reason
    assert plan_parity(gpu) == Parity.UNVERIFIED


def test_a_verified_plan_stays_verified_where_it_cannot_be_measured(gpu, quick_parity):
    da3_export.parity.measure.measure_engine(gpu.settings)
    gpu.cudart.capability = {"major": 8, "minor": 6}
    report = da3_export.parity.measure.measure_engine(gpu.settings)
    assert report.not_checked
    assert plan_parity(gpu) == Parity.VERIFIED


def cache_files(folder):
    return sorted(folder.glob(f"*{SUFFIX}"))


def test_specialized_kernels_are_saved_beside_the_plan_and_loaded_again(rtx):
    loaded = rtx.load()
    loaded.run(images_of((1, 1, 84, 84)))
    (path,) = cache_files(rtx.folder)
    loaded.run(images_of((1, 1, 84, 98)))
    loaded.close()
    assert cache_files(rtx.folder) == [path]
    saved = path.read_bytes()
    again = rtx.load()
    assert rtx.library.cache.shapes == [b"1x1x84x84x3", b"1x1x84x98x3"]
    again.run(images_of((1, 1, 84, 98)))
    again.close()
    assert path.read_bytes() == saved


def test_kernels_compiled_in_the_background_are_saved_some_runs_later(rtx):
    loaded = rtx.load()
    images = images_of((1, 1, 84, 84))
    loaded.run(images)
    (path,) = cache_files(rtx.folder)
    rtx.library.cache.shapes.append(b"background")
    for _ in range(da3_runtime.backends.tensorrt._SAVE_AFTER[-1] - 1):
        assert b"background" not in path.read_bytes()
        loaded.run(images)
    assert b"background" in path.read_bytes()


@pytest.mark.parametrize("content", [b"", b"garbage", "one bit", "truncated"])
def test_a_damaged_kernel_cache_is_ignored_and_replaced(rtx, content):
    first = rtx.load()
    first.run(images_of((1, 1, 84, 84)))
    first.close()
    (path,) = cache_files(rtx.folder)
    good = path.read_bytes()
    spoiled = {"one bit": good[:-1] + bytes([good[-1] ^ 1]), "truncated": good[:-3]}
    path.write_bytes(spoiled.get(content, content))
    second = rtx.load()
    assert rtx.library.cache.shapes == []
    images = images_of((1, 1, 84, 84))
    check(rtx, second.run(images)["model"], images)
    assert path.read_bytes() == good


def test_a_kernel_cache_of_another_machine_is_replaced(rtx):
    first = rtx.load()
    first.run(images_of((1, 1, 84, 84)))
    first.close()
    rtx.library.machine = b"another driver"
    second = rtx.load()
    assert rtx.library.cache.shapes == []
    second.run(images_of((1, 1, 84, 84)))
    (path,) = cache_files(rtx.folder)
    assert b"another driver" in path.read_bytes()


def test_the_kernel_cache_moves_if_the_engine_folder_is_read_only(rtx, tmp_path, monkeypatch):
    monkeypatch.setattr("da3_runtime.backends.gpu.rtx_kernel_cache.os.access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    rtx.load().run(images_of((1, 1, 84, 84)))
    assert cache_files(rtx.folder) == []
    assert len(cache_files(tmp_path / "user" / "da3-engines")) == 1
    rtx.load(runtime_cache_dir=tmp_path / "named").run(images_of((1, 1, 84, 84)))
    assert len(cache_files(tmp_path / "named")) == 1


def test_a_kernel_cache_that_cannot_be_saved_is_only_logged(rtx, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    loaded = rtx.load(runtime_cache_dir=tmp_path / "file")
    images = images_of((1, 1, 84, 84))
    check(rtx, loaded.run(images)["model"], images)
    assert "cannot be saved" in caplog.text


@pytest.mark.parametrize("fake", fake_gpu.REAL, ids=lambda cls: cls.__name__)
def test_the_fake_library_has_only_methods_of_the_real_one(fake):
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    real = getattr(trt, fake_gpu.REAL[fake])
    methods = [
        (name, value)
        for name, value in vars(fake).items()
        if not name.startswith("_") and name not in fake_gpu.OWN
    ]
    assert methods
    for name, method in methods:
        assert hasattr(real, name), name
        parameters = list(inspect.signature(method).parameters)[1:]
        documented = getattr(real, name).__doc__
        for parameter in parameters:
            assert f"{parameter}:" in documented, (name, parameter)
    properties = {
        "num_io_tensors", "num_optimization_profiles", "active_optimization_profile",
        "cuda_graph_strategy",
    }  # fmt: skip
    assert all(
        any(hasattr(getattr(trt, cls), name) for cls in fake_gpu.REAL.values()) for name in properties
    )


def test_the_fake_module_has_only_names_of_the_real_one():
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    assert trt.ExecutionContextAllocationStrategy.USER_MANAGED is not None
    assert trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE is not None
    assert trt.ILogger.Severity.ERROR is not None
    for name, value in fake_gpu.Library.EngineInvalidityDiagnostics.__members__.items():
        assert int(getattr(trt.EngineInvalidityDiagnostics, name)) == value
    assert int(trt.EngineValidity.INVALID) == fake_gpu.Library.EngineValidity.INVALID
    assert trt.uint8 != trt.float32
