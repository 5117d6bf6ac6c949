"""The SDT head and DySample, against values worked out without them."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import da3_export.parity.measure
from da3_export.build import build
from da3_export.parity.cases import Case, case_images
from da3_export.parity.reference import run_reference
from da3_export.parity.report import Report, compare
from da3_export.parity.subjects import FP16
from da3_export.parity.upstream import load_upstream
from da3_export.random_weights import randomize, write_random_checkpoint, write_random_sdt
from da3_export.request import request_of
from da3_export.settings import BuildSettings
from da3_export.weights import find_weights
from da3_runtime.errors import CheckpointError, SettingError
from da3_runtime.inference.backend_choice import UNTRAINED, UNTRAINED_HEAD, _untrained, load_backend
from da3_runtime.inference.estimator import Estimator, Timings
from da3_runtime.network import precision
from da3_runtime.network.dysample import GROUPS, DySample, initial_positions, sample
from da3_runtime.network.load import build_network, build_sdt, feature_width, load_network, load_sdt
from da3_runtime.network.sdt import SDTHead
from da3_runtime.network.vit import Features
from da3_runtime.network_io import RawOutputs
from da3_runtime.store.checkpoint import find_sdt
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.store.engine_weights import engine_sdt
from da3_runtime.store.manifest import read_manifest
from da3_runtime.store.settings import EngineSettings
from da3_runtime.variants import Head, Series, find_variant
from tests.support.builds import export_by_copying, measure_on
from tests.support.engines import graph_of
from tests.support.paths import NANO, PHOTOS, RANDOM


def offsets(x, y, height, width):
    """Offsets (in input pixels) added to the initial positions, the same for every sub-pixel."""
    extra = torch.cat(
        (torch.full((1, 16, height, width), x), torch.full((1, 16, height, width), y)), dim=1
    )
    return initial_positions() + extra


# One channel group is enough to check by hand; the other three get the same image.
IMAGE = torch.tensor([[1.0, 2.0], [3.0, 5.0]])


def sampled(offset):
    return sample(IMAGE.expand(1, GROUPS, 2, 2), offset)[0]


def test_two_by_two_by_hand():
    """Output pixel (i, j) lies at (i + 0.5) / 2, (j + 0.5) / 2; centers of the input are at 0.5 and 1.5.

    Row 0 and column 0 (0.25) are outside the centers, hence the border's value; 0.75 is a quarter of
    the way from the first to the second.
    """
    top = [1, 1 + 0.25 * 1, 1 + 0.75 * 1, 2]
    bottom = [3, 3 + 0.25 * 2, 3 + 0.75 * 2, 5]
    rows = [np.array(top) + w * (np.array(bottom) - np.array(top)) for w in (0, 0.25, 0.75, 1)]
    got = sampled(initial_positions().expand(1, -1, 2, 2))
    for channel in range(GROUPS):
        np.testing.assert_allclose(got[channel].numpy(), rows, rtol=1e-6)


def test_an_offset_moves_the_point_right_and_down_in_input_pixels():
    right = sampled(offsets(0.25, 0.0, 2, 2))[0]
    # Columns now lie at 0.5, 1.0, 1.5, 2.0: first center, half-way, second center, outside.
    np.testing.assert_allclose(right[0].numpy(), [1, 1.5, 2, 2], rtol=1e-6)
    down = sampled(offsets(0.0, 0.25, 2, 2))[0]
    np.testing.assert_allclose(down[:, 0].numpy(), [1, 2, 3, 3], rtol=1e-6)


@pytest.mark.parametrize(("x", "y", "value"), [(-9, -9, 1), (9, -9, 2), (-9, 9, 3), (9, 9, 5)])
def test_points_outside_the_image_take_the_borders_value(x, y, value):
    assert torch.equal(
        sampled(offsets(float(x), float(y), 2, 2)), torch.full((GROUPS, 4, 4), float(value))
    )


def test_each_group_has_its_own_points():
    offset = initial_positions().repeat(1, 1, 2, 2)
    offset[:, 4:8] += 9  # x of the second group
    got = sampled(offset)
    assert torch.equal(got[0], got[2])
    assert set(got[1].unique().tolist()) <= {2.0, 2.75, 4.25, 5.0}


@pytest.mark.parametrize("size", [(2, 2), (5, 9), (1, 3)])
def test_zero_offsets_are_bilinear_upsampling_by_two(size):
    x = torch.randn(2, 8, *size, generator=torch.Generator().manual_seed(0))
    layer = DySample(8)
    with torch.no_grad():
        layer.offset.weight.zero_()
        got = layer(x)
    expected = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_fresh_layer_starts_with_a_half_open_scope():
    """Scope weights of zero: sigmoid(0) * 0.5 = a quarter of the predicted offset."""
    layer = DySample(4)
    assert torch.count_nonzero(layer.scope.weight) == 0
    assert layer.scope.bias is None
    with torch.no_grad():
        layer.offset.weight.zero_()
        layer.offset.bias.fill_(1.0)  # everything 1 * 0.25 pixels right and down
        got = layer(IMAGE.expand(1, 4, 2, 2))
    np.testing.assert_allclose(
        got[0, 0].detach().numpy(), sampled(offsets(0.25, 0.25, 2, 2))[0].numpy(), rtol=1e-6
    )


def features(channels, grid, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]
    levels = [torch.randn(2, count, channels, generator=generator) for _ in range(4)]
    return Features(levels, [torch.randn(2, channels, generator=generator) for _ in range(4)], grid)


@pytest.fixture
def head():
    built = build_sdt(24, 16)
    randomize(built, torch.Generator().manual_seed(0), gain=2**0.5)
    return built


@pytest.mark.parametrize("grid", [(6, 7), (9, 6)])
def test_output_is_exactly_the_images_size(head, grid):
    assert head(features(24, grid)).shape == (2, 2, 14 * grid[0], 14 * grid[1])


def test_folding_batch_norms_changes_nothing(head):
    x = features(24, (6, 7))
    expected = torch.exp(head(x)[:, 0])
    depth, _ = SDTHead(head, Series.ANYVIEW)(x)
    assert not [m for m in head.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(depth, expected, rtol=1e-4, atol=1e-5)


def test_the_readout_joins_the_token_to_every_patch(head):
    """Splitting the product in two must be the concatenation it stands for."""
    fusion = head.weighted_fusion
    x = features(24, (6, 7))
    shares = torch.softmax(fusion.layer_weights, 0)
    expected = 0
    for i, (patches, token) in enumerate(zip(x.levels, x.tokens, strict=True)):
        joined = torch.cat((patches, token[:, None].expand_as(patches)), dim=-1)
        expected = expected + fusion.projections[i](fusion.readout_projects[i](joined)) * shares[i]
    torch.testing.assert_close(fusion(x.levels, x.tokens), expected, rtol=1e-4, atol=1e-5)


def test_parameter_names_are_those_of_fine_tuned_heads(head):
    names = set(head.state_dict())
    expected = {
        "weighted_fusion.layer_weights",
        "detail_enhancer.dwconv.weight",
        "detail_enhancer.norm.running_var",
    }
    expected |= {f"weighted_fusion.projections.{i}.0.weight" for i in range(4)}
    expected |= {f"weighted_fusion.readout_projects.{i}.0.bias" for i in range(4)}
    for stage in (1, 2):
        for step in (1, 2):
            prefix = f"upsample_{stage}.dysample{step}"
            expected |= {f"{prefix}.0.{name}" for name in ("offset.weight", "scope.weight", "init_pos")}
            expected |= {f"{prefix}.1.weight", f"{prefix}.2.running_mean"}
        expected |= {f"refinement_{stage}.0.weight", f"refinement_{stage}.1.weight"}
    expected |= {f"output_conv.{i}.weight" for i in (0, 2, 4)}
    assert expected <= names
    assert not [
        name for name in names if name.endswith(("projections.0.0.bias", "scope.bias", "dwconv.bias"))
    ]


@pytest.mark.parametrize("model", ["da3-small", "da3metric-large"])
def test_the_head_fits_the_true_feature_width(model):
    """da3-small's levels are 768 wide, twice its embedding: a head of 384 would crash."""
    (graph,) = find_variant(model).graphs
    assert feature_width(graph) == {"da3-small": 768, "da3metric-large": 1024}[model]
    with torch.device("meta"):
        assert build_network(graph).head.projects[0].in_channels == feature_width(graph)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    variant = find_variant("da3-small")
    folder = tmp_path_factory.mktemp("sdt") / "checkpoint"
    checkpoint = write_random_checkpoint(variant, 0, folder)
    write_random_sdt(768, 32, 0, folder / "sdt.safetensors")
    return variant, checkpoint.path, folder / "sdt.safetensors"


@pytest.mark.parametrize("shape", [(2, 1, 84, 98), (1, 3, 126, 84)])
def test_the_network_with_the_head_equals_upstreams_backbone_with_it(small, shape):
    variant, checkpoint, sdt = small
    (graph,) = variant.graphs
    images = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    upstream = load_upstream(variant, graph, checkpoint)
    head = load_sdt(feature_width(graph), sdt)
    reference = run_reference(upstream, images, graph, head).outputs
    network = load_network(variant, graph, checkpoint, precision.FP32, sdt)
    with torch.inference_mode():
        outputs = network(torch.from_numpy(images))
    assert reference.depth.std() / reference.depth.mean() > 0.02
    for name, got in zip(network.output_names, outputs, strict=True):
        np.testing.assert_allclose(got.numpy(), getattr(reference, name), rtol=1e-4, atol=1e-5)


def test_a_head_of_another_width_names_the_tensors(small, tmp_path):
    _, _, sdt = small
    with pytest.raises(CheckpointError, match=r"features of width 384: .*instead of"):
        load_sdt(384, sdt)
    with pytest.raises(CheckpointError, match=r"\[32, 768\] instead of \[64, 768\]"):
        load_sdt(768, sdt, fused=64)
    tensors = load_file(sdt)
    tensors.pop("output_conv.4.weight")
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing \(output_conv\.4\.weight\)"):
        load_sdt(768, tmp_path / "less.safetensors")


def test_sdt_weights_must_be_a_safetensors_file(tmp_path):
    with pytest.raises(SettingError, match="SDT_WEIGHTS"):
        find_sdt(str(tmp_path / "head.pt"))
    with pytest.raises(SettingError, match="SDT_WEIGHTS 'random:x': SEED"):
        request_of(BuildSettings(head="sdt", sdt_weights="random:x"), None)
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="not a whole safetensors"):
        find_sdt(str(tmp_path / "cut.safetensors"))


def test_a_random_head_is_untrained_and_a_given_one_is_not(small, tmp_path):
    _, _, sdt = small
    assert not find_sdt(str(sdt)).trained
    save_file(load_file(sdt), tmp_path / "tuned.safetensors")
    assert find_sdt(str(tmp_path / "tuned.safetensors")).trained


def test_eager_without_a_head_says_what_to_do(tmp_path):
    folder = EngineFolder(find_variant("da3-small"), Head.SDT, tmp_path, None)
    with pytest.raises(CheckpointError, match="set SDT_WEIGHTS"):
        engine_sdt(folder, EngineSettings())


@pytest.fixture(scope="module")
def built(sdt_engine, tmp_path_factory):
    """The engine of da3-nano and a head of another width, both with random weights.

    Its ONNX is that of the trained weights, so its parity is not measured.
    """
    root = tmp_path_factory.mktemp("engines")
    settings = BuildSettings(
        engine_dir=root,
        model_id=NANO,
        head="SDT",
        sdt_fusion_channels=24,
        processing_res=140,
        weights=RANDOM,
    )
    with pytest.MonkeyPatch.context() as patch:
        export_by_copying(patch, sdt_engine.folder / "model.fp32.onnx")
        measure_on(patch, [])
        patch.setattr(Report, "ok", True)
        build(request_of(settings, "onnx-fp32"))
    return settings, root / NANO / "sdt"


def test_dysample_is_grid_sample_and_batch_norms_are_folded(sdt_engine):
    nodes = graph_of(sdt_engine.folder / "model.fp32.onnx").graph.node
    assert sum(node.op_type == "GridSample" for node in nodes) == 4
    assert not [node for node in nodes if node.op_type == "BatchNormalization"]


def test_the_manifest_and_every_answer_say_that_the_head_is_untrained(built):
    settings, folder = built
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.head_source is not None
    assert (manifest.source.trained, manifest.head_source.trained) == (False, False)
    assert (manifest.source.weights, manifest.head_source.weights) == ("random:0", "random:0")
    photo = (PHOTOS / "cat.jpg").read_bytes()
    for backend in ("onnxruntime-cpu", "eager"):
        estimator = Estimator.load(replace(settings, backend=backend), settings=settings)
        estimate = estimator.estimate(photo, Timings())
        assert (estimator.loaded.backend.name, estimate.warnings) == (backend, [UNTRAINED])


@pytest.mark.parametrize("weights", [None, "random:0"])
def test_every_head_on_the_trained_backbone_is_within_tolerance_in_fp16(weights, tmp_path):
    """In eager FP16, whose policy the FP16 ONNX carries; test_torch_to_onnx looks at that."""
    nano = find_variant(NANO)
    (graph,) = nano.graphs
    settings = BuildSettings(engine_dir=tmp_path, model_id=NANO, head="sdt", sdt_weights=weights)
    found = find_weights(request_of(settings, None), None, tmp_path)
    checkpoint, sdt = found.checkpoint.path, found.sdt.path
    assert (found.sdt.weights, found.sdt.trained) == (weights or "bundled", weights is None)
    case = Case(84, 98, 2)
    images = case_images(case)
    upstream = load_upstream(nano, graph, checkpoint)
    reference = run_reference(upstream, images, graph, load_sdt(feature_width(graph), sdt))
    network = load_network(nano, graph, checkpoint, precision.FP16, sdt)
    with torch.inference_mode():
        outputs = [value.numpy() for value in network(torch.from_numpy(images))]
    rows = compare(FP16, case, RawOutputs.of(network.output_names, outputs), reference, sdt=True)
    assert all(row.ok for row in rows), rows
    assert next(row.mean for row in rows if row.output == "depth") > 1e-6
    # A depth that is the same everywhere would pass whatever the head did.
    assert reference.outputs.depth.std() > 0.02 * reference.outputs.depth.mean()


def test_a_random_head_is_the_same_again_and_scaled_for_a_trained_backbone_only(small, tmp_path):
    _, _, sdt = small
    write_random_sdt(768, 32, 0, tmp_path / "again.safetensors")
    plain = load_file(sdt)
    levels = [torch.full((2, 5, 768), 12.0 * 4**i) for i in range(4)]
    large = Features(levels, [torch.full((2, 768), 0.9)] * 4, (1, 5))
    write_random_sdt(768, 32, 0, tmp_path / "scaled.safetensors", large)
    scaled = load_file(tmp_path / "scaled.safetensors")
    for name, tensor in plain.items():
        assert torch.equal(load_file(tmp_path / "again.safetensors")[name], tensor)
        level = re.fullmatch(r"weighted_fusion\.readout_projects\.(\d)\.0\.weight", name)
        if level:
            tensor[:, :768] /= 16 * 4 ** int(level[1])  # the power of two that is nearest to the level's
        assert torch.equal(scaled[name], tensor), name


def test_warns_of_a_random_head_on_a_trained_network(sdt_engine):
    manifest = read_manifest(sdt_engine.folder)
    assert manifest is not None
    assert manifest.head_source is not None
    untrained = replace(manifest, head_source=replace(manifest.head_source, trained=False))
    assert not untrained.trained
    folder = EngineFolder(find_variant(NANO), Head.SDT, sdt_engine.folder, untrained)
    assert _untrained(folder, {"model": SimpleNamespace(trained=untrained.trained)}) == [UNTRAINED_HEAD]


def test_the_trained_head_answers_alike_everywhere_and_without_a_warning(sdt_engine):
    manifest = read_manifest(sdt_engine.folder)
    assert manifest is not None
    assert manifest.head_source is not None
    assert (manifest.head_source.weights, manifest.head_source.trained) == ("bundled", True)
    settings = BuildSettings(
        engine_dir=sdt_engine.engine_dir, model_id=NANO, head="sdt", processing_res=140
    )
    photo = (PHOTOS / "temple.jpg").read_bytes()
    answers = []
    for backend in ("onnxruntime-cpu", "eager"):
        estimator = Estimator.load(replace(settings, backend=backend), settings=settings)
        estimate = estimator.estimate(photo, Timings())
        assert estimate.warnings == []
        answers.append(estimate.depth.values)
    np.testing.assert_allclose(*answers, rtol=1e-4)


def test_nothing_is_done_when_nothing_changed_and_another_width_is_another_engine(
    built, capsys, monkeypatch
):
    settings, _ = built
    build(request_of(settings, "onnx-fp32"))
    assert "up to date" in capsys.readouterr().err
    monkeypatch.setattr(da3_export.parity.measure, "load_upstream", lambda *_: pytest.exit("building"))
    with pytest.raises(pytest.exit.Exception, match="building"):
        build(request_of(replace(settings, sdt_fusion_channels=40), "onnx-fp32"))


def test_rays_with_this_head_are_refused(built):
    settings, _ = built
    with pytest.raises(SettingError, match="the SDT head has no rays"):
        load_backend(replace(settings, ray_pose=True))
    with pytest.raises(SettingError, match="the SDT head has no rays"):
        request_of(replace(settings, ray_pose=True), None)
