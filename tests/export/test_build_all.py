"""MODEL=all: builds every model."""

import subprocess
import sys
from dataclasses import replace

import pytest

import da3_export.build_all
from da3_export.build_all import Outcome, build_every, table
from da3_export.settings import BuildSettings
from da3_runtime.errors import SettingError
from da3_runtime.variants import VARIANTS
from tests.support.paths import NANO, RANDOM


def test_one_checkpoint_for_all_models_is_refused(tmp_path):
    with pytest.raises(SettingError, match="MODEL=all"):
        build_every(BuildSettings(weights=str(tmp_path)), None)
    with pytest.raises(SettingError, match="SDT_WEIGHTS"):
        build_every(BuildSettings(weights=RANDOM, sdt_weights="x.safetensors"), None)
    with pytest.raises(SettingError, match="the SDT head has no rays"):
        build_every(BuildSettings(weights=RANDOM, head="sdt", ray_pose=True), None)


def test_every_variant_is_built_in_a_separate_process_and_reported(engine, monkeypatch, capfd):
    nano = VARIANTS[NANO]
    variants = {NANO: nano, "da3-tiny": replace(nano, model_id="da3-tiny")}
    monkeypatch.setattr(da3_export.build_all, "VARIANTS", variants)
    settings = BuildSettings(engine_dir=engine.engine_dir)
    done, failed = build_every(settings, None)
    log = capfd.readouterr().err
    assert "up to date" in log
    assert "'da3-tiny' is not a known model" in log
    assert (done.code, failed.code) == (0, 2)
    assert done.megabytes == pytest.approx(71, abs=6)
    assert done.peak_gb > 0.1
    assert 0 < done.worst["fp32"] <= done.worst["fp16"] < 3e-3
    text = table([done, failed], ("fp32", "fp16"))
    assert NANO in text
    assert "failed (2)" in text


def test_the_table_lines_up():
    lines = table(
        [
            Outcome("a", 0, 1.0, 2.0, 3.0, {"fp32": 1e-6}),
            Outcome("bbb", 1, 10, None, None, {}),
        ],
        ("fp32",),
    )
    first, second, third = lines.splitlines()
    assert first.index("seconds") == second.index("1") == third.index("10")


MEASURE = """
import sys, time
import numpy as np
from da3_export.util.memory import PeakMemory

with PeakMemory() as idle:
    time.sleep(0.3)
with PeakMemory() as mapped:
    np.memmap(sys.argv[1], mode="r").sum()
    time.sleep(0.3)
with PeakMemory() as made:
    block = np.ones(400_000_000, np.uint8)
    time.sleep(0.3)
print(idle.gb, mapped.gb, made.gb)
"""


def test_peak_memory_excludes_mapped_files(tmp_path):
    """In a process of its own: this one holds gigabytes of other tests, and may free them meanwhile."""
    path = tmp_path / "mapped"
    with path.open("wb") as stream:
        stream.truncate(600_000_000)
    line = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    idle, mapped, made = map(float, done.stdout.split())
    assert idle == pytest.approx(mapped, abs=0.1)
    assert made == pytest.approx(idle + 0.4, abs=0.1)
