"""Parity of da3-nano on photos of every shape, in batches of every size, and on every scene: `make test-long`."""

import json

from da3_export.parity.cases import all_cases
from tests.support.paths import NANO
from tests.support.processes import run_module


def test_every_case_is_in_parity(engine_copy):
    folder = ("--engine-dir", str(engine_copy.engine_dir))
    done = run_module("da3_export", "parity", "--model", NANO, *folder, timeout=580)
    assert done.code == 0, done.stderr
    report = json.loads((engine_copy.folder / "parity.json").read_text())
    assert report["ok"]
    assert all(row["ok"] for row in report["rows"])
    # FP16 weights in FP32 arithmetic are measured on one case.
    every = len(all_cases(False, True))
    for arithmetic, cases in {"fp32": every, "fp16 weights": 1, "fp16": every}.items():
        rows = [row for row in report["rows"] if row["arithmetic"] == arithmetic]
        assert len({row["output"] for row in rows}) == 6
        assert len(rows) == 6 * cases
