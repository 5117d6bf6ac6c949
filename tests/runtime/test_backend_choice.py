"""The choice of the backend; no damage ever leads to a wrong depth."""

import importlib.abc
import importlib.util
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import da3_runtime.backends.eager
import da3_runtime.backends.tensorrt
import da3_runtime.inference.backend_choice
from da3_export.parity.plans import unmeasurable
from da3_runtime.backends import BACKENDS
from da3_runtime.backends.base import Backend
from da3_runtime.backends.eager import EagerCuda
from da3_runtime.backends.gpu import cuda
from da3_runtime.backends.gpu.cuda import failure, has_cuda_driver
from da3_runtime.backends.onnxruntime import OnnxRuntimeCpu
from da3_runtime.errors import (
    ArtefactError,
    BackendUnavailableError,
    CheckpointError,
    DeviceLostError,
    InferenceError,
    ManifestError,
    OutOfMemoryError,
    SettingError,
)
from da3_runtime.inference.backend_choice import BESIDE_A_GPU, UNTRAINED, load_backend
from da3_runtime.inference.estimator import Estimator, Timings
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.inference.settings import InferenceSettings
from da3_runtime.store.checkpoint import BUNDLED_DIR
from da3_runtime.store.manifest import Kind, Parity
from da3_runtime.store.settings import EngineSettings
from da3_runtime.util.extras import is_installed
from da3_runtime.util.setting_group import AUTO
from da3_runtime.variants import find_variant
from tests.support import fake_gpu
from tests.support.engines import damage
from tests.support.paths import NANO, PHOTOS, SMALL

PHOTO = (PHOTOS / "cat.jpg").read_bytes()
RES = 140


SMALLER = InferenceSettings(processing_res=RES)


def settings(engine, **changes):
    given = {"model_id": engine.folder.parent.name} | changes
    return EngineSettings(engine_dir=engine.engine_dir, **given)


def depth(engine, **changes):
    estimator = Estimator.load(settings(engine, **changes), settings=SMALLER)
    return estimator.estimate(PHOTO, Timings()).depth.values, estimator.loaded


@pytest.fixture(scope="module")
def expected(engine):
    values, loaded = depth(engine, backend="onnxruntime-cpu")
    assert loaded.backend.name == "onnxruntime-cpu"
    return values


def test_backends_are_in_order_of_preference():
    assert [cls.name for cls in BACKENDS] == [
        "tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-tensorrt", "eager-cuda",
        "openvino", "onnxruntime-cpu", "eager",
    ]  # fmt: skip


@pytest.mark.skipif(has_cuda_driver(), reason="this machine has an NVIDIA driver")
def test_without_a_gpu_onnxruntime_cpu_runs_without_a_warning(engine):
    loaded = load_backend(settings(engine))
    assert loaded.backend.name == "onnxruntime-cpu"
    assert loaded.backend.precision == "fp32"
    assert loaded.warnings == []


@pytest.mark.skipif(not has_cuda_driver(), reason="there is no NVIDIA driver on this machine")
@pytest.mark.gpu
def test_prefers_eager_cuda_to_a_cpu_engine_when_no_engine_fits_the_gpu(engine_copy):
    for path in engine_copy.folder.glob("model.fp16.*"):
        damage(path, None)
    loaded = load_backend(settings(engine_copy))
    assert loaded.backend.name == "eager-cuda"
    assert any("eager ran instead" in warning for warning in loaded.warnings)


@pytest.mark.parametrize(
    ("driver", "cuda", "name"),
    [(True, True, "eager-cuda"), (True, False, "onnxruntime-cpu"), (False, True, "onnxruntime-cpu")],
)
def test_prefers_eager_to_a_cpu_engine_only_if_eager_has_a_gpu(engine, monkeypatch, driver, cuda, name):
    monkeypatch.setattr(da3_runtime.backends.eager, "has_cuda_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)
    monkeypatch.setattr(EagerCuda, "run", lambda backend, images: None)
    assert load_backend(settings(engine)).backend.name == name


@pytest.mark.parametrize("step", ["to", "run"])
def test_falls_back_to_the_cpu_engine_when_eager_cannot_use_the_gpu(engine, monkeypatch, step):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.") if step == "to" else OutOfMemoryError("none")

    monkeypatch.setattr(da3_runtime.backends.eager, "has_cuda_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", fail if step == "to" else lambda module, *_: module)
    monkeypatch.setattr(EagerCuda, "run", fail)
    loaded = load_backend(settings(engine))
    assert loaded.backend.name == "onnxruntime-cpu"
    assert loaded.warnings == ["eager-cuda was skipped: PyTorch cannot run the network on this GPU."]


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", "eager"])
def test_every_result_from_random_weights_has_a_warning(small_engine, backend):
    estimator = Estimator.load(settings(small_engine, backend=backend))
    assert estimator.loaded.backend.name == backend
    assert estimator.estimate(PHOTO, Timings()).warnings == [UNTRAINED]


@pytest.mark.parametrize("content", [None, b"", b"garbage", "truncated", "one bit"])
def test_falls_back_to_eager_with_the_same_depth_when_the_onnx_is_damaged(
    engine_copy, expected, content, caplog
):
    path = engine_copy.folder / "model.fp32.onnx"
    data = path.read_bytes()
    spoiled = bytearray(data)
    spoiled[len(data) // 2] ^= 1
    damage(path, {"truncated": data[:-1000], "one bit": bytes(spoiled)}.get(content, content))
    values, loaded = depth(engine_copy)
    assert loaded.backend.name == "eager"
    assert any("onnxruntime-cpu was skipped" in warning for warning in loaded.warnings)
    assert any("eager ran instead" in warning for warning in loaded.warnings)
    assert "eager" in caplog.text
    np.testing.assert_allclose(values, expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["model.fp16.onnx", "model.fp16.rtx.plan", "parity.json"])
def test_damage_to_files_of_other_backends_changes_nothing(engine_copy, expected, name):
    damage(engine_copy.folder / name, b"garbage")
    values, _ = depth(engine_copy, backend="onnxruntime-cpu")
    assert np.array_equal(values, expected)


@pytest.mark.parametrize("weights", [None, str(BUNDLED_DIR / NANO)])
def test_falls_back_to_eager_without_an_engine_folder(expected, tmp_path, weights):
    given = EngineSettings(engine_dir=tmp_path, model_id=NANO, weights=weights)
    estimator = Estimator.load(given, settings=SMALLER)
    assert estimator.loaded.backend.name == "eager"
    assert any("eager ran instead" in warning for warning in estimator.loaded.warnings)
    values = estimator.estimate(PHOTO, Timings()).depth.values
    np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_falls_back_to_eager_without_a_manifest(engine_copy, expected):
    damage(engine_copy.folder / "manifest.json", None)
    values, loaded = depth(engine_copy)
    assert loaded.backend.name == "eager"
    np.testing.assert_allclose(values, expected, rtol=1e-4)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema_version": 99}', "\x00"])
def test_a_damaged_manifest_is_a_clear_error(engine_copy, text):
    damage(engine_copy.folder / "manifest.json", text.encode())
    with pytest.raises(ManifestError, match="damaged"):
        load_backend(settings(engine_copy))


def test_another_models_engine_in_the_folder_is_a_clear_error(engine_copy):
    engine_copy.folder.parent.rename(engine_copy.engine_dir / "da3-base")
    with pytest.raises(ManifestError, match="da3-base with head dpt holds an engine of da3-nano"):
        load_backend(settings(engine_copy, model_id="da3-base"))


def test_a_manifest_cannot_point_outside_its_folder(engine_copy):
    path = engine_copy.folder / "manifest.json"
    data = json.loads(path.read_text())
    data["graphs"]["model"]["artefacts"]["onnx-fp32"]["files"][0]["name"] = "../../escape.onnx"
    damage(path, json.dumps(data).encode())
    with pytest.raises(ManifestError):
        load_backend(settings(engine_copy))


def test_eager_refuses_weights_that_are_not_the_engines(small_copy):
    weights = small_copy.folder / "checkpoint" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    damage(weights, bytes(data))
    with pytest.raises(CheckpointError, match="not those its engine was built from"):
        load_backend(settings(small_copy, backend="eager"))


def test_missing_random_weights_are_an_error_and_not_requested_from_the_hub(small_copy, tmp_path):
    shutil.rmtree(small_copy.folder / "checkpoint")
    for changes in ({}, {"weights": "random:0"}):
        with pytest.raises(CheckpointError, match="random:0 weights of da3-small are missing"):
            load_backend(settings(small_copy, backend="eager", **changes))
    with pytest.raises(CheckpointError, match="random:5 weights"):
        load_backend(EngineSettings(engine_dir=tmp_path / "none", model_id=SMALL, weights="random:5"))


def test_missing_engine_and_weights_are_one_clear_error(small_copy):
    damage(small_copy.folder / "model.fp32.onnx", b"garbage")
    shutil.rmtree(small_copy.folder / "checkpoint")
    (small_copy.folder / "checkpoint").mkdir()
    with pytest.raises(CheckpointError, match="No engine of da3-small with head dpt can run here"):
        load_backend(settings(small_copy))


PATH = "/opt/libraries/broken.so"
LIBRARY_ERRORS = [ImportError, OSError, RuntimeError, AttributeError, ValueError]


@pytest.mark.parametrize(
    ("backend", "parity"), [("onnxruntime-cpu", Parity.VERIFIED), ("eager", Parity.UNVERIFIED)]
)
def test_parity_is_that_of_the_artefact_that_runs(engine, backend, parity):
    assert load_backend(settings(engine, backend=backend)).parity == parity


def test_without_a_gpu_that_is_the_reason_whatever_is_not_installed(monkeypatch):
    monkeypatch.setattr(cuda, "has_cuda_driver", lambda: False)
    monkeypatch.setattr(cuda, "missing_package", lambda *_: "cuda-bindings is not installed")
    for kind in (Kind.TENSORRT, Kind.TENSORRT_RTX):
        assert unmeasurable(kind) == cuda.NO_DRIVER
    monkeypatch.setattr(cuda, "has_cuda_driver", lambda: True)
    assert unmeasurable(Kind.TENSORRT) == "cuda-bindings is not installed"


def test_a_model_is_verified_only_if_all_its_graphs_are():
    def loaded(*parities):
        graphs = {str(n): SimpleNamespace(parity=parity) for n, parity in enumerate(parities)}
        return Loaded(None, graphs, []).parity

    assert loaded(Parity.VERIFIED, Parity.VERIFIED) == Parity.VERIFIED
    assert loaded(Parity.VERIFIED, Parity.UNVERIFIED) == Parity.UNVERIFIED


class BrokenFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module, whose import raises an exception."""

    def __init__(self, name, error):
        self.name, self.error = name, error

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def exec_module(self, module):
        raise self.error


class BrokenModule:
    """A loaded module that raises an exception whenever it is used."""

    def __init__(self, error):
        self.error = error

    def __getattr__(self, name):
        raise self.error


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def break_import(monkeypatch, module, error):
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [BrokenFinder(module, error), *sys.meta_path])


def break_load(monkeypatch, module, error):
    target = {
        "onnxruntime-cpu": "onnxruntime.SessionOptions",
        "onnxruntime-cuda": "onnxruntime.preload_dlls",
        "eager-cuda": "torch.cuda.is_available",
    }.get(module)
    if target is None:
        monkeypatch.setitem(sys.modules, module, BrokenModule(error))
    else:
        monkeypatch.setattr(target, raising(error), raising=False)


@pytest.mark.parametrize(
    ("break_library", "error"),
    [
        (break_import, ImportError),
        (break_import, OSError),
        (break_load, RuntimeError),
        (break_load, AttributeError),
    ],
)
@pytest.mark.parametrize(
    ("backend", "module", "answers"),
    [
        ("tensorrt", "tensorrt", "onnxruntime-cpu"),
        ("tensorrt-rtx", "tensorrt_rtx", "onnxruntime-cpu"),
        ("onnxruntime-cuda", "onnxruntime", "eager"),
        ("eager-cuda", "torch", "onnxruntime-cpu"),
        ("onnxruntime-cpu", "onnxruntime", "eager"),
    ],
)
def test_the_next_backend_answers_if_a_library_cannot_be_imported_or_used(
    engine, monkeypatch, caplog, backend, module, answers, break_library, error
):
    chosen = tuple(cls for cls in BACKENDS if cls.name in (backend, answers))
    monkeypatch.setattr(da3_runtime.inference.backend_choice, "BACKENDS", chosen)
    monkeypatch.setattr(da3_runtime.inference.backend_choice, "_logged", set())
    fake_gpu.install(monkeypatch, fake_gpu.Cudart())
    monkeypatch.setattr(da3_runtime.backends.eager, "has_cuda_driver", lambda: backend == "eager-cuda")
    monkeypatch.setattr(da3_runtime.backends.tensorrt.TensorRT, "kind", Kind.TENSORRT_RTX)
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    is_plan = backend.startswith("tensorrt")
    broken = module if break_library is break_import or is_plan else backend
    break_library(monkeypatch, broken, error(f"cannot load {PATH}"))
    loads = [load_backend(settings(engine)) for _ in range(2)]
    for loaded in loads:
        assert loaded.backend.name == answers
        assert f"{backend} was skipped: it failed with {error.__name__}, see the log." in loaded.warnings
        assert PATH not in str(loaded.warnings)
    assert [PATH in record.getMessage() for record in caplog.records if record.exc_info] == [True]


def test_without_a_gpu_a_broken_library_is_reported_once(engine, monkeypatch):
    monkeypatch.setattr(cuda, "has_cuda_driver", lambda: False)
    break_import(monkeypatch, "onnxruntime", ImportError(PATH))
    assert load_backend(settings(engine)).warnings == [
        "onnxruntime-cpu was skipped: it failed with ImportError, see the log.",
        "No engine could be used; PyTorch eager ran instead.",
    ]


@pytest.mark.parametrize("error", LIBRARY_ERRORS)
def test_a_broken_last_backend_is_one_sentence_without_a_path(engine, monkeypatch, error):
    monkeypatch.setattr("da3_runtime.network.load.load_network", raising(error(f"cannot load {PATH}")))
    with pytest.raises(
        BackendUnavailableError, match=f"eager: it failed with {error.__name__}"
    ) as caught:
        load_backend(settings(engine, backend="eager"))
    assert PATH not in str(caught.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_while_loading_is_not_a_reason_to_fall_back(engine, monkeypatch, error):
    monkeypatch.setattr("onnxruntime.SessionOptions", raising(error()))
    with pytest.raises(error):
        load_backend(settings(engine))


def test_a_package_whose_parent_fails_on_import_counts_as_installed(monkeypatch):
    break_import(monkeypatch, "broken_parent", OSError(PATH))
    assert is_installed("broken_parent.child")
    monkeypatch.setitem(sys.modules, "made_by_hand", BrokenModule(AttributeError("__spec__")))
    assert is_installed("made_by_hand")
    assert not is_installed("no_such_parent.child")


def test_a_named_backend_runs_or_fails_without_a_fallback(engine, engine_copy, expected):
    values, loaded = depth(engine, backend="eager")
    assert loaded.backend.name == "eager"
    assert loaded.warnings == []
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    damage(engine_copy.folder / "model.fp32.onnx", b"garbage")
    with pytest.raises(BackendUnavailableError, match="onnxruntime-cpu"):
        load_backend(settings(engine_copy, backend="onnxruntime-cpu"))


def test_an_unknown_backend_lists_the_known_ones(engine):
    with pytest.raises(SettingError, match="auto, tensorrt, tensorrt-rtx"):
        load_backend(settings(engine, backend="tvm"))


@pytest.mark.parametrize("cls", BACKENDS, ids=lambda cls: cls.name)
def test_every_backend_loads_the_engine_or_gives_its_reason(engine, cls: type[Backend]):
    named = settings(engine, backend=cls.name, precision=cls.precisions[0])
    reason = cls.unavailable()
    if reason is None and AUTO not in cls.precisions:
        reason = "the engine folder has no"
    if reason is None:
        loaded = load_backend(named)
        assert loaded.backend.name == cls.name
    else:
        with pytest.raises(BackendUnavailableError) as caught:
            load_backend(named)
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("Failed to allocate memory for requested buffer of size 9", OutOfMemoryError),
        ("CUDA failure 2: out of memory ; GPU=0", OutOfMemoryError),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", OutOfMemoryError),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", OutOfMemoryError),
        ("CUDA failure 209: no kernel image", InferenceError),
        ("Non-zero status code returned while running Conv node", InferenceError),
    ],
)
def test_error_texts_distinguish_out_of_memory_from_other_failures(message, error):
    assert type(failure("it", (1, 84, 84, 3), RuntimeError(message), is_lost=lambda: False)) is error
    assert (
        type(failure("it", (1, 84, 84, 3), RuntimeError(message), is_lost=lambda: True))
        is DeviceLostError
    )


def test_eager_distinguishes_out_of_memory_and_a_lost_gpu(engine, monkeypatch):
    eager = load_backend(settings(engine, backend="eager")).backend
    images = np.zeros((1, 1, 84, 84, 3), np.uint8)

    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(eager, "_network", refuse)
    with pytest.raises(OutOfMemoryError, match="processing_res"):
        eager.run(images)

    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(eager, "_network", fail)
    with pytest.raises(InferenceError) as caught:
        eager.run(images)
    assert type(caught.value) is InferenceError
    monkeypatch.setattr(eager, "_device", "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, _: tensor)
    with pytest.raises(DeviceLostError):
        eager.run(images)


def test_the_first_graph_is_closed_when_the_second_cannot_be_loaded(monkeypatch):
    closed = []

    class Half(Backend):
        name = "half"

        @classmethod
        def unavailable(cls):
            return None

        @classmethod
        def load(cls, folder, graph, settings):
            if graph.name == last.name:
                raise ArtefactError("the second one is damaged")
            return cls()

        def run(self, images):
            raise NotImplementedError

        def close(self):
            closed.append(self)

    variant = find_variant("da3nested-giant-large")
    last = variant.graphs[-1]
    monkeypatch.setattr(da3_runtime.inference.backend_choice, "BACKENDS", (Half,))
    with pytest.raises(BackendUnavailableError, match="the second one is damaged"):
        load_backend(EngineSettings(model_id=variant.model_id))
    assert len(closed) == 1


@pytest.mark.parametrize("backend", ["auto", "onnxruntime-cpu"])
@pytest.mark.parametrize("driver", [True, False])
def test_a_cpu_that_answers_beside_a_gpu_is_a_warning(engine, monkeypatch, caplog, backend, driver):
    monkeypatch.setattr(da3_runtime.inference.backend_choice, "has_cuda_driver", lambda: driver)
    monkeypatch.setattr(da3_runtime.inference.backend_choice, "BACKENDS", (OnnxRuntimeCpu,))
    loaded = load_backend(settings(engine, backend=backend))
    is_warned = driver and backend == "auto"
    assert (BESIDE_A_GPU in loaded.warnings) == is_warned
    assert ("beside an NVIDIA GPU" in caplog.text) == is_warned
