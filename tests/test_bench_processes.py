"""The benchmark of backends, which loads every contender in processes of its own: `make test-long`."""

import json

import pytest

from tests.support.paths import NANO
from tests.support.processes import run_module


def test_bench_gpu_runs_end_to_end_on_a_cpu(engine, tmp_path):
    out = tmp_path / "cpu.json"
    contenders = ["eager", "plain-onnxruntime-cpu", "onnxruntime-cpu"]
    done = run_module(
        "benchmarks.backends", "--device", "cpu", "--models", NANO, "--heads", "dpt",
        "--sizes", "84x98", "--batches", "1", "--rounds", "2", "--runs", "2",
        "--contenders", ",".join(contenders), "--out", str(out),
        ENGINE_DIR=str(engine.engine_dir),
    )  # fmt: skip
    assert done.code == 0, done.stderr
    head, *lines = done.stdout.split("\n\n")[1].splitlines()
    assert head.split()[:3] == ["model", "head", "H"]
    assert [line.split()[6] for line in lines] == contenders
    assert "reference" in done.stderr

    content = json.loads(out.read_text())
    assert content["versions"]["torch"]
    assert content["rates"]["flops_per_s"] > 0
    (work,) = content["work"]
    assert work["flops"] > 0
    rows = content["rows"]
    assert [row["contender"] for row in rows] == contenders
    for row in rows:
        assert row["why"] is None
        assert (row["height"], row["width"], row["batch"]) == (84, 98, 1)
        assert row["precision"] == "fp32"
        assert row["error"] < 1e-5
        assert len(row["rounds"]) == 2
        assert 0 < row["median_ms"] <= row["p99_ms"]
        assert row["images_per_s"] == pytest.approx(1e3 / row["median_ms"])
        assert row["over_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"])
        assert row["speedup"] == pytest.approx(rows[0]["median_ms"] / row["median_ms"])
        assert row["cold_s"] > 0
        assert row["cached_s"] > 0
        # Only eager loads PyTorch, whose libraries alone take more than 100 MB.
        assert (row["memory_mb"] > 100) == (row["contender"] == "eager")
