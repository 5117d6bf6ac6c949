"""The manifest: its text is stable, and one that is not exactly of the schema is refused."""

import json

import pytest

from da3_runtime.errors import ManifestError
from da3_runtime.network_io import input_specs, output_specs
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
from tests.support.engines import damage

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
    graph = GraphEntry(
        input_specs(["images"]),
        output_specs(["depth", "sky"]),
        {"tensorrt-9.0": PLAN, "onnx-fp32": ONNX},
    )
    profile = Profile([1, 1, 84, 84, 3], [1, 1, 504, 504, 3], [8, 1, 1036, 1036, 3])
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
        {"name": "images", "dtype": "uint8", "shape": ["scenes", "views", "height", "width", 3]}
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
    "model onnx-fp16-ort": Parity.VERIFIED,
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


@pytest.mark.parametrize("version", [1, 2])
def test_an_engine_for_one_photo_only_is_to_be_built_again(engine_copy, version):
    path = engine_copy.folder / "manifest.json"
    damage(path, json.dumps(json.loads(path.read_text()) | {"schema_version": version}).encode())
    with pytest.raises(ManifestError) as caught:
        read_manifest(engine_copy.folder)
    assert str(caught.value) == (
        f"The engine was built by an earlier release, for one photo only (schema version {version} "
        "instead of 3); build it again."
    )


def test_parity_in_the_manifest_needs_no_report(engine_copy):
    damage(engine_copy.folder / "parity.json", None)
    assert parity_of(engine_copy.folder) == VERIFIED


CHANGES = {
    "no schema version": lambda data: data.pop("schema_version"),
    "a later schema version": lambda data: data.update(schema_version=4),
    "a schema version that is no number": lambda data: data.update(schema_version="3"),
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
    sentence = "manifest.json is damaged or not of schema version 3; build the engine again."
    assert str(caught.value) == sentence
