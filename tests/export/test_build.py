"""Building an engine folder: its content, rebuilds and failures."""

import argparse
import contextlib
import json
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import da3_export.build
import da3_export.parity.measure
from da3_export.build import ENDINGS, build
from da3_export.parity.measure import measure_engine
from da3_export.request import DEFAULT_TARGETS, request_of
from da3_export.settings import BuildSettings
from da3_export.util import interruption
from da3_export.util.progress import Progress
from da3_runtime.commands.options import run_verb
from da3_runtime.errors import BuildError, ManifestError, ParityError, SettingError
from da3_runtime.store.manifest import Kind, Parity, digest_of, read_manifest, sha256_of
from tests.support.builds import build_request, write_plans_at_once
from tests.support.engines import damage, link_onnx
from tests.support.networks import NANO_WEIGHTS
from tests.support.paths import NANO, RANDOM, ROOT
from tests.support.processes import clean_env, command


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def no_work(monkeypatch):
    """Fail the test if anything expensive is done."""
    for module, name in (
        (da3_export.build, "export_onnx"),
        (da3_export.build, "build_plan"),
        (da3_export.parity.measure, "load_upstream"),
    ):
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} was called"))


def test_two_builds_at_once_build_once(engine, tmp_path, one_case, monkeypatch, capsys):
    """In two threads: each build opens the lock file itself, so the system sees no difference from two processes."""
    exported, waits = [], threading.Event()

    def export_slowly(network, path):
        exported.append(path.name)
        assert waits.wait(60)
        link_onnx(engine.folder / "model.fp32.onnx", path)

    def acquire(lock, timeout=-1):
        if timeout < 0:
            waits.set()
        return acquire_now(lock, timeout)

    acquire_now = da3_export.build.FileLock.acquire
    monkeypatch.setattr(da3_export.build.FileLock, "acquire", acquire)
    monkeypatch.setattr(da3_export.build, "export_onnx", export_slowly)
    request = build_request(tmp_path, "onnx-fp32")
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(build, [request, request])
    assert exported == ["model.fp32.onnx"]
    assert first == second == read_manifest(request.folder)
    log = capsys.readouterr().err
    assert log.count("another build is running; waiting for it.") == 1
    assert log.count("up to date.") == 1


def test_a_build_logs_plain_lines_off_a_terminal(engine):
    text = engine.build.stderr
    assert "\r" not in text
    assert "\x1b" not in text
    assert all(line.startswith("[da3-nano/dpt] ") for line in text.splitlines())
    assert str(engine.folder / "model.fp16.rtx.plan") in engine.build.stdout


def test_the_folder_contains_only_the_requested_files(engine):
    names = {path.name for path in engine.folder.iterdir()}
    artefacts = {f"model.{ENDINGS[kind]}" for kind in DEFAULT_TARGETS}
    weights = {f"model.fp{bits}.onnx.data" for bits in (16, 32)}
    assert names == artefacts | weights | {"manifest.json", "parity.json"}
    assert not (engine.folder.parent / f".{engine.folder.name}.staging").exists()


def test_random_weights_are_stored_with_their_engine_and_named_in_its_manifest(small_engine):
    beside = small_engine.folder / "checkpoint"
    assert {path.name for path in beside.iterdir()} == {"model.safetensors", "config.json"}
    manifest = json.loads((small_engine.folder / "manifest.json").read_text())
    assert manifest["source"] == {
        "weights": "random:0", "repo": None, "commit": None, "trained": False,
        "sha256": sha256_of(beside / "model.safetensors"), "release": "random:0",
    }  # fmt: skip
    assert manifest["licence"] == "Apache-2.0"
    assert str(ROOT) not in json.dumps(manifest)


def test_the_manifest_describes_weights_artefacts_and_shapes(engine):
    manifest = json.loads((engine.folder / "manifest.json").read_text())
    assert (manifest["model"], manifest["head"], manifest["licence"]) == (
        "da3-nano",
        "dpt",
        "MIT",
    )
    assert manifest["schema_version"] == 3
    assert manifest["unit"] == "relative"
    assert manifest["source"] == {
        "weights": "bundled", "repo": None, "commit": None, "trained": True,
        "sha256": sha256_of(NANO_WEIGHTS), "release": "bundled",
    }  # fmt: skip
    assert manifest["side_multiple"] == 14
    assert [(p["minimum"], p["maximum"]) for p in manifest["profiles"]] == [
        ([1, 1, 84, 84, 3], [1, 1, 1036, 1036, 3]),
        ([1, 1, 84, 84, 3], [8, 1, 504, 504, 3]),
        ([1, 1, 84, 84, 3], [1, 16, 504, 504, 3]),
    ]
    assert manifest["head_source"] is None
    artefacts = manifest["graphs"]["model"]["artefacts"]
    assert set(artefacts) == {"onnx-fp32", "onnx-fp16", "onnx-fp16-ort", "tensorrt-rtx"}
    for kind, entry in artefacts.items():
        for file in entry["files"]:
            path = engine.folder / file["name"]
            assert (file["size"], file["digest"]) == (path.stat().st_size, digest_of(path))
        assert entry["kind"] == kind
        assert entry["build_seconds"] > 0
        assert entry["precision"] == ("fp32" if kind == "onnx-fp32" else "fp16")
        assert "torch" in entry["toolchain"]
    plan = artefacts["tensorrt-rtx"]
    assert plan["compute_capabilities"] == ["8.0", "8.6", "8.9", "12.0+"]
    assert plan["library"] == plan["toolchain"]["tensorrt-rtx-cu12"]
    assert artefacts["onnx-fp16"]["library"] == ""
    assert str(ROOT) not in json.dumps(manifest)


def test_profiles_know_which_shapes_fit(engine):
    photo, photos, scene = read_manifest(engine.folder).profiles
    assert photo.fits((1, 1, 1036, 1036, 3))
    assert not photo.fits((2, 1, 504, 504, 3))
    assert photos.fits((8, 1, 504, 504, 3))
    assert not photos.fits((8, 1, 518, 504, 3))
    assert not photos.fits((1, 2, 504, 504, 3))
    assert scene.fits((1, 16, 504, 504, 3))
    assert not scene.fits((2, 2, 84, 84, 3))


def test_nothing_is_done_when_nothing_changed(engine_copy, no_work, capsys):
    before = stamps(engine_copy.folder)
    build(build_request(engine_copy.engine_dir))
    assert stamps(engine_copy.folder) == before
    assert "up to date" in capsys.readouterr().err


def test_only_a_damaged_artefact_is_built_again(engine_copy, one_case, monkeypatch):
    monkeypatch.setattr(da3_export.build, "export_onnx", lambda *_: pytest.fail("an ONNX was exported"))
    write_plans_at_once(monkeypatch)
    damage(engine_copy.folder / "model.fp16.rtx.plan", b"half a pl")
    before = stamps(engine_copy.folder)
    build(build_request(engine_copy.engine_dir))
    after = stamps(engine_copy.folder)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"model.fp16.rtx.plan", "manifest.json", "parity.json"}
    plan = read_manifest(engine_copy.folder).graphs["model"].artefacts[Kind.TENSORRT_RTX]
    assert digest_of(engine_copy.folder / plan.files[0].name) == plan.files[0].digest


def test_a_missing_parity_report_is_measured_again(engine_copy, one_case):
    damage(engine_copy.folder / "parity.json", None)
    plan = (engine_copy.folder / "model.fp16.rtx.plan").stat().st_mtime_ns
    build(build_request(engine_copy.engine_dir))
    assert json.loads((engine_copy.folder / "parity.json").read_text())["ok"]
    assert (engine_copy.folder / "model.fp16.rtx.plan").stat().st_mtime_ns == plan


def wrong_onnx(small_engine):
    """An exporter that writes the graph of another model."""

    def export_wrong(network, path):
        link_onnx(small_engine.folder / "model.fp32.onnx", path)

    return export_wrong


def test_a_build_out_of_tolerance_fails_and_leaves_no_engine(
    small_engine, tmp_path, one_case, monkeypatch
):
    monkeypatch.setattr(da3_export.build, "export_onnx", wrong_onnx(small_engine))
    with pytest.raises(ParityError, match="out of tolerance and was not published"):
        build(build_request(tmp_path, "onnx-fp32"))
    assert not (tmp_path / NANO / "dpt").exists()
    assert not list(tmp_path.rglob("*.onnx"))


def test_a_failed_rebuild_leaves_the_old_engine(small_engine, engine_copy, one_case, monkeypatch):
    before = stamps(engine_copy.folder)
    monkeypatch.setattr(da3_export.build, "export_onnx", wrong_onnx(small_engine))
    with pytest.raises(ParityError):
        build(build_request(engine_copy.engine_dir, "onnx-fp32", weights="random:1"))
    assert stamps(engine_copy.folder) == before


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_build_leaves_no_engine_and_the_next_one_cleans_up(tmp_path, signum, monkeypatch):
    args = ("engines", "--model", NANO, "--weights", "random:3", "--targets", "onnx-fp32",
            "--engine-dir", str(tmp_path))  # fmt: skip
    process = subprocess.Popen(
        command("da3_export", *args), cwd=ROOT, env=clean_env(), stderr=subprocess.PIPE, text=True
    )
    staging = tmp_path / NANO / ".dpt.staging"
    deadline = time.monotonic() + 60
    while not (staging / "checkpoint" / "model.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signum)
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode != 0
    assert "Traceback" not in stderr
    assert not (tmp_path / NANO / "dpt").exists()
    # The lock of the killed build does not block the next one, which starts with a clean staging folder.
    monkeypatch.setattr(
        da3_export.parity.measure,
        "load_upstream",
        lambda *_: (_ for _ in ()).throw(BuildError("stop")),
    )
    with pytest.raises(BuildError, match="stop"):
        build(build_request(tmp_path, "onnx-fp32", weights="random:3"))
    assert not staging.exists()


def test_an_interruption_is_one_word_even_if_a_library_turned_it_into_an_error(capsys):
    def interrupted(_):
        raise RuntimeError("Error calling __set_name__") from KeyboardInterrupt()

    def broken(_):
        raise RuntimeError("our fault")

    assert run_verb(interrupted, argparse.Namespace()) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(RuntimeError, match="our fault"):
        run_verb(broken, argparse.Namespace())


def test_an_interruption_that_a_library_swallows_ends_the_build_at_the_next_step(monkeypatch):
    monkeypatch.setattr(interruption, "_received", threading.Event())
    before = signal.getsignal(signal.SIGINT)
    interruption.listen()
    try:
        with Progress("a build", 2).step("goes on"):
            pass
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), Progress("a build", 2).step("does not"):
            pytest.fail("begun")
    finally:
        signal.signal(signal.SIGINT, before)


def test_unknown_targets_are_listed():
    with pytest.raises(SettingError, match="'onnx' is not one of: onnx-fp32, onnx-fp16"):
        request_of(BuildSettings(), "onnx")


def test_targets_may_be_spaced_repeated_or_empty(tmp_path):
    assert build_request(tmp_path, " ONNX-FP32 ,onnx-fp32,").targets == (Kind.ONNX_FP32,)
    assert build_request(tmp_path, "").targets == DEFAULT_TARGETS


def test_tensorrt_without_a_gpu_is_refused_before_any_work(tmp_path, run_here):
    done = run_here("da3_export", "engines", "--model", NANO, "--targets", "tensorrt",
                      "--engine-dir", str(tmp_path))  # fmt: skip
    assert done.code == 1
    assert "Traceback" not in done.stderr
    assert "tensorrt" in done.stderr
    assert not list(tmp_path.rglob("*.onnx"))


def test_parity_without_an_engine_names_the_command_to_run(tmp_path):
    with pytest.raises(ManifestError, match="make engines"):
        measure_engine(BuildSettings(engine_dir=tmp_path, model_id=NANO))


def test_parity_is_measured_again_and_written(engine_copy, one_case):
    damage(engine_copy.folder / "parity.json", b"{}")
    report = measure_engine(BuildSettings(engine_dir=engine_copy.engine_dir, model_id=NANO))
    assert report.ok
    assert json.loads((engine_copy.folder / "parity.json").read_text())["ok"]
    assert set(report.not_checked) == {"model tensorrt-rtx"}
    assert "this machine has no NVIDIA GPU" in report.not_checked["model tensorrt-rtx"]
    assert report.parity["model tensorrt-rtx"] == Parity.UNVERIFIED
    assert "onnx-fp16" in report.table()


def test_an_unwritable_engines_folder_is_one_sentence(tmp_path, run_here):
    (tmp_path / "da3-small").write_text("in the way")
    done = run_here("da3_export", "engines", "--weights", RANDOM, "--engine-dir", str(tmp_path))
    assert done.code == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
