"""The ONNX graphs: interface, dynamic shapes, and the precision policy as the graph carries it."""

import os
from collections import Counter

import numpy as np
import pytest
from onnx import TensorProto, shape_inference

from da3_export.onnx_attention import OPERATOR, spell_out_attention
from da3_export.parity.cases import Case, case_images
from da3_export.parity.subjects import FP32, onnx_runner
from da3_runtime.network.sizes import SIZES
from da3_runtime.store.manifest import read_manifest
from tests.support.engines import graph_of, weights_of
from tests.support.paths import NANO, ROOT, SMALL

FLOAT, HALF, UINT8, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.INT64
FILES = {"fp32": "model.fp32.onnx", "fp16": "model.fp16.onnx"}


@pytest.fixture(scope="module", params=list(FILES))
def name(request):
    """The precision: FP32 is looked at in da3-small's engine, FP16 in da3-nano's."""
    return request.param


@pytest.fixture(scope="module")
def folder(name, small_engine, engine):
    return small_engine.folder if name == "fp32" else engine.folder


@pytest.fixture(scope="module")
def model(name, folder):
    return graph_of(folder / FILES[name])


@pytest.fixture(scope="module")
def half(engine):
    return typed(graph_of(engine.folder / FILES["fp16"]))


def typed(model):
    """A graph's nodes, and the dtype of every value in it."""
    graph = shape_inference.infer_shapes(model).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    dtypes = {value.name: value.type.tensor_type.elem_type for value in values}
    dtypes |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return graph.node, dtypes


def interface(values):
    return [
        (v.name, v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in values
    ]  # fmt: skip


def test_input_is_bytes_and_outputs_are_fp32(model):
    assert interface(model.graph.input) == [
        ("images", UINT8, ["scenes", "views", "height", "width", 3]),
        ("wanted_reference", INT64, ["scenes"]),
        ("poses", FLOAT, ["scenes", "views", 9]),
    ]
    assert interface(model.graph.output) == [
        ("depth", FLOAT, ["scenes", "views", "height", "width"]),
        ("confidence", FLOAT, ["scenes", "views", "height", "width"]),
        ("intrinsics", FLOAT, ["scenes", "views", 3, 3]),
        ("extrinsics", FLOAT, ["scenes", "views", 3, 4]),
        ("reference", INT64, ["scenes"]),
    ]


def test_the_manifest_describes_the_same_interface(folder, model):
    manifest = read_manifest(folder).graphs["model"]
    for specs, values in ((manifest.inputs, model.graph.input), (manifest.outputs, model.graph.output)):
        assert [(spec.name, spec.shape) for spec in specs] == [(n, s) for n, _, s in interface(values)]


def test_the_ray_branch_is_not_in_the_graph(model):
    assert not [tensor.name for tensor in model.graph.initializer if "aux" in tensor.name]


def test_the_file_says_nothing_of_the_machine_that_wrote_it(name, folder):
    content = (folder / FILES[name]).read_bytes()
    assert str(ROOT).encode() not in content
    assert b"site-packages" not in content


def test_every_node_is_a_standard_onnx_operator(model):
    assert {node.domain for node in model.graph.node} == {""}


@pytest.mark.parametrize("op", ["LayerNormalization", "RotaryEmbedding", "Exp", "Gemm", "Sin", "Cos"])
def test_what_needs_range_computes_in_fp32(half, op):
    nodes, dtypes = half
    found = [node for node in nodes if node.op_type == op]
    assert found
    assert all(dtypes[name] == FLOAT for node in found for name in (*node.input, *node.output) if name)


def test_matrix_products_and_convolutions_compute_in_fp16(half):
    nodes, dtypes = half
    wide = {
        node.op_type: []
        for node in nodes
        if node.op_type in ("Attention", "MatMul", "Conv", "ConvTranspose", "Resize")
    }
    counts = dict.fromkeys(wide, 0)
    for node in nodes:
        if node.op_type in wide:
            counts[node.op_type] += 1
            if dtypes[node.output[0]] != HALF:
                wide[node.op_type].append(node)
    assert counts["Attention"] == SIZES[NANO].depth + SIZES[NANO].encoder_depth
    assert counts["MatMul"] > 4 * SIZES[NANO].depth
    assert counts["Conv"] > 20
    assert counts["Resize"] == 5
    assert not wide["Attention"]
    assert not wide["ConvTranspose"]
    assert not wide["Resize"]
    # The one convolution in FP32 makes the logits.
    assert [node.input[1] for node in wide["Conv"]] == ["head.scratch.output_conv2.2.weight"]
    # FP32 products: the two that interpolate the positional table, the one of the views' similarity, the
    # pose branch's two, and world_to_camera's one.
    assert len(wide["MatMul"]) == 6


# Inputs that say a shape or a place, which every runtime takes from the host.
HOST_INPUTS = {
    "ConstantOfShape": {0}, "Expand": {1}, "Range": {0, 1, 2}, "ReduceSum": {1}, "Reshape": {1}, "Resize": {2, 3},
    "Slice": {1, 2, 3, 4}, "Split": {1}, "Squeeze": {1}, "Unsqueeze": {1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("head", "file"),
    [
        ("dpt", FILES["fp32"]),
        ("dpt", FILES["fp16"]),
        ("dpt", "model.fp16.ort.onnx"),
        ("sdt", FILES["fp32"]),
    ],
)
def test_no_size_is_copied_to_the_device_in_the_middle_of_the_network(
    small_engine, engine, sdt_engine, head, file
):
    """What is computed from shapes alone is on the host; as anything but a shape it would be copied."""
    dpt_engine = small_engine if file == FILES["fp32"] else engine
    model = graph_of({"dpt": dpt_engine, "sdt": sdt_engine}[head].folder / file)
    constants = {tensor.name for tensor in model.graph.initializer} | {""}
    host = set()
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants.update(node.output)
        elif node.op_type == "Shape":
            host.update(node.output)
        else:
            shapes = HOST_INPUTS.get(node.op_type, set())
            data = {name for i, name in enumerate(node.input) if i not in shapes} - constants
            assert not data & host or data <= host, node
            if data & host:
                host.update(node.output)
    assert host


def test_attention_and_rotation_are_one_operator_each(name, model):
    """Blocks from ``alternate_from`` on rotate queries and keys."""
    sizes = SIZES[SMALL if name == "fp32" else NANO]
    rotations = 2 * (sizes.depth - sizes.alternate_from)
    assert rotations > 0
    counts = Counter(node.op_type for node in model.graph.node)
    found = counts["Attention"], counts["RotaryEmbedding"], counts["Softmax"]
    assert found == (sizes.depth + sizes.encoder_depth, rotations, 0)


def test_attention_spelled_out_is_the_operator(small_engine, tmp_path):
    path = small_engine.folder / FILES["fp32"]
    model = graph_of(path)
    spell_out_attention(model)
    assert OPERATOR not in {node.op_type for node in model.graph.node}
    (tmp_path / "spelled.onnx").write_bytes(model.SerializeToString())
    os.link(weights_of(path), tmp_path / weights_of(path).name)
    images = np.random.default_rng(0).integers(0, 256, (2, 1, 84, 98, 3), dtype=np.uint8)
    spelled, plain = (
        onnx_runner(file, FP32)(images, None) for file in (tmp_path / "spelled.onnx", path)
    )
    for name in ("depth", "confidence", "intrinsics", "extrinsics"):
        np.testing.assert_allclose(getattr(spelled, name), getattr(plain, name), rtol=1e-4, atol=1e-5)


def test_attention_spelled_out_for_plans_has_its_softmax_in_fp32(engine):
    model = graph_of(engine.folder / FILES["fp16"])
    spell_out_attention(model)
    nodes, dtypes = typed(model)
    softmax = [node for node in nodes if node.op_type == "Softmax"]
    assert len(softmax) == SIZES[NANO].depth + SIZES[NANO].encoder_depth
    assert {dtypes[name] for node in softmax for name in (*node.input, *node.output)} == {FLOAT}
    assert_nothing_is_mixed(nodes, dtypes)


def test_no_operator_mixes_the_two_precisions(half):
    assert_nothing_is_mixed(*half)


def assert_nothing_is_mixed(nodes, dtypes):
    """What strong typing means: casts are explicit."""
    for node in nodes:
        if node.op_type != "Cast":
            kinds = {dtypes.get(name) for name in (*node.input, *node.output)} & {FLOAT, HALF}
            assert len(kinds) <= 1, node


def test_weights_are_stored_in_the_precision_they_are_used_in(engine):
    sizes = [weights_of(engine.folder / FILES[name]).stat().st_size for name in ("fp16", "fp32")]
    assert sizes[0] < 0.56 * sizes[1]


def test_weights_are_beside_the_graph_and_the_numbers_that_say_shapes_are_in_it(model, folder, name):
    inside = [tensor for tensor in model.graph.initializer if not tensor.external_data]
    assert {tensor.data_type for tensor in model.graph.initializer if tensor not in inside} <= {
        FLOAT,
        HALF,
    }
    assert any(tensor.data_type == INT64 for tensor in inside)
    assert (folder / FILES[name]).stat().st_size < 0.1 * weights_of(folder / FILES[name]).stat().st_size


SHAPES = [
    (1, 1, 84, 84),
    (8, 1, 84, 98),
    (1, 1, 1036, 84),
    (2, 1, 392, 392),
    (1, 1, 140, 1036),
    (5, 1, 98, 84),
    (1, 1, 602, 602),
    (1, 16, 84, 98),
    (3, 2, 98, 84),
]


@pytest.fixture(scope="module")
def run(small_engine):
    return onnx_runner(small_engine.folder / FILES["fp32"], FP32)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_graph_answers_at_every_size_and_batch(run, shape):
    images = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    outputs = run(images, None)
    assert outputs.depth.shape == outputs.confidence.shape == shape
    assert outputs.intrinsics.shape == (*shape[:2], 3, 3)
    assert outputs.extrinsics.shape == (*shape[:2], 3, 4)
    assert outputs.reference.shape == shape[:1]
    assert outputs.sky is None
    assert all(np.isfinite(value).all() for value in outputs if value is not None)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("name", ["small_engine", "sdt_engine"])
def test_scenes_of_a_batch_do_not_see_each_other(name, views, request):
    run = onnx_runner(request.getfixturevalue(name).folder / FILES["fp32"], FP32)
    images = np.random.default_rng(0).integers(0, 256, (3, views, 84, 98, 3), dtype=np.uint8)
    together = run(images, None)
    for i in range(3):
        alone = run(images[i : i + 1], None)
        np.testing.assert_allclose(together.depth[i], alone.depth[0], rtol=1e-4)
        np.testing.assert_allclose(together.extrinsics[i], alone.extrinsics[0], rtol=1e-3, atol=1e-4)


def test_one_photo_has_the_outputs_of_the_graph_for_one_photo(engine):
    """The file holds the outputs of da3-nano's graph from before graphs took several views."""
    raw = onnx_runner(engine.folder / FILES["fp32"], FP32)(case_images(Case(84, 98, 1)), None)
    with np.load(ROOT / "tests" / "support" / "one_photo.npz") as before:
        for name, values in before.items():
            np.testing.assert_allclose(getattr(raw, name)[:, 0], values, rtol=1e-4, atol=1e-6)
