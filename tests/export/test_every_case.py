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
    # FP16 arithmetic is emulated on one case.
    for arithmetic, count in {"fp32": None, "fp16 weights": None, "fp16": 1}.items():
        rows = [row for row in report["rows"] if row["arithmetic"] == arithmetic]
        outputs = {row["output"] for row in rows}
        assert len(outputs) == 6
        assert len(rows) == 6 * (count or len(all_cases(False, True)))
