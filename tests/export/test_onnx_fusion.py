"""The graph for ONNX Runtime on CUDA: fewer operators than the FP16 ONNX, the same weights, kernels for all of it."""

import json
from collections import Counter

import onnx
import pytest
from onnx import TensorProto, shape_inference

from da3_export import freshness
from da3_export.build import build
from da3_export.onnx_fusion import fuse_onnx
from da3_runtime.backends.onnxruntime_cuda import OnnxRuntimeCuda, OnnxRuntimeTensorRT
from da3_runtime.errors import BackendUnavailableError, BuildError
from da3_runtime.network.sizes import SIZES
from da3_runtime.store.find_engine import find_engine
from da3_runtime.store.manifest import Kind
from da3_runtime.store.settings import EngineSettings
from tests.support.builds import (
    ONE_CASE,
    artefacts_of,
    build_request,
    copy_with,
    export_by_copying,
    measure_on,
)
from tests.support.engines import damage, graph_of, link_onnx, weights_of
from tests.support.paths import NANO

HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT
BLOCKS = SIZES[NANO].depth + SIZES[NANO].encoder_depth
# What the fused graph may have beside the operators and dtypes of the FP16 ONNX, all of which ran on CUDA.
# ONNX Runtime has CUDA kernels for them in FP16 (its docs/OperatorKernels.md).
KERNELS = {
    "Concat",
    "Gather",
    "LayerNormalization",
    "RotaryEmbedding",
    "Slice",
    "com.microsoft.BiasGelu",
    "com.microsoft.SkipLayerNormalization",
}


@pytest.fixture(scope="module")
def source(engine):
    return engine.folder / "model.fp16.onnx"


@pytest.fixture(scope="module")
def fused(engine):
    return graph_of(engine.folder / "model.fp16.ort.onnx")


def dtypes_of(model):
    graph = shape_inference.infer_shapes(model).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    dtypes = {value.name: value.type.tensor_type.elem_type for value in values}
    return dtypes | {tensor.name: tensor.data_type for tensor in graph.initializer}


def kernels_of(model):
    """Operators of a graph with the dtypes that they take and make."""
    dtypes = dtypes_of(model)
    return {
        (f"{node.domain}.{node.op_type}".lstrip("."), dtypes[node.input[0]], dtypes[node.output[0]])
        for node in model.graph.node
    }


def test_every_operator_and_dtype_has_a_kernel_on_cuda(fused, source):
    added = kernels_of(fused) - kernels_of(graph_of(source))
    assert added == {(name, HALF, HALF) for name in KERNELS}


def test_every_block_is_fused(fused):
    counts = Counter(node.op_type for node in fused.graph.node)
    assert counts["SkipLayerNormalization"] == 2 * BLOCKS
    assert counts["BiasGelu"] == counts["Attention"] == BLOCKS
    # The pose branch computes in FP32.
    assert counts["Gelu"] == 1
    producers = {name: node.op_type for node in fused.graph.node for name in node.output}
    readers = [node for node in fused.graph.node if node.op_type == "Attention"]
    assert {producers[name] for node in readers for name in node.input} == {"Split", "RotaryEmbedding"}


def test_no_cast_is_undone_by_the_next(fused):
    casts = {node.output[0]: node for node in fused.graph.node if node.op_type == "Cast"}
    dtypes = dtypes_of(fused)
    floats = {HALF, SINGLE}
    for name, node in casts.items():
        if node.input[0] in casts and dtypes[name] in floats:
            assert dtypes[casts[node.input[0]].input[0]] not in floats


def test_its_weights_are_those_of_the_fp16_onnx(fused, source, engine):
    stored = {tensor.name: tensor for tensor in graph_of(source).graph.initializer}
    outside = [tensor for tensor in fused.graph.initializer if tensor.external_data]
    assert outside
    assert all(tensor == stored[tensor.name] for tensor in outside)
    artefact = artefacts_of(engine.folder)["onnx-fp16-ort"]
    assert [file.name for file in artefact.files] == ["model.fp16.ort.onnx", weights_of(source).name]
    assert artefact.files[0].size < 0.1 * artefact.files[1].size


def test_building_it_twice_gives_the_same_bytes(source, engine, tmp_path):
    target = tmp_path / "fused.onnx"
    fuse_onnx(source, target)
    assert target.read_bytes() == (engine.folder / "model.fp16.ort.onnx").read_bytes()


def without_bias(model):
    """Without the bias of one product."""
    (node,) = (
        node for node in model.graph.node if "backbone.pretrained.blocks.1.mlp.fc2.bias" in node.input
    )
    node.op_type = "Sub"


def without_transpose(model):
    """With another order of the dimensions before the last attention."""
    node = [
        node
        for node in model.graph.node
        if node.op_type == "Transpose" and len(node.attribute[0].ints) == 5
    ][-1]
    node.op_type = "Identity"
    del node.attribute[:]


def without_rotation(model):
    """As exported without paired channels, where additions and products rotate."""
    node = next(node for node in model.graph.node if node.op_type == "RotaryEmbedding")
    node.op_type = "Add"
    del node.input[2:]


def without_attention(model):
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.op_type = "Custom"


@pytest.mark.parametrize(
    "change", [without_bias, without_transpose, without_rotation, without_attention]
)
def test_a_graph_without_an_expected_pattern_is_refused(source, tmp_path, change):
    model = graph_of(source)
    change(model)
    link_onnx(source, tmp_path / source.name)
    damage(tmp_path / source.name, model.SerializeToString())
    with pytest.raises(BuildError, match="The fused graph cannot be made"):
        fuse_onnx(tmp_path / source.name, tmp_path / "fused.onnx")


def test_its_errors_are_measured_on_all_outputs(engine):
    rows = json.loads((engine.folder / "parity.json").read_text())["rows"]
    measured = [
        row for row in rows if row["artefact"] == "onnx-fp16-ort" and row["arithmetic"] == "fp16"
    ]
    others = [row for row in rows if row["artefact"] == "onnx-fp16" and row["arithmetic"] == "fp16"]
    assert len(measured) == len(others) > 0
    assert {row["output"] for row in measured} >= {"depth", "confidence", "rotation", "reference"}
    assert any(row["mean"] > 0 for row in measured if row["output"] == "depth")


@pytest.fixture
def copy(engine, tmp_path, monkeypatch):
    """A copy of the engine with its two FP16 graphs, whose exporter links the FP16 ONNX of the original."""
    measure_on(monkeypatch, ONE_CASE)
    export_by_copying(monkeypatch, engine.folder / "model.fp16.onnx")
    return copy_with(engine, tmp_path, Kind.ONNX_FP16, Kind.ONNX_FP16_ORT)


def inode(copy, name):
    return (copy.folder / name).stat().st_ino


def test_a_raised_fusion_version_makes_it_again_from_the_onnx_that_is_there(copy, monkeypatch, capsys):
    before = artefacts_of(copy.folder)
    monkeypatch.setattr(freshness, "FUSION_VERSION", 99)
    build(build_request(copy.engine_dir, "onnx-fp16-ort"))
    after = artefacts_of(copy.folder)
    assert after["onnx-fp16"] == before["onnx-fp16"]
    assert after["onnx-fp16-ort"].fingerprint != before["onnx-fp16-ort"].fingerprint
    assert after["onnx-fp16-ort"].digest == before["onnx-fp16-ort"].digest
    build(build_request(copy.engine_dir, "onnx-fp16-ort"))
    assert "up to date" in capsys.readouterr().err


def test_a_new_fp16_onnx_makes_it_again_too(copy, monkeypatch):
    before = artefacts_of(copy.folder)
    monkeypatch.setattr(freshness, "EXPORT_VERSION", 99)
    build(build_request(copy.engine_dir, "onnx-fp16"))
    after = artefacts_of(copy.folder)
    for name in ("onnx-fp16", "onnx-fp16-ort"):
        assert after[name].fingerprint != before[name].fingerprint


def test_asked_for_alone_it_comes_with_the_onnx_that_it_is_made_from(engine, tmp_path, monkeypatch):
    measure_on(monkeypatch, ONE_CASE)
    export_by_copying(monkeypatch, engine.folder / "model.fp16.onnx")
    request = build_request(tmp_path, "onnx-fp16-ort")
    build(request)
    assert set(artefacts_of(request.folder)) == {"onnx-fp16", "onnx-fp16-ort"}


@pytest.mark.parametrize(
    ("kinds", "backend", "expected"),
    [
        ((Kind.ONNX_FP16, Kind.ONNX_FP16_ORT), OnnxRuntimeCuda, Kind.ONNX_FP16_ORT),
        ((Kind.ONNX_FP16,), OnnxRuntimeCuda, Kind.ONNX_FP16),
        ((Kind.ONNX_FP16, Kind.ONNX_FP16_ORT), OnnxRuntimeTensorRT, Kind.ONNX_FP16),
    ],
)
def test_onnxruntime_on_cuda_takes_it_where_an_engine_has_it(engine, tmp_path, kinds, backend, expected):
    copied = copy_with(engine, tmp_path, *kinds)
    folder, _ = find_engine(EngineSettings(engine_dir=copied.engine_dir, model_id=NANO))
    (graph,) = folder.variant.graphs
    assert backend.kind_in(folder, graph, EngineSettings()) is expected
    assert onnx.load(str(folder.artefact(graph, expected)), load_external_data=False).graph.node


def test_a_release_that_cannot_load_it_runs_the_fp16_onnx(engine, monkeypatch, caplog):
    def load(kind, *_):
        if kind is Kind.ONNX_FP16_ORT:
            raise BackendUnavailableError("ONNX Runtime cannot load model.fp16.ort.onnx.")
        return kind

    monkeypatch.setattr(OnnxRuntimeCuda, "load_kind", load)
    settings = EngineSettings(engine_dir=engine.engine_dir, model_id=NANO)
    folder, _ = find_engine(settings)
    (graph,) = folder.variant.graphs
    assert OnnxRuntimeCuda.load(folder, graph, settings) is Kind.ONNX_FP16
    assert "model.fp16.ort.onnx.; loading onnx-fp16 instead" in caplog.text
