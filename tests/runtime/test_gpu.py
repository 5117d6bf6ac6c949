"""What only a GPU can show: every backend that can run here, against FP32 on the CPU."""

import math
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from da3_export.parity.cases import Case, case_images
from da3_runtime.backends import BACKENDS
from da3_runtime.backends.eager import Eager
from da3_runtime.backends.gpu import plan_runner
from da3_runtime.backends.gpu.cuda import bindings, call, has_cuda_driver
from da3_runtime.backends.gpu.plan_runner import PlanRunner
from da3_runtime.backends.gpu.rtx_kernel_cache import SUFFIX
from da3_runtime.backends.onnxruntime import OnnxRuntimeCpu
from da3_runtime.backends.onnxruntime_cuda import GRAPHS_FROM, OnnxRuntimeCuda, captures_graphs
from da3_runtime.backends.tensorrt import TensorRTRTX
from da3_runtime.errors import BackendUnavailableError, OutOfMemoryError
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.network_io import IMAGES, input_specs, output_specs
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.extras import is_installed
from tests.support.paths import NANO, ROOT
from tests.support.processes import clean_env

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_cuda_driver(), reason="there is no NVIDIA driver on this machine"),
]
CASES = [Case(140, 98, 1), Case(364, 504, 1), Case(84, 112, 3), Case(140, 98, 1), Case(504, 504, 4)]
# Mean relative error of depth against FP32: FP16, and upstream's bf16.
ALLOWED = {"fp16": 5e-3, "bf16": 2e-2}
ON_GPU = [cls for cls in BACKENDS if cls not in (OnnxRuntimeCpu, Eager) and cls.automatic]


def load(engine, cls, **changes):
    reason = cls.unavailable()
    if reason is not None:
        pytest.skip(reason)
    given = {"engine_dir": engine.engine_dir, "model_id": NANO, "backend": cls.name} | changes
    try:
        return load_backend(EngineSettings(**given))
    except BackendUnavailableError as error:
        if "is for compute capability" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module")
def expected(engine):
    cpu = load(engine, OnnxRuntimeCpu)
    return {case: cpu.run(case_images(case))["model"].depth for case in CASES}


def check(loaded, case, expected):
    depth = loaded.run(case_images(case))["model"].depth
    error = np.mean(np.abs(depth - expected[case]) / expected[case])
    assert error <= ALLOWED[loaded.backend.precision]


@pytest.mark.parametrize("cls", ON_GPU, ids=lambda cls: cls.name)
def test_depth_is_that_of_fp32_whatever_shape_came_before(engine, cls, expected):
    loaded = load(engine, cls)
    for case in CASES * 3:
        check(loaded, case, expected)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda case: check(loaded, case, expected), CASES * 3))
    loaded.close()


@pytest.mark.parametrize("cls", ON_GPU, ids=lambda cls: cls.name)
def test_what_was_loaded_is_given_back(engine, cls):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA, and tells no free memory")
    used = []
    for _ in range(4):
        loaded = load(engine, cls)
        for _ in range(3):
            loaded.run(case_images(Case(504, 504, 2)))
        loaded.close()
        used.append(-torch.cuda.mem_get_info()[0])
    assert used[-1] - used[1] < 64 * 2**20, "the first time loads libraries"


def test_onnx_runtime_captures_the_network_as_a_cuda_graph(engine):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA, and profiles none")
    loaded = load(engine, OnnxRuntimeCuda)
    if not captures_graphs():
        pytest.skip(f"only from onnxruntime {GRAPHS_FROM} on")
    images, others = case_images(CASES[0]), case_images(CASES[1])
    answers = [loaded.run(images)["model"].depth for _ in range(3)]
    loaded.run(others)
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profiler:
        answers.append(loaded.run(images)["model"].depth)
    calls = [event.name for event in profiler.events() if event.name.startswith(("cuda", "cuLaunch"))]
    assert calls.count("cudaGraphLaunch") == 1
    assert not [name for name in calls if "LaunchKernel" in name]
    for replayed in answers[1:]:
        np.testing.assert_array_equal(replayed, answers[0])
    loaded.close()


def test_the_second_start_finds_the_specialised_kernels(engine, tmp_path):
    loaded = load(engine, TensorRTRTX, runtime_cache_dir=tmp_path)
    loaded.run(case_images(CASES[0]))
    loaded.close()
    (path,) = tmp_path.glob(f"*{SUFFIX}")
    size = path.stat().st_size
    again = load(engine, TensorRTRTX, runtime_cache_dir=tmp_path)
    again.run(case_images(CASES[0]))
    again.close()
    assert path.stat().st_size == size, "nothing was specialised anew"


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ, reason="takes all of the GPU's memory: run pytest -m gpu alone"
)
@pytest.mark.parametrize("cls", ON_GPU, ids=lambda cls: cls.name)
def test_a_lack_of_memory_is_said_and_survived(engine, cls, expected):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA, and can take no memory")
    loaded = load(engine, cls)
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - 48 * 2**20, dtype=torch.uint8, device="cuda")
    with pytest.raises(OutOfMemoryError):
        loaded.run(case_images(Case(1036, 1036, 1)))
    del taken
    torch.cuda.empty_cache()
    check(loaded, CASES[0], expected)
    loaded.close()


LOSE_THE_GPU = """
import sys
import torch
from da3_export.parity.cases import Case, case_images
from da3_runtime.backends.gpu.cuda import is_lost
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.settings import Settings

loaded = load_backend(Settings.from_env().engine)
images = case_images(Case(140, 98, 1))
for _ in range(3):
    loaded.run(images)
assert not is_lost()
numbers = torch.zeros(4, device="cuda")
try:
    print(numbers[torch.tensor([10**6], device="cuda")], file=sys.stderr)
except RuntimeError:
    pass
for _ in range(2):
    try:
        loaded.run(images)
    except Exception as error:
        print(type(error).__name__)
"""


@pytest.mark.parametrize("cls", ON_GPU, ids=lambda cls: cls.name)
def test_a_gpu_that_fails_for_good_is_told_from_everything_else(engine, cls):
    """A kernel that another library runs out of bounds takes the process's context with it."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA, and can fail on none")
    load(engine, cls).close()
    done = subprocess.run(
        [sys.executable, "-c", LOSE_THE_GPU],
        cwd=ROOT,
        env=clean_env(MODEL_ID=NANO, ENGINE_DIR=str(engine.engine_dir), BACKEND=cls.name),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == ["DeviceLostError"] * 2, done.stderr[-2000:]


class Copying:
    """A stand-in for a plan's context, whose only output is its input, copied on the GPU."""

    active_optimization_profile = 0

    def __init__(self):
        self.addresses = {}

    def set_input_shape(self, name, shape):
        self.shape = shape
        return True

    def infer_shapes(self):
        return []

    def get_tensor_shape(self, name):
        return (math.prod(self.shape) // 4,)

    def update_device_memory_size_for_shapes(self):
        return 10 * math.prod(self.shape)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def set_device_memory(self, address, size):
        self.scratch = address

    def execute_async_v3(self, stream):
        """By way of the scratch memory."""
        cudart, size = bindings(), math.prod(self.shape)
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        call(cudart.cudaMemcpyAsync, self.scratch, self.addresses["images"], size, kind, stream)
        call(cudart.cudaMemcpyAsync, self.addresses["depth"], self.scratch, size, kind, stream)
        return True


class CopyingEngine:
    num_optimization_profiles = 1

    def get_tensor_profile_shape(self, name, index):
        return [(1, 1, 14, 14, 3), (1, 1, 14, 14, 3), (8, 1, 1036, 1036, 3)]


@pytest.mark.skipif(not is_installed("cuda.bindings"), reason="cuda-bindings is not installed")
@pytest.mark.parametrize("captures", [False, True])
def test_the_plans_runner_brings_back_what_was_on_the_gpu(captures):
    """Its streams, graphs and memory are real; the plan is not."""
    runner = PlanRunner(
        CopyingEngine(), input_specs([IMAGES]), output_specs(["depth"]), Copying, captures
    )
    sides = [
        (1, 1, 28, 28),
        (2, 1, 84, 56),
        (1, 1, 1036, 1036),
        (4, 1, 504, 504),
        *((1, 1, 28, 28 + 28 * n) for n in range(12)),
    ]

    def run(seed):
        rng = random.Random(seed)
        images = np.random.default_rng(seed).integers(0, 256, (*rng.choice(sides), 3), dtype=np.uint8)
        (output,) = runner.run({IMAGES: images})
        np.testing.assert_array_equal(output.view(np.uint8), images.reshape(-1))

    for seed in range(60):
        run(seed)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(run, range(60)))
    graphs = [binding.graph for binding in runner._bindings.values()]
    assert any(graph is not None for graph in graphs) == captures
    assert len(graphs) <= plan_runner.MAX_SHAPES
    runner.free()
    run(0)
    runner.close()
