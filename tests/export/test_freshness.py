"""What of an engine folder stays, what is built again, and what goes."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest

import da3_export.build
import da3_export.freshness
import da3_export.onnx_to_plan
from da3_export.build import build
from da3_export.freshness import exporter_versions
from da3_export.onnx_to_plan import LIBRARIES, PROFILES, Library
from da3_runtime.store.manifest import Kind, read_manifest, verified_path
from tests.support.builds import (
    ONE_CASE,
    artefacts_of,
    build_request,
    copy_with,
    export_by_copying,
    measure_on,
    stand_in_for_tensorrt,
    write_plans_at_once,
)
from tests.support.engines import copy_engine, damage, link_onnx
from tests.support.networks import NANO_WEIGHTS
from tests.support.paths import NANO, ROOT
from tests.support.processes import clean_env


@pytest.fixture(scope="module")
def two_plans(engine, tmp_path_factory):
    """An engine with FP16 ONNX and two plans: TensorRT-RTX's, and one for compute capability 9.0."""
    copy = copy_with(engine, tmp_path_factory.mktemp("plans"), Kind.ONNX_FP16, Kind.TENSORRT_RTX)
    with pytest.MonkeyPatch.context() as patch:
        measure_on(patch, ONE_CASE)
        write_plans_at_once(patch)
        stand_in_for_tensorrt(patch, "9.0")
        build(build_request(copy.engine_dir, "tensorrt"))
    return copy


@pytest.fixture
def with_plan(two_plans, tmp_path, one_case, monkeypatch):
    """A copy of that engine, for builds that measure one case and write plans at once."""
    write_plans_at_once(monkeypatch)
    return copy_engine(two_plans, tmp_path)


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("model*")}


def raise_version(monkeypatch, name):
    monkeypatch.setattr(da3_export.freshness, name, getattr(da3_export.freshness, name) + 1)


def test_another_docstring_leaves_everything_current(engine_copy, tmp_path):
    """Of every module that decides what an engine contains."""
    for package in ("runtime/da3_runtime", "export/da3_export"):
        shutil.copytree(ROOT / package, tmp_path / package)
        for path in (tmp_path / package).rglob("*.py"):
            text = path.read_text()
            path.write_text(text + '\n_COMMENT = """Another text."""\n# And a comment.\n')
    before = stamps(engine_copy.folder)
    path = os.pathsep.join(str(tmp_path / name) for name in ("runtime", "export"))
    done = subprocess.run(
        [sys.executable, "-m", "da3_export", "engines", "--model", NANO, "--engine-dir", str(engine_copy.engine_dir)],
        cwd=tmp_path, env=clean_env(PYTHONPATH=path), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "up to date" in done.stderr
    assert stamps(engine_copy.folder) == before


def test_a_raised_export_version_rebuilds_what_is_asked_for_and_keeps_the_plans(
    with_plan, monkeypatch, capsys
):
    before = artefacts_of(with_plan.folder)
    content = {path.name: path.read_bytes() for path in with_plan.folder.glob("*.plan")}
    raise_version(monkeypatch, "EXPORT_VERSION")
    export_by_copying(monkeypatch, with_plan.folder / "model.fp16.onnx")
    build(build_request(with_plan.engine_dir, "onnx-fp16"))
    after = artefacts_of(with_plan.folder)
    assert after["onnx-fp16"].fingerprint != before["onnx-fp16"].fingerprint
    for name in ("tensorrt-rtx", "tensorrt-9.0"):
        assert after[name] == before[name]
    assert content == {path.name: path.read_bytes() for path in with_plan.folder.glob("*.plan")}
    assert "removing" not in capsys.readouterr().err
    build(build_request(with_plan.engine_dir, "onnx-fp16"))
    assert "up to date" in capsys.readouterr().err


def test_a_raised_export_version_rebuilds_the_onnx_that_a_plan_is_asked_of(with_plan, monkeypatch):
    before = artefacts_of(with_plan.folder)
    raise_version(monkeypatch, "EXPORT_VERSION")
    export_by_copying(monkeypatch, with_plan.folder / "model.fp16.onnx")
    build(build_request(with_plan.engine_dir, "tensorrt-rtx"))
    after = artefacts_of(with_plan.folder)
    for name in ("onnx-fp16", "tensorrt-rtx"):
        assert after[name].fingerprint != before[name].fingerprint
    assert after["tensorrt-9.0"] == before["tensorrt-9.0"]


def test_a_raised_plan_version_rebuilds_the_plan_that_is_asked_for(with_plan, monkeypatch):
    before = artefacts_of(with_plan.folder)
    raise_version(monkeypatch, "PLAN_VERSION")
    monkeypatch.setattr(da3_export.build, "export_onnx", lambda *_: pytest.fail("an ONNX was exported"))
    build(build_request(with_plan.engine_dir, "onnx-fp16,tensorrt-rtx"))
    after = artefacts_of(with_plan.folder)
    assert after["tensorrt-rtx"].fingerprint != before["tensorrt-rtx"].fingerprint
    assert {name: each for name, each in after.items() if name != "tensorrt-rtx"} == {
        name: each for name, each in before.items() if name != "tensorrt-rtx"
    }


def test_a_raised_parity_version_measures_again_and_builds_nothing(with_plan, monkeypatch):
    raise_version(monkeypatch, "PARITY_VERSION")
    for name in ("export_onnx", "build_plan"):
        monkeypatch.setattr(da3_export.build, name, lambda *_: pytest.fail("something was built"))
    before = stamps(with_plan.folder)
    build(build_request(with_plan.engine_dir, "onnx-fp16"))
    assert stamps(with_plan.folder) == before
    report = json.loads((with_plan.folder / "parity.json").read_text())
    assert report["method"] == str(da3_export.freshness.PARITY_VERSION)


def test_another_torch_rebuilds_the_onnx_that_is_asked_for_and_keeps_the_plans(
    with_plan, monkeypatch, capsys
):
    before = artefacts_of(with_plan.folder)
    other = exporter_versions() | {"torch": "another"}
    monkeypatch.setattr(da3_export.freshness, "exporter_versions", lambda: other)
    build(build_request(with_plan.engine_dir, "tensorrt-rtx"))  # from the ONNX in the folder
    assert "up to date" in capsys.readouterr().err
    export_by_copying(monkeypatch, with_plan.folder / "model.fp16.onnx")
    build(build_request(with_plan.engine_dir, "onnx-fp16"))
    after = artefacts_of(with_plan.folder)
    assert after["onnx-fp16"].toolchain["torch"] == "another"
    assert {**after, "onnx-fp16": None} == {**before, "onnx-fp16": None}


def test_artefacts_of_other_weights_go_each_named_in_a_line(with_plan, monkeypatch, capsys, tmp_path):
    """One manifest has one source of weights."""
    other = tmp_path / "other.safetensors"
    content = NANO_WEIGHTS.read_bytes()
    # The same tensors behind a longer header: other bytes, so other weights.
    size = int.from_bytes(content[:8], "little")
    other.write_bytes(
        (size + 8).to_bytes(8, "little") + content[8 : 8 + size] + b" " * 8 + content[8 + size :]
    )
    export_by_copying(monkeypatch, with_plan.folder / "model.fp16.onnx")
    build(build_request(with_plan.engine_dir, "onnx-fp16", weights=str(other)))
    log = capsys.readouterr().err
    for name in ("tensorrt-rtx", "tensorrt-9.0"):
        assert f"model {name} was made from other weights: removing it." in log
    assert "onnx-fp16 was made" not in log
    assert set(artefacts_of(with_plan.folder)) == {"onnx-fp16"}
    assert not list(with_plan.folder.glob("*.plan"))
    assert read_manifest(with_plan.folder).source.weights == "local"


def test_a_damaged_plan_goes_and_the_others_stay(with_plan, capsys):
    damage(with_plan.folder / "model.fp16.sm90.trt.plan", b"half a pl")
    build(build_request(with_plan.engine_dir, "onnx-fp16"))
    log = capsys.readouterr().err
    assert (
        "model tensorrt-9.0 is damaged (model.fp16.sm90.trt.plan has 9 bytes; its manifest says" in log
    )
    assert set(artefacts_of(with_plan.folder)) == {"onnx-fp16", "tensorrt-rtx"}
    assert not (with_plan.folder / "model.fp16.sm90.trt.plan").exists()


def test_plans_for_other_input_shapes_go(with_plan, monkeypatch, capsys):
    monkeypatch.setattr(da3_export.freshness, "PROFILES", PROFILES[:1])
    build(build_request(with_plan.engine_dir, "onnx-fp16"))
    assert "model tensorrt-rtx was built for other input shapes: removing it" in capsys.readouterr().err
    assert set(artefacts_of(with_plan.folder)) == {"onnx-fp16"}


def test_a_build_without_gpu_and_library_keeps_the_plans(with_plan, monkeypatch):
    for kind in LIBRARIES:
        monkeypatch.setitem(LIBRARIES, kind, Library("none", "no-such-package", None))
    before = artefacts_of(with_plan.folder)
    exported = with_plan.folder / "model.fp16.onnx"
    source = with_plan.engine_dir / exported.name
    link_onnx(exported, source)
    damage(exported, random.Random(0).randbytes(99))
    export_by_copying(monkeypatch, source)
    build(build_request(with_plan.engine_dir, "onnx-fp16"))
    after = artefacts_of(with_plan.folder)
    assert set(after) == set(before)
    for name in ("tensorrt-9.0", "tensorrt-rtx"):
        assert after[name] == before[name]
        verified_path(with_plan.folder, after[name])
