"""Parity passes on the engines, and can fail."""

import copy
import json
import os
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import da3_runtime.network.positions as positions
from da3_export.parity.cases import BATCHES, SHAPES, Case, case_cameras, case_images
from da3_export.parity.fp16_emulation import round_like_half
from da3_export.parity.reference import CLEAR_MARGIN, run_reference
from da3_export.parity.report import compare
from da3_export.parity.subjects import FP16, FP32, onnx_runner
from da3_export.parity.tolerances import relative_errors
from da3_export.parity.upstream import build_upstream, load_upstream
from da3_runtime.errors import BuildError
from da3_runtime.network import precision
from da3_runtime.network.load import load_network
from da3_runtime.network_io import RawOutputs
from da3_runtime.variants import find_variant
from tests.support.build_engines import few_cases
from tests.support.engines import graph_of, weights_of

VARIANT = find_variant("da3-small")
GRAPH = VARIANT.graphs[0]
CASE = Case(98, 140, 2)
SCENES = Case(84, 126, 2, 3)
KNOWN = Case(140, 112, 2, 3, known=True)


@pytest.fixture(scope="module")
def weights(small_engine):
    return small_engine.folder / "checkpoint" / "model.safetensors"


@pytest.fixture(scope="module")
def reference(weights):
    return run_reference(load_upstream(VARIANT, GRAPH, weights), case_images(CASE), GRAPH)


def network_rows(weights, reference):
    network = load_network(VARIANT, GRAPH, weights, precision.FP32)
    return compare(FP32, CASE, run(network, case_images(CASE)), reference)


def run(network, images, *conditions):
    with torch.inference_mode():
        outputs = network(torch.from_numpy(images), *conditions)
    return RawOutputs.of(network.output_names, [value.numpy() for value in outputs])


def test_the_tolerances_are_the_published_ones():
    fp32 = FP32.bounds(sdt=False)
    maps, camera = (
        {"depth", "confidence", "sky", "ray_confidence", "rays"},
        {"intrinsics", "rotation", "translation"},
    )
    assert fp32.keys() == maps | camera | {"reference"}
    assert {fp32[name].max for name in maps} == {1e-4}
    assert {fp32[name].max for name in camera} == {1e-3}
    sdt = FP32.bounds(sdt=True)
    assert {(sdt[name].p999, sdt[name].max) for name in ("depth", "confidence", "sky")} == {(1e-4, 3e-4)}
    fp16 = FP16.bounds(sdt=False)
    assert fp32["reference"].max == fp16.pop("reference").max == 0
    assert {(bound.mean, bound.p999) for bound in fp16.values()} == {(3e-3, 3e-2)}
    assert SHAPES == ((364, 504), (504, 280), (504, 504), (84, 1036))
    assert BATCHES == (1, 3)


@pytest.mark.parametrize("name", ["engine", "sdt_engine", "small_engine"])
def test_the_report_holds_every_figure_and_is_in_tolerance(name, request):
    report = json.loads((request.getfixturevalue(name).folder / "parity.json").read_text())
    assert report["ok"]
    measured = {(row["artefact"], row["arithmetic"]) for row in report["rows"]}
    fp32 = {("onnx-fp32", "fp32")}
    halves = [("onnx-fp16", "fp16 weights"), ("onnx-fp16", "fp16")]
    fp16 = {*halves, *((f"{artefact}-ort", arithmetic) for artefact, arithmetic in halves)}
    # test_every_case measures the others on da3-nano; test_torch_to_onnx runs larger inputs.
    cases = len(few_cases())
    has_fp16 = name == "engine"
    assert measured == (fp32 | fp16 if has_fp16 else fp32)
    assert len(report["rows"]) == (3 * cases + 2 if has_fp16 else cases) * 6
    assert all(row["ok"] for row in report["rows"])
    assert all(row["max"] > 0 for row in report["rows"] if row["output"] == "depth")
    assert ("model tensorrt-rtx" in report["not_checked"]) == (name == "engine")
    assert set(report["tolerances"]) == {" ".join(each) for each in measured}


def test_untouched_network_is_in_parity(weights, reference):
    assert all(row.ok for row in network_rows(weights, reference))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            "depth_anything_3",
            "is not installed: pip install --no-deps --ignore-requires-python depth-anything-3==0.1.1.",
        ),
        ("omegaconf", "needs omegaconf, which is not installed: pip install omegaconf."),
    ],
)
def test_a_missing_reference_is_one_sentence(monkeypatch, module, reason):
    for name in [name for name in sys.modules if name.partition(".")[0] in (module, "depth_anything_3")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BuildError) as error:
        build_upstream(GRAPH)
    assert str(error.value) == f"Parity is measured against depth-anything-3, which {reason}"


def test_dropping_the_interpolation_offset_breaks_parity(weights, reference, monkeypatch):
    monkeypatch.setattr(positions, "INTERPOLATE_OFFSET", 0.0)
    assert not all(row.ok for row in network_rows(weights, reference) if row.output == "depth")


def test_swapping_rotary_axes_breaks_parity(weights, reference, monkeypatch):
    angles = positions.rotary_angles
    swapped = "da3_runtime.network.vit.rotary_angles"
    monkeypatch.setattr(swapped, lambda rows, columns, dim: angles(columns, rows, dim))
    assert not all(row.ok for row in network_rows(weights, reference) if row.output == "depth")


@pytest.mark.parametrize("block", [0, 5, 11])
def test_zeroing_one_norm_of_the_onnx_breaks_parity(small_engine, reference, tmp_path, block):
    original = small_engine.folder / "model.fp32.onnx"
    model = graph_of(original)
    name = f"backbone.pretrained.blocks.{block}.norm2.weight"
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    weight.CopyFrom(numpy_helper.from_array(np.zeros(weight.dims, np.float32), name))
    os.link(weights_of(original), tmp_path / weights_of(original).name)
    path = tmp_path / "zeroed.onnx"
    onnx.save(model, str(path))
    rows = compare(FP32, CASE, onnx_runner(path, FP32)(case_images(CASE), None), reference)
    assert not all(row.ok for row in rows if row.output == "depth")


@pytest.fixture(scope="module")
def scenes(weights):
    """The network, upstream's outputs for two scenes of three views, and their images."""
    images = case_images(SCENES)
    reference = run_reference(load_upstream(VARIANT, GRAPH, weights), images, GRAPH)
    return load_network(VARIANT, GRAPH, weights, precision.FP32), reference, images


def scene_verdicts(scenes, outputs):
    return {row.output: row.ok for row in compare(FP32, SCENES, outputs, scenes[1])}


def test_scenes_of_an_untouched_network_are_in_parity(scenes):
    network, _, images = scenes
    assert all(scene_verdicts(scenes, run(network, images)).values())


def test_another_reference_view_breaks_parity(scenes):
    network, reference, images = scenes
    wrong = (torch.from_numpy(reference.outputs.reference) + 1) % SCENES.views
    verdicts = scene_verdicts(scenes, run(network, images, wrong))
    assert not verdicts["reference"]
    assert not verdicts["depth"]


def test_swapping_the_camera_tokens_breaks_parity(scenes):
    network, _, images = scenes
    network = copy.deepcopy(network)
    token = network.backbone.pretrained.camera_token
    token.copy_(token.flip(1))
    assert not scene_verdicts(scenes, run(network, images))["depth"]


@pytest.mark.parametrize("shape", [(6, 1), (1, 6)], ids=["views apart", "scenes mixed"])
def test_attention_over_other_views_breaks_parity(scenes, shape):
    network, reference, images = scenes
    outputs = run(network, images.reshape(*shape, *images.shape[2:]))
    maps = {
        name: value.reshape(2, 3, *value.shape[2:])
        for name, value in outputs._asdict().items()
        if value is not None and name != "reference"
    }
    assert not scene_verdicts(scenes, outputs_like(reference, **maps))["depth"]


def test_an_unclear_choice_is_given_to_the_engine_and_reported(scenes):
    network, reference, images = scenes
    unclear = reference._replace(margin=0.01)
    assert reference.is_forced == (reference.margin < CLEAR_MARGIN)
    forced = unclear.conditions().reference
    assert forced.tolist() == reference.outputs.reference.tolist()
    rows = compare(FP32, SCENES, run(network, images, torch.from_numpy(forced)), unclear)
    assert {(row.margin, row.forced) for row in rows} == {(0.01, True)}


@pytest.fixture(scope="module")
def known(weights):
    """The network, and upstream's outputs for two scenes of which the first has known cameras."""
    upstream = load_upstream(VARIANT, GRAPH, weights)
    reference = run_reference(upstream, case_images(KNOWN), GRAPH, cameras=case_cameras(KNOWN))
    return load_network(VARIANT, GRAPH, weights, precision.FP32), reference


@pytest.mark.parametrize(
    ("change", "breaks"),
    [
        (lambda poses: poses, False),
        (lambda poses: poses * 0, True),  # not given
        (lambda poses: poses.flip(1), True),  # given to other views
        (lambda poses: poses.flip(0), True),  # given to the other scene
    ],
)
def test_known_cameras_are_upstreams_where_they_are_given(known, change, breaks):
    network, reference = known
    conditions = [torch.from_numpy(each) for each in reference.conditions()]
    outputs = run(network, case_images(KNOWN), conditions[0], change(conditions[1]))
    verdicts = [row.ok for row in compare(FP32, KNOWN, outputs, reference)]
    assert all(verdicts) != breaks


def outputs_like(reference, **changes):
    return reference.outputs._replace(**changes)


def test_an_sdt_head_may_err_by_its_sampling_points_and_no_more(reference):
    def verdict(errors):
        right = reference.outputs.depth
        depth = right * (1 + np.asarray(errors, np.float32).reshape(right.shape))
        rows = compare(FP32, CASE, outputs_like(reference, depth=depth), reference, sdt=True)
        return next(row.ok for row in rows if row.output == "depth")

    size = reference.outputs.depth.size
    few, many = np.zeros(size), np.full(size, 1.5e-4)
    few[::2000] = 2.5e-4
    assert verdict(few)
    assert not verdict(many)
    few[0] = 4e-4
    assert not verdict(few)
    plain = outputs_like(reference, depth=reference.outputs.depth * np.float32(1 + 2.5e-4))
    assert not all(row.ok for row in compare(FP32, CASE, plain, reference))


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("name", ["depth", "confidence"])
def test_one_bad_pixel_is_out_of_tolerance(reference, name, value):
    spoiled = getattr(reference.outputs, name).copy()
    spoiled[1, 0, 5, 5] = value
    rows = compare(FP32, CASE, outputs_like(reference, **{name: spoiled}), reference)
    assert [row.output for row in rows if not row.ok] == [name]


def test_relative_errors_by_hand():
    extrinsics = np.tile(np.eye(3, 4), (1, 1, 1, 1))
    extrinsics[0, 0, :, 3] = (3, 0, 4)
    intrinsics = np.array([[[[100, 0, 50], [0, 200, 40], [0, 0, 1]]]], float)
    ones = np.full((1, 1, 2, 2), 2.0)
    want = RawOutputs(ones, ones, None, intrinsics, extrinsics)
    moved, lens = extrinsics.copy(), intrinsics.copy()
    moved[0, 0, 0, 3] += 0.5
    moved[0, 0, 2, 1] += 0.25
    lens[0, 0, 1, 1] = 150
    errors = relative_errors(RawOutputs(ones * 1.5, ones, None, lens, moved), want)
    assert errors["depth"].max() == 0.5
    assert errors["confidence"].max() == 0
    assert errors["intrinsics"].tolist() == [[[0, 0.25, 0, 0]]]
    assert errors["rotation"].max() == 0.25
    assert errors["translation"].tolist() == [[[0.1, 0, 0]]]


def test_fp16_is_measured_with_fp16_rounding_not_flattered_by_the_cpu(tmp_path):
    """A value that FP16 cannot hold must show: 2048 + 1 is 2048 in FP16, and 3 * 30000 overflows."""
    half = TensorProto.FLOAT16
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["x"], to=half),
            helper.make_node("Add", ["x", "one"], ["sum"]),
            helper.make_node("Sub", ["sum", "x"], ["difference"]),
            helper.make_node("Mul", ["x", "x"], ["square"]),
            helper.make_node("Cast", ["difference"], ["depth"], to=TensorProto.FLOAT),
            helper.make_node("Cast", ["square"], ["confidence"], to=TensorProto.FLOAT),
        ],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("depth", "confidence")],
        [numpy_helper.from_array(np.array([1], np.float16), "one")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    honest = ort.InferenceSession(round_like_half(model).SerializeToString(), options)
    difference, square = honest.run(["depth", "confidence"], {"images": np.array([2048], np.float32)})
    assert difference.tolist() == [0]
    assert np.isinf(square).all()


def test_honest_fp16_differs_from_fp32_by_more_than_weight_rounding(engine):
    report = json.loads((engine.folder / "parity.json").read_text())
    first = (*SHAPES[0], BATCHES[0])
    mean = {
        row["arithmetic"]: row["mean"]
        for row in report["rows"]
        if row["output"] == "depth" and (row["height"], row["width"], row["batch"]) == first
    }
    assert mean["fp32"] < mean["fp16 weights"] < mean["fp16"]


def test_sky_errs_relatively_where_it_is_large_and_absolutely_where_it_is_small():
    depth, sky = np.ones((1, 1, 1, 2)), np.array([[[[4.0, 0.5]]]])
    errors = relative_errors(RawOutputs(depth, sky=sky + 0.5), RawOutputs(depth, sky=sky))
    assert errors["sky"].tolist() == [[[[0.125, 0.5]]]]


def test_rays_err_relatively_to_their_length():
    rays = np.array([[[[[3.0, 0, 0, 0, 4, 0]]]]])
    moved = rays + np.array([0.5, 0, 0, 0, 0, 0])
    ones = np.ones((1, 1, 1, 1))
    errors = relative_errors(
        RawOutputs(ones, rays=moved, ray_confidence=ones),
        RawOutputs(ones, rays=rays, ray_confidence=ones),
    )
    assert errors["rays"].max() == 0.1
    assert errors["ray_confidence"].max() == 0


def test_a_camera_that_stood_still_errs_relatively_to_the_scene():
    depth = np.full((1, 1, 2, 2), 10.0)
    still = np.eye(3, 4)[None, None]
    moved = still.copy()
    moved[0, 0, 0, 3] = 0.01
    errors = relative_errors(RawOutputs(depth, extrinsics=moved), RawOutputs(depth, extrinsics=still))
    np.testing.assert_allclose(errors["translation"], [[[0.1, 0, 0]]])


def test_every_case_uses_real_photographs():
    images = case_images(Case(84, 98, 3))
    assert images.shape == (3, 1, 84, 98, 3)
    assert len({images[i].tobytes() for i in range(3)}) == 3
    assert all(images[i].std() > 20 for i in range(3))
