"""Plans: TensorRT-RTX's, built without a GPU, and TensorRT's, one for each GPU."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace
from unittest import mock

import onnx
import pytest
from onnx import TensorProto, helper

import da3_export.build
import da3_export.freshness
from da3_export.__main__ import parser, settings_of
from da3_export.build import build
from da3_export.onnx_to_plan import (
    LIBRARIES,
    PROFILES,
    Library,
    Plan,
    build_plan,
    load_timing_cache,
    plan_here,
    save_timing_cache,
    set_compatibility,
)
from da3_export.parity.measure import GraphParity
from da3_export.settings import BuildSettings
from da3_runtime.backends.gpu.cuda import has_cuda_driver
from da3_runtime.errors import ArtefactError, BuildError, ManifestError, ParityError
from da3_runtime.store.find_engine import local_engine
from da3_runtime.store.manifest import Kind, Profile, read_manifest, verified_path
from tests.support.builds import (
    ONE_CASE,
    artefacts_of,
    build_request,
    copy_with,
    measure_on,
    stand_in_for_tensorrt,
    write_plans_at_once,
)
from tests.support.engines import copy_engine, damage
from tests.support.paths import NANO

# TensorRT-RTX, which stands in for TensorRT here, says so of its timing cache.
pytestmark = pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX")


def test_the_rtx_plan_was_built_and_holds_the_weights(engine):
    plan = engine.folder / "model.fp16.rtx.plan"
    assert plan.stat().st_size > (engine.folder / "model.fp16.onnx.data").stat().st_size * 0.9


def test_the_rtx_plan_fuses_attention_in_every_block_and_profile(engine):
    """A plan lists its kernels in plain text: one fused attention for each of da3-nano's eight blocks.

    The camera encoder, which attends over a few views, may have one more.
    """
    plan = (engine.folder / "model.fp16.rtx.plan").read_bytes()
    assert plan.count(b"function={ name=_gemm_mha") in range(8 * len(PROFILES), 9 * len(PROFILES) + 1)
    # Q K^T sums in FP32, P V in FP16.
    traits = re.findall(rb"Kernel_traits_v2_flash_attention<\s*fmha::(\w+),\s*fmha::(\w+),", plan)
    assert set(traits) == {(b"Ampere_hmma_fp32_traits", b"Ampere_hmma_fp16_traits")}


def test_a_graph_the_library_cannot_read_is_a_build_error(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(BuildError, match=r"bad\.onnx is not a valid ONNX file"):
        plan = plan_here(Kind.TENSORRT_RTX)
        build_plan(plan, tmp_path / "bad.onnx", tmp_path / "plan", tmp_path, lambda _: None)
    assert not (tmp_path / "plan").exists()


def test_a_library_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(LIBRARIES, Kind.TENSORRT, Library("x", "no-such-package", None))
    with pytest.raises(BuildError, match="no-such-package, which is not installed"):
        plan_here(Kind.TENSORRT)


def plan_file(engine, target):
    return engine.folder / f"model.fp16.{target}.trt.plan"


@pytest.fixture(scope="module")
def built(engine, tmp_path_factory):
    """An engine with a plan for 9.0 and one for 8.0, each as if built where that GPU is."""
    copy = copy_with(
        engine, tmp_path_factory.mktemp("plans"), Kind.ONNX_FP32, Kind.ONNX_FP16, Kind.TENSORRT_RTX
    )
    with pytest.MonkeyPatch.context() as patch:
        measure_on(patch, ONE_CASE)
        write_plans_at_once(patch)
        for capability in ("9.0", "8.0"):
            stand_in_for_tensorrt(patch, capability)
            build(build_request(copy.engine_dir, "tensorrt"))
    return copy


@pytest.fixture(autouse=True)
def quick_plans(monkeypatch, request):
    """Write plans at once, but in tests of the builder itself."""
    if "built" in request.fixturenames:
        write_plans_at_once(monkeypatch)


@pytest.fixture
def plans(built, tmp_path):
    """A copy of the engine with two plans that a test may damage."""
    return copy_engine(built, tmp_path)


def test_a_folder_holds_a_plan_for_each_compute_capability(built):
    found = artefacts_of(built.folder)
    assert set(found) == {"onnx-fp32", "onnx-fp16", "tensorrt-rtx", "tensorrt-9.0", "tensorrt-8.0"}
    for capability, target in (("9.0", "sm90"), ("8.0", "sm80")):
        plan = found[f"tensorrt-{capability}"]
        assert (plan.kind, plan.precision) == (Kind.TENSORRT, "fp16")
        assert (plan.compute_capabilities, plan.version_compatible) == ([capability], False)
        assert plan.library == version("tensorrt-rtx-cu12")
        assert verified_path(built.folder, plan) == plan_file(built, target)
    graph = read_manifest(built.folder).graphs["model"]
    assert {plan.name for plan in graph.of_kind(Kind.TENSORRT)} == {"tensorrt-9.0", "tensorrt-8.0"}
    assert graph.of_kind(Kind.TENSORRT_RTX) == [found["tensorrt-rtx"]]


@pytest.mark.parametrize("capability", ["9.0", "8.0"])
def test_each_gpu_finds_its_plan_up_to_date(plans, capability, monkeypatch, capsys):
    stand_in_for_tensorrt(monkeypatch, capability)
    build(build_request(plans.engine_dir, "tensorrt"))
    assert "up to date" in capsys.readouterr().err


def test_only_this_gpus_plan_is_built_again_for_another_release(plans, one_case, monkeypatch):
    stand_in_for_tensorrt(monkeypatch, "9.0")
    for module in (da3_export.build, da3_export.freshness):
        monkeypatch.setattr(module, "library_version", lambda kind: "99.0")
    before = artefacts_of(plans.folder)
    build(build_request(plans.engine_dir, "onnx-fp32"))
    assert artefacts_of(plans.folder) == before
    build(build_request(plans.engine_dir, "tensorrt"))
    after = artefacts_of(plans.folder)
    assert after["tensorrt-9.0"].library == "99.0"
    assert after["tensorrt-9.0"].toolchain["tensorrt-rtx-cu12"] == "99.0"
    assert {**after, "tensorrt-9.0": None} == {**before, "tensorrt-9.0": None}


def test_a_hardware_compatible_plan_lies_beside_the_others(plans, one_case, monkeypatch):
    stand_in_for_tensorrt(monkeypatch, "9.0")
    before = artefacts_of(plans.folder)
    build(build_request(plans.engine_dir, "tensorrt", hardware_compatible=True))
    after = artefacts_of(plans.folder)
    assert set(after) == {*before, "tensorrt-8.0+"}
    plan = after["tensorrt-8.0+"]
    assert plan.compute_capabilities == ["8.0+"]
    assert verified_path(plans.folder, plan) == plan_file(plans, "sm80plus")


def test_a_version_compatible_plan_takes_the_others_place_when_it_is_asked_for(
    plans, one_case, monkeypatch, capsys
):
    stand_in_for_tensorrt(monkeypatch, "9.0")
    build(build_request(plans.engine_dir, "tensorrt", version_compatible=True))
    after = artefacts_of(plans.folder)
    assert [after[f"tensorrt-{of}"].version_compatible for of in ("9.0", "8.0")] == [True, False]
    capsys.readouterr()
    build(build_request(plans.engine_dir, "onnx-fp32"))
    build(build_request(plans.engine_dir, "tensorrt", version_compatible=True))
    assert capsys.readouterr().err.count("up to date") == 2
    started = mock.Mock(side_effect=BuildError("started"))
    monkeypatch.setattr(da3_export.build, "build_plan", started)
    with pytest.raises(BuildError, match="started"):
        build(build_request(plans.engine_dir, "tensorrt"))
    assert started.call_args.args[0] == Plan(Kind.TENSORRT, ("9.0",), version_compatible=False)


def test_a_backend_may_choose_a_plan_before_any_is_read(plans):
    for target in ("sm90", "sm80"):
        plan_file(plans, target).unlink()
    folder = local_engine(BuildSettings(engine_dir=plans.engine_dir, model_id=NANO))
    graph = folder.variant.graphs[0]
    found = {plan.name: plan for plan in folder.artefacts(graph, Kind.TENSORRT)}
    assert set(found) == {"tensorrt-9.0", "tensorrt-8.0"}
    with pytest.raises(ArtefactError, match=r"sm90\.trt\.plan is missing"):
        folder.verified(found["tensorrt-9.0"])
    assert folder.verified(folder.artefacts(graph, Kind.ONNX_FP32)[0]).name == "model.fp32.onnx"


def test_a_plan_under_another_ones_name_is_a_damaged_manifest(plans):
    path = plans.folder / "manifest.json"
    data = json.loads(path.read_text())
    found = data["graphs"]["model"]["artefacts"]
    found["tensorrt-8.9"] = found.pop("tensorrt-9.0")
    damage(path, json.dumps(data).encode())
    with pytest.raises(ManifestError, match="damaged"):
        read_manifest(plans.folder)


@pytest.mark.skipif(has_cuda_driver(), reason="there is an NVIDIA driver on this machine")
@pytest.mark.parametrize("hardware_compatible", [False, True])
def test_tensorrt_needs_a_gpu_whatever_it_builds_for(hardware_compatible, monkeypatch):
    stand_in_for_tensorrt(monkeypatch)
    with pytest.raises(BuildError, match="this machine has no NVIDIA driver"):
        plan_here(Kind.TENSORRT, hardware_compatible)


def test_the_two_options_are_tensorrts_only():
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    plain = plan_here(Kind.TENSORRT_RTX)
    assert plan_here(Kind.TENSORRT_RTX, hardware_compatible=True, version_compatible=True) == plain


def test_the_command_line_has_both_options():
    args = parser().parse_args(["engines", "--hardware-compatible", "1", "--version-compatible", "1"])
    settings = settings_of(args)
    assert (settings.hardware_compatible, settings.version_compatible) == (True, True)


@pytest.fixture
def rtx_config():
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    yield trt, builder.create_builder_config()
    del builder


@pytest.mark.parametrize("asked", [False, True])
def test_version_compatibility_is_asked_for_without_host_code(rtx_config, asked):
    trt, config = rtx_config
    set_compatibility(trt, config, Plan(Kind.TENSORRT, ("9.0",), version_compatible=asked))
    assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE) == asked
    assert config.get_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME) == asked


@pytest.mark.parametrize("capability", ["9.0", "8.0", "8.0+"])
def test_hardware_compatibility_is_asked_for(rtx_config, capability):
    """TensorRT-RTX leaves its own config as it is, so one that takes it stands in."""
    trt, _ = rtx_config
    level = trt.HardwareCompatibilityLevel
    config = SimpleNamespace(hardware_compatibility_level=level.NONE)
    set_compatibility(trt, config, Plan(Kind.TENSORRT, (capability,)))
    expected = level.AMPERE_PLUS if capability == "8.0+" else level.NONE
    assert config.hardware_compatibility_level == expected


@pytest.fixture
def small_onnx(tmp_path):
    """A graph of one operator, with the input of every network."""
    shape = ["scenes", "views", "height", "width", 3]
    graph = helper.make_graph(
        [helper.make_node("Cast", ["images"], ["depth"], to=TensorProto.FLOAT)],
        "small",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("depth", TensorProto.FLOAT, shape)],
    )
    path = tmp_path / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return path


def test_a_plan_is_built_and_its_timings_are_kept_by_release_and_gpu(small_onnx, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    profiles = [Profile([1, 1, 14, 14, 3], [1, 1, 28, 28, 3], [2, 1, 42, 42, 3])]
    for capability in ("9.0", "8.0"):
        stand_in_for_tensorrt(monkeypatch, capability)
        plan = plan_here(Kind.TENSORRT)
        assert plan == Plan(Kind.TENSORRT, (capability,))
        target, caches, phases = tmp_path / f"{plan.target}.plan", tmp_path / "caches", []
        build_plan(plan, small_onnx, target, caches, phases.append, profiles)
        assert target.stat().st_size > 1000
        assert phases
    release = version("tensorrt-rtx-cu12")
    kept = {path.name: path.stat().st_size for path in (tmp_path / "caches").iterdir()}
    assert set(kept) == {f"{release}.sm90", f"{release}.sm80"}
    assert all(kept.values())


@pytest.mark.parametrize("content", [None, b"", b"damaged"])
def test_the_librarys_own_timing_cache_is_saved_and_read_back(rtx_config, tmp_path, content):
    _, config = rtx_config
    path = tmp_path / "caches" / "1.sm90"
    if content is not None:
        path.parent.mkdir()
        path.write_bytes(content)
    load_timing_cache(config, path)
    save_timing_cache(config, path)
    saved = path.read_bytes()
    assert saved == bytes(config.get_timing_cache().serialize())
    assert saved not in (b"", content)
    load_timing_cache(config, path)
    assert bytes(config.get_timing_cache().serialize()) == saved


class Cache(bytes):
    """A timing cache that is its own content."""

    def serialize(self):
        return self


class Config:
    """Takes an empty timing cache and b"good", refuses others the ways TensorRT may.

    TensorRT-RTX cannot stand in here: it takes anything.
    """

    attached = None

    def create_timing_cache(self, content):
        if content == b"raises":
            raise RuntimeError("a damaged cache")
        return None if content == b"none" else Cache(content)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        taken = cache in (b"", b"good")
        if taken:
            self.attached = cache
        return taken

    def get_timing_cache(self):
        return self.attached


@pytest.mark.parametrize(
    ("saved", "attached"), [("good", b"good"), ("raises", b""), ("none", b""), ("foreign", b"")]
)
def test_a_refused_timing_cache_is_begun_anew(tmp_path, saved, attached):
    path = tmp_path / "1.sm90"
    path.write_text(saved)
    config = Config()
    load_timing_cache(config, path)
    assert config.attached == attached
    config.attached = Cache(b"new")
    save_timing_cache(config, path)
    assert path.read_bytes() == b"new"


def test_two_builds_at_once_leave_a_whole_timing_cache(tmp_path):
    path = tmp_path / "caches" / "1.sm90"
    contents = [bytes([letter]) * 1_000_000 for letter in b"abcd"]

    def save(content):
        config = Config()
        config.attached = Cache(content)
        save_timing_cache(config, path)
        return path.read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert all(found in contents for found in pool.map(save, contents * 10))
    assert [left.name for left in path.parent.iterdir()] == [path.name]


def test_a_plan_that_is_out_of_tolerance_on_its_gpu_is_not_published(plans, one_case, monkeypatch):
    before = sorted((path.name, path.read_bytes()) for path in plans.folder.iterdir())

    def measure(measuring, folder, plan):
        if plan.name == "tensorrt-8.6":
            good = measuring.rows[0]
            measuring.rows.append(replace(good, artefact=plan.kind, mean=0.1, ok=False))

    monkeypatch.setattr(GraphParity, "measure_plan", measure)
    stand_in_for_tensorrt(monkeypatch, "8.6")
    with pytest.raises(ParityError, match="OUT OF TOLERANCE"):
        build(build_request(plans.engine_dir, "tensorrt"))
    assert sorted((path.name, path.read_bytes()) for path in plans.folder.iterdir()) == before
