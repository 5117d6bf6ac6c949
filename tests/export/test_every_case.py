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
    counts = {("onnx-fp32", "fp32"): every}
    for artefact in ("onnx-fp16", "onnx-fp16-ort"):
        counts |= {(artefact, "fp16 weights"): 1, (artefact, "fp16"): every}
    for (artefact, arithmetic), cases in counts.items():
        of_it = (artefact, arithmetic)
        rows = [row for row in report["rows"] if (row["artefact"], row["arithmetic"]) == of_it]
        assert len({row["output"] for row in rows}) == 6
        assert len(rows) == 6 * cases
