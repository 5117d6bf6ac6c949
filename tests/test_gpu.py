"""What only a GPU can show: every backend that can run here, against FP32 on the CPU."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from export.parity import Case, case_images
from runtime.backends import BACKENDS
from runtime.backends.cuda import has_cuda_driver
from runtime.backends.eager import Eager
from runtime.backends.onnxruntime import OnnxRuntimeCpu
from runtime.backends.runtime_cache import SUFFIX
from runtime.backends.tensorrt import TensorRTRTX
from runtime.errors import OutOfMemoryError
from runtime.select import load_backend
from runtime.settings import Settings
from tests.conftest import NANO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_cuda_driver(), reason="there is no NVIDIA driver on this machine"),
]
CASES = [Case(140, 98, 1), Case(364, 504, 1), Case(84, 112, 3), Case(140, 98, 1), Case(504, 504, 4)]
# Mean relative error of depth against FP32: FP16, and upstream's bf16.
ALLOWED = {"fp16": 5e-3, "bf16": 2e-2}
ON_GPU = [cls for cls in BACKENDS if cls not in (OnnxRuntimeCpu,) and cls.automatic]


def load(engine, cls, **changes):
    reason = cls.unavailable()
    if reason is not None:
        pytest.skip(reason)
    given = {"engine_dir": engine.engine_dir, "model_id": NANO, "backend": cls.name} | changes
    return load_backend(Settings(**given))


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
        loaded.run(case_images(Case(504, 504, 2)))
        loaded.close()
        used.append(-torch.cuda.mem_get_info()[0])
    assert used[-1] - used[1] < 64 * 2**20, "the first time loads libraries"


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
@pytest.mark.parametrize("cls", [cls for cls in ON_GPU if cls is not Eager], ids=lambda cls: cls.name)
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
