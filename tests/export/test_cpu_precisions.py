"""INT8 and bf16: faster and less exact artefacts for CPUs, built and run only if ``PRECISION`` names them."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import da3_export.build
import da3_runtime.util.extras
from da3_export.build import build
from da3_export.onnx_int8 import write_int8
from da3_export.parity import eager_bf16
from da3_export.parity.cases import Case, case_images
from da3_export.parity.measure import measure_engine
from da3_export.parity.tolerances import order_error
from da3_export.request import DEFAULT_TARGETS, request_of
from da3_export.settings import BuildSettings
from da3_runtime.backends.onnxruntime import OnnxRuntimeCpu
from da3_runtime.backends.openvino import OpenVino
from da3_runtime.errors import BackendUnavailableError, BuildError, SettingError
from da3_runtime.inference.backend_choice import candidates, load_backend
from da3_runtime.store.manifest import Kind, Parity
from da3_runtime.store.settings import EngineSettings
from tests.support.builds import artefacts_of, build_request, copy_with, measure_on
from tests.support.engines import graph_of
from tests.support.paths import NANO

# Of one small photo few pixels decide, and OpenVINO may err more than three times as much as PyTorch.
CASES = [Case(168, 252, 3), Case(84, 98, 1, 3)]
WAYS = {"int8": ("onnxruntime-cpu", "int8"), "bf16": ("openvino", "bf16")}


@pytest.fixture(scope="module")
def precise(engine, tmp_path_factory):
    """da3-nano's FP32 artefact of the engine, and INT8 and bf16 built beside it."""
    copy = copy_with(engine, tmp_path_factory.mktemp("precise"), Kind.ONNX_FP32)
    for path in list(copy.folder.iterdir()):  # onnx reads no weights from files with several hard links
        if path.is_file():
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(content)
    exported = []
    with pytest.MonkeyPatch.context() as patch:
        measure_on(patch, CASES)
        export = da3_export.build.export_onnx
        patch.setattr(
            da3_export.build,
            "export_onnx",
            lambda network, path: exported.append(path.name) or export(network, path),
        )
        build(build_request(copy.engine_dir, "onnx-bf16,onnx-int8"))
    # INT8 is made from the FP32 artefact that is there.
    assert exported == ["model.bf16.onnx"]
    return copy


def loaded(precise, precision="auto"):
    settings = EngineSettings(model_id=NANO, engine_dir=precise.engine_dir, precision=precision)
    return load_backend(settings)


def depth_of(precise, precision):
    model = loaded(precise, precision)
    try:
        return model.backend.name, model.run(case_images(CASES[0]))["model"].depth
    finally:
        model.close()


def test_both_are_built_beside_fp32_and_verified(precise):
    artefacts = artefacts_of(precise.folder)
    found = {name: (each.precision, each.parity) for name, each in artefacts.items()}
    verified = Parity.VERIFIED
    assert found == {
        "onnx-fp32": ("fp32", verified),
        "onnx-bf16": ("bf16", verified),
        "onnx-int8": ("int8", verified),
    }
    assert "onnxruntime" in artefacts["onnx-int8"].toolchain
    assert artefacts["onnx-int8"].size < 0.6 * artefacts["onnx-fp32"].size
    # The quantizer reads and writes files beside its source.
    assert not list(precise.folder.glob(".int8.*"))
    assert all(
        (precise.folder / file.name).stat().st_mode & 0o044 for file in artefacts["onnx-int8"].files
    )


@pytest.mark.parametrize("precision", WAYS)
def test_a_model_runs_in_the_precision_that_is_named(precise, precision):
    _, exact = depth_of(precise, "auto")
    model = loaded(precise, precision)
    try:
        assert (model.backend.name, model.backend.precision) == WAYS[precision]
        assert model.parity is Parity.VERIFIED
        assert model.digest() != loaded(precise).digest()
    finally:
        model.close()
    _, depth = depth_of(precise, precision)
    error = np.mean(np.abs(depth - exact) / exact)
    assert 1e-6 < error < {"int8": 3e-2, "bf16": 1e-2}[precision]


def test_products_are_in_int8_and_the_camera_stays_in_fp32(precise):
    graph = graph_of(precise.folder / "model.int8.onnx").graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(products) > 20
    # Of each product the activation is quantized when the graph runs, and the weight beforehand.
    assert all(stored[node.input[1]].data_type == TensorProto.INT8 for node in products)
    assert stored["cam_dec.fc_t.weight_Transposed"].data_type == TensorProto.FLOAT
    assert any(name.startswith("cam_enc.pose_branch") for name in stored)


def test_weights_take_seven_bits_so_that_no_processor_overflows(precise):
    model = onnx.load(str(precise.folder / "model.int8.onnx"))
    weights = [
        numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2
    ]
    assert weights
    assert max(int(np.abs(weight.astype(int)).max()) for weight in weights) <= 64


def test_the_last_product_of_a_swiglu_stays_in_fp32(tmp_path):
    # da3-giant has them; its graph takes minutes to export.
    nodes, weights = [], []
    for layer, source, result in (("w12", "x", "hidden"), ("w3", "hidden", "y")):
        names = [f"blocks.0.mlp.{layer}.{part}" for part in ("weight", "bias")]
        nodes.append(helper.make_node("MatMul", [source, names[0]], [f"{result}/product"], layer))
        nodes.append(helper.make_node("Add", [f"{result}/product", names[1]], [result], f"{layer}/bias"))
        values = (np.ones((64, 64), np.float32), np.ones(64, np.float32))
        weights += map(numpy_helper.from_array, values, names)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "feed forward", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), str(tmp_path / "source.onnx"))
    write_int8(tmp_path / "source.onnx", tmp_path / "int8.onnx")
    quantized = onnx.load(str(tmp_path / "int8.onnx")).graph
    assert [node.input[1] for node in quantized.node if node.op_type == "MatMul"] == [
        "blocks.0.mlp.w3.weight"
    ]
    assert sum(node.op_type == "MatMulInteger" for node in quantized.node) == 1


def test_a_graph_without_products_is_refused(tmp_path):
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "none", [shape], [result])
    onnx.save(helper.make_model(graph), str(tmp_path / "source.onnx"))
    with pytest.raises(BuildError, match=r"source\.onnx has no matrix product"):
        write_int8(tmp_path / "source.onnx", tmp_path / "int8.onnx")


def test_bf16_may_err_as_much_as_pytorch_and_no_more(precise, tmp_path, monkeypatch):
    shutil.copytree(precise.engine_dir, tmp_path / "engines")
    settings = BuildSettings(model_id=NANO, engine_dir=tmp_path / "engines")
    measure_on(monkeypatch, CASES[:1])
    report = measure_engine(settings)
    assert report.ok
    rows = {(row.artefact, row.output): row for row in report.rows}
    assert rows["onnx-bf16", "depth"].mean < 1e-2
    assert 0 < rows["onnx-int8", "order"].max < 1e-2
    monkeypatch.setattr(eager_bf16, "MARGIN", 0.01)
    strict = measure_engine(settings)
    assert {row.artefact for row in strict.rows if not row.ok} == {"onnx-bf16"}
    assert strict.parity["model onnx-bf16"] is Parity.UNVERIFIED


def test_without_openvino_bf16_is_not_measured_and_does_not_run(precise, monkeypatch):
    def find_spec(name, find=da3_runtime.util.extras.find_spec):
        return None if name == "openvino" else find(name)

    monkeypatch.setattr(da3_runtime.util.extras, "find_spec", find_spec)
    install = r'openvino is not installed: pip install "da3-runtime\[openvino\]"'
    with pytest.raises(BackendUnavailableError, match=install):
        loaded(precise, "bf16")
    measure_on(monkeypatch, CASES[:1])
    report = measure_engine(BuildSettings(model_id=NANO, engine_dir=precise.engine_dir))
    assert "openvino is not installed" in report.not_checked["model onnx-bf16"]
    # It keeps what an earlier measurement found.
    assert report.parity["model onnx-bf16"] is Parity.VERIFIED


@pytest.mark.parametrize("precision", WAYS)
def test_an_engine_without_the_artefact_is_refused_and_says_how_to_build_it(engine, precision):
    with pytest.raises(BackendUnavailableError, match=rf"no onnx-{precision} artefact .*TARGETS=onnx-"):
        loaded(engine, precision)


def test_precision_chooses_among_the_backends():
    assert candidates(EngineSettings(precision="int8")) == [OnnxRuntimeCpu]
    assert candidates(EngineSettings(precision="bf16")) == [OpenVino]
    assert OpenVino not in candidates(EngineSettings())
    named = EngineSettings(backend="onnxruntime-cpu", precision="int8")
    assert candidates(named) == [OnnxRuntimeCpu]
    with pytest.raises(SettingError, match="BACKEND openvino takes PRECISION bf16, not auto"):
        candidates(EngineSettings(backend="openvino"))
    with pytest.raises(
        SettingError, match="BACKEND onnxruntime-cpu takes PRECISION auto or int8, not bf16"
    ):
        candidates(replace(named, precision="bf16"))


def test_a_build_with_a_precision_adds_its_artefact():
    assert request_of(BuildSettings(model_id=NANO, precision="int8"), None).targets == (
        *DEFAULT_TARGETS,
        Kind.ONNX_INT8,
    )
    assert request_of(BuildSettings(model_id=NANO, precision="bf16"), "onnx-fp32").targets == (
        Kind.ONNX_FP32,
    )


def test_the_order_of_depths_is_spearmans_rank_correlation():
    random = np.random.default_rng(0)
    reference = random.random((1, 2, 4, 6))
    other = reference + random.normal(0, 0.2, reference.shape)
    assert np.allclose(order_error(np.exp(reference), reference), 0)
    assert np.allclose(order_error(-reference, reference), 2)

    def by_differences(one, two):
        ranks = [np.argsort(np.argsort(each.reshape(-1))) for each in (one, two)]
        count = one.size
        return 6 * np.sum((ranks[0] - ranks[1]) ** 2) / (count * (count**2 - 1))

    want = [by_differences(other[0, view], reference[0, view]) for view in range(2)]
    assert np.allclose(order_error(other, reference), want)
