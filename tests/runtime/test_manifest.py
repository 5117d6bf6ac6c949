"""The manifest: its text is stable, and one that is not exactly of the schema is refused."""

import json

import pytest

from da3_runtime.errors import ManifestError
from da3_runtime.network_io import INPUTS, output_specs
from da3_runtime.store.manifest import (
    Artefact,
    File,
    GraphEntry,
    Kind,
    Manifest,
    Parity,
    Profile,
    Source,
    read_manifest,
)
from tests.support.engines import damage, forget_parity

PLAN = Artefact(
    Kind.TENSORRT,
    [File("model.plan", "f" * 64, 5)],
    "fp16",
    "print",
    1.5,
    {"tensorrt": "11"},
    library="11.4",
    compute_capabilities=["9.0"],
    version_compatible=True,
    parity=Parity.VERIFIED,
)
ONNX = Artefact(Kind.ONNX_FP32, [File("model.fp32.onnx", "0" * 64, 7)], "fp32", "print", 2.0, {})


def manifest():
    source = Source("random:0", "a" * 64, None, None, trained=False)
    graph = GraphEntry(INPUTS, output_specs(["depth", "sky"]), {"tensorrt-9.0": PLAN, "onnx-fp32": ONNX})
    profile = Profile([1, 84, 84, 3], [1, 504, 504, 3], [8, 1036, 1036, 3])
    return Manifest("da3-nano", "dpt", "MIT", "relative", source, None, 14, [profile], {"model": graph})


def write(folder, data):
    (folder / "manifest.json").write_text(json.dumps(data))


def test_what_is_read_is_what_was_written_byte_for_byte(tmp_path):
    text = manifest().to_json()
    (tmp_path / "manifest.json").write_text(text)
    read = read_manifest(tmp_path)
    assert read == manifest()
    assert read.to_json() == text
    assert read.graphs["model"].of_kind(Kind.TENSORRT) == [PLAN]
    assert json.loads(text)["graphs"]["model"]["inputs"] == [
        {"name": "images", "dtype": "uint8", "shape": ["batch", "height", "width", 3]}
    ]


def test_a_built_engine_s_manifest_is_rewritten_byte_for_byte(engine):
    text = (engine.folder / "manifest.json").read_text()
    assert read_manifest(engine.folder).to_json() == text


def test_no_manifest_is_no_error(tmp_path):
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "nothing") is None


VERIFIED = {
    "model onnx-fp32": Parity.VERIFIED,
    "model onnx-fp16": Parity.VERIFIED,
    "model tensorrt-rtx": Parity.UNVERIFIED,
}


def parity_of(folder):
    graphs = read_manifest(folder).graphs
    return {
        f"{key} {name}": each.parity for key in graphs for name, each in graphs[key].artefacts.items()
    }


def test_a_built_engine_s_manifest_says_which_artefacts_are_verified(engine):
    assert parity_of(engine.folder) == VERIFIED
    artefacts = json.loads((engine.folder / "manifest.json").read_text())["graphs"]["model"]["artefacts"]
    assert {name: each["parity"] for name, each in artefacts.items()} == {
        name.removeprefix("model "): str(parity) for name, parity in VERIFIED.items()
    }


@pytest.mark.parametrize("change", ["", "not ok", "other files", "damaged", "missing"])
def test_without_parity_in_the_manifest_the_report_decides(engine_copy, change):
    forget_parity(engine_copy)
    path = engine_copy.folder / "parity.json"
    report = json.loads(path.read_text())
    if change == "not ok":
        report["ok"] = False
    if change == "other files":
        report["artefacts"] = dict.fromkeys(report["artefacts"], "0" * 64)
    damage(
        path,
        None if change == "missing" else b"{" if change == "damaged" else json.dumps(report).encode(),
    )
    expected = dict.fromkeys(VERIFIED, Parity.UNVERIFIED) if change else VERIFIED
    assert parity_of(engine_copy.folder) == expected


def test_parity_in_the_manifest_needs_no_report(engine_copy):
    damage(engine_copy.folder / "parity.json", None)
    assert parity_of(engine_copy.folder) == VERIFIED


CHANGES = {
    "no schema version": lambda data: data.pop("schema_version"),
    "another schema version": lambda data: data.update(schema_version=1),
    "an unknown key": lambda data: data.update(extra=1),
    "an unknown key of a tensor": lambda data: graph(data)["inputs"][0].update(extra=1),
    "an unknown key of a file": lambda data: onnx(data)["files"][0].update(extra=1),
    "a missing key": lambda data: data.pop("profiles"),
    "a missing key of an artefact": lambda data: onnx(data).pop("fingerprint"),
    "a missing key of a tensor": lambda data: graph(data)["outputs"][0].pop("dtype"),
    "an unknown parity": lambda data: onnx(data).update(parity="checked"),
    "an unknown kind": lambda data: onnx(data).update(kind="onnx-int8"),
    "a name that is a path": lambda data: onnx(data)["files"][0].update(name="../escape.onnx"),
    "an absolute name": lambda data: onnx(data)["files"][0].update(name="/etc/passwd"),
    "a name of another artefact": lambda data: graph(data)["artefacts"].update(
        {"tensorrt-8.9": graph(data)["artefacts"].pop("tensorrt-9.0")}
    ),
    "text for a size": lambda data: onnx(data)["files"][0].update(size="large"),
    "a list for the graphs": lambda data: data.update(graphs=[]),
}


def graph(data):
    return data["graphs"]["model"]


def onnx(data):
    return graph(data)["artefacts"]["onnx-fp32"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_is_not_of_the_schema_is_one_sentence(tmp_path, change):
    data = json.loads(manifest().to_json())
    write(tmp_path, data)
    assert read_manifest(tmp_path) == manifest()
    CHANGES[change](data)
    write(tmp_path, data)
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path)
    sentence = "manifest.json is damaged or not of schema version 2; build the engine again."
    assert str(caught.value) == sentence
