"""Files that disappear, change or cannot be written; docs/faults.md names the tests of other faults."""

import errno
import os
import random
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from da3_runtime.output.workspace import Workspace
from da3_runtime.serve.service import Service
from da3_runtime.settings import Settings
from tests.support.images import PHOTO
from tests.support.named_tests import exists
from tests.support.paths import NANO, PHOTOS, ROOT
from tests.support.processes import depth_of, run_module

SIDE = 140


def test_every_fault_names_tests_that_exist():
    lines = (ROOT / "docs" / "faults.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not re.match(r"\| (---|fault) ", line)]
    assert len(rows) >= 25
    for row in rows:
        named = re.findall(r"`([\w/]+\.py::test_\w+)`", row)
        assert named, row
        assert [name for name in named if not exists(name)] == []


class Running:
    """A service with its own copy of an engine."""

    def __init__(self, engine, root):
        self.folder = root / NANO / "dpt"
        shutil.copytree(engine.folder, self.folder)
        self.service = Service(Settings.of(engine_dir=root, model_id=NANO))
        self.service.load_default()

    def ask(self):
        fields = {"image_base64": PHOTO, "processing_res": SIDE, "outputs": ["depth_npz"]}
        return self.service.answer(fields, "a job")

    def artefacts(self):
        return sorted(self.folder.glob("model.*"))


def delete(running):
    shutil.rmtree(running.folder)


def cut_short(running):
    for path in running.artefacts():
        replace(path, path.read_bytes()[:1000])


def overwrite(running):
    for path in running.artefacts():
        replace(path, bytes(path.stat().st_size))


def swap(running):
    for path in running.artefacts():
        replace(path, path.read_bytes())


def replace(path, data):
    """Replace a file with a new one, as builds and downloads do. Running models keep the old one, which they map."""
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.replace(path)


@pytest.mark.parametrize(
    ("happens", "backend", "warning"),
    [
        (delete, "eager", "No engine could be used"),
        (cut_short, "eager", "model.fp32.onnx has 1000 bytes"),
        (overwrite, "eager", "model.fp32.onnx does not match the digest"),
        (swap, "onnxruntime-cpu", None),
    ],
)
def test_changes_to_a_loaded_engine_take_effect_at_its_next_load(
    engine, tmp_path, happens, backend, warning
):
    running = Running(engine, tmp_path)
    before = running.ask()
    happens(running)
    after = running.ask()
    assert after["backend"] == "onnxruntime-cpu"
    assert after["depth_npz_base64"] == before["depth_npz_base64"]
    assert running.service.pool.drop_idle()
    again = running.ask()
    assert again["backend"] == backend
    assert [text for text in again["warnings"] if "\n" in text] == []
    assert warning is None or any(warning in text for text in again["warnings"])
    np.testing.assert_allclose(depth_of(again), depth_of(before), rtol=1e-3)


def test_a_writer_killed_at_any_moment_leaves_the_old_file_or_the_new(tmp_path):
    path, size = tmp_path / "preview.png", 2**22
    program = f"""
from pathlib import Path
from da3_runtime.util.files import write_atomically
while True:
    for byte in (b"a", b"b"):
        write_atomically(Path({str(path)!r}), byte * {size})
"""
    rng = random.Random(0)
    for _ in range(6):
        path.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.wait()
        content = path.read_bytes()
        assert content in (b"a" * size, b"b" * size)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_or_read_only_volume_costs_only_the_stored_preview(tmp_path, monkeypatch, caplog, code):
    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    assert Workspace(tmp_path, 0).keep(b"png") is None
    assert os.strerror(code) in caplog.text
    assert not list((tmp_path / "output_images").iterdir())


def test_a_full_disk_ends_a_build_with_one_sentence(tmp_path):
    done = run_module(
        "da3_export", "engines", "--model", NANO, "--weights", "random:5", "--targets", "onnx-fp32",
        "--engine-dir", str(tmp_path), largest_file=10**6,
    )  # fmt: skip
    assert done.code == 1
    assert "Traceback" not in done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r"error: da3-nano/dpt: .* while writing the engine folder\.", error), error
    assert not (tmp_path / NANO / "dpt").exists()


def test_a_full_disk_leaves_no_partial_preview(tmp_path):
    out = tmp_path / "depth.png"
    done = run_module(
        "da3_runtime", "depth", str(PHOTOS / "cat.jpg"), "--out", str(out), MODEL=NANO,
        ENGINE_DIR=str(tmp_path / "none"), PROCESSING_RES=str(SIDE), largest_file=2000,
    )  # fmt: skip
    assert done.code != 0
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
