"""The list of engines: a row for every artefact, and whether its parity was checked."""

import json

from da3_export.claims import experience_with
from da3_export.list_engines import engine_rows, list_engines
from da3_runtime.store.manifest import Kind, Parity
from tests.support.engines import damage
from tests.support.paths import NANO


def test_every_artefact_is_a_row(engine_copy):
    rows = {row.artefact: row for row in engine_rows(engine_copy.engine_dir)}
    assert set(rows) == {"onnx-fp32", "onnx-fp16", "onnx-fp16-ort", "tensorrt-rtx"}
    plan, half = rows["tensorrt-rtx"], rows["onnx-fp16"]
    assert {(row.model, row.head, row.graph, row.trained) for row in rows.values()} == {
        (NANO, "dpt", "model", True)
    }
    assert {row.weights for row in rows.values()} == {"bundled"}
    assert (plan.precision, plan.gpus) == ("fp16", ["8.0", "8.6", "8.9", "12.0+"])
    assert plan.library.split(".")[0] == "1"
    assert (half.precision, half.gpus, half.library) == ("fp16", [], "")
    files = engine_copy.folder.glob("model.fp16.onnx*")
    assert half.mb == round(sum(file.stat().st_size for file in files) / 1e6, 1)


def test_parity_is_verified_or_the_reason_is_given(engine_copy):
    rows = {row.artefact: row for row in engine_rows(engine_copy.engine_dir)}
    assert (rows["onnx-fp32"].parity, rows["onnx-fp32"].reason) == (Parity.VERIFIED, "")
    report = json.loads((engine_copy.folder / "parity.json").read_text())
    expected = report["not_checked"]["model tensorrt-rtx"]
    assert (rows["tensorrt-rtx"].parity, rows["tensorrt-rtx"].reason) == (Parity.UNVERIFIED, expected)
    assert expected.endswith(experience_with(Kind.TENSORRT_RTX))
    assert f"Unverified: {NANO}/dpt model tensorrt-rtx: {expected}\n" in (
        list_engines(engine_copy.engine_dir) + "\n"
    )


def test_the_reason_for_an_unverified_artefact_is_that_of_its_own_report(engine_copy):
    path = engine_copy.folder / "manifest.json"
    damage(path, path.read_bytes().replace(b'"verified"', b'"unverified"'))
    path = engine_copy.folder / "parity.json"
    report = json.loads(path.read_text())
    report["artefacts"]["model onnx-fp32"] = "0" * 64
    damage(path, json.dumps(report).encode())
    rows = {row.artefact: row for row in engine_rows(engine_copy.engine_dir)}
    assert "is of other files" in rows["onnx-fp32"].reason
    assert "out of tolerance" in rows["onnx-fp16"].reason
    path.unlink()
    for row in engine_rows(engine_copy.engine_dir):
        assert row.parity == Parity.UNVERIFIED
        assert "parity.json is missing" in row.reason


def test_an_engine_with_a_damaged_manifest_is_listed_with_the_reason(engine_copy):
    damage(engine_copy.folder / "manifest.json", b"{")
    (row,) = engine_rows(engine_copy.engine_dir)
    assert (row.model, row.head, row.artefact) == (NANO, "dpt", "")
    assert "manifest.json is damaged" in row.reason
    assert "manifest.json is damaged" in list_engines(engine_copy.engine_dir)


def test_the_command_prints_a_table_or_json(engine_copy, tmp_path, run_here):
    done = run_here("da3_export", "list", "--engine-dir", str(engine_copy.engine_dir))
    assert (done.code, done.stderr) == (0, "")
    assert "8.0 8.6 8.9 12.0+" in done.stdout
    done = run_here("da3_export", "list", "--json", "--engine-dir", str(engine_copy.engine_dir))
    assert {row["artefact"] for row in json.loads(done.stdout)} == {
        "onnx-fp32",
        "onnx-fp16",
        "onnx-fp16-ort",
        "tensorrt-rtx",
    }
    done = run_here("da3_export", "list", "--engine-dir", str(tmp_path / "none"))
    assert (done.code, done.stdout.count("\n")) == (0, 1)
    assert "No engine in" in done.stdout
