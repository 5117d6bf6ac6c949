"""Sky and nested composition, against upstream's own steps on the same maps."""

import numpy as np
import pytest
import torch
from addict import Dict

from da3_export.parity.cases import Case, case_images
from da3_export.parity.upstream import load_upstream
from da3_export.random_weights import write_random_checkpoint
from da3_runtime.network import precision
from da3_runtime.network.sizes import SIZES
from da3_runtime.network.vit import normalize
from da3_runtime.network_io import RawOutputs
from da3_runtime.postprocess.camera import Lens
from da3_runtime.postprocess.depth import prediction_of, predictions_of
from da3_runtime.postprocess.nested import align
from da3_runtime.postprocess.sky import fill_sky
from da3_runtime.variants import METRIC_FOCAL, Unit, find_variant
from tests.support.networks import SMALL_MONOCULAR, network_of

NESTED = find_variant("da3nested-giant-large")
HEIGHT, WIDTH = 84, 112  # below upstream's 100 000 samples, so that its quantiles are exact too


def maps(seed, sky_share=0.3):
    """Plausible outputs of the two networks for one image."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0.5, 4, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    depth = ramp * rng.uniform(0.9, 1.1, ramp.shape).astype(np.float32)
    confidence = 1 + rng.exponential(1, ramp.shape).astype(np.float32)
    metric = (depth * 3.7 * rng.uniform(0.8, 1.2, ramp.shape)).astype(np.float32)
    sky = np.zeros_like(depth)
    sky[: int(HEIGHT * sky_share)] = 0.9
    sky += rng.uniform(0, 0.2, ramp.shape).astype(np.float32)
    intrinsics = np.array([[420, 0, 56], [0, 460, 42], [0, 0, 1]], np.float32)
    extrinsics = np.hstack([np.eye(3), [[0.3], [-0.2], [1.5]]]).astype(np.float32)
    return depth, confidence, intrinsics, extrinsics, metric, sky


def upstream_nested(depth, confidence, intrinsics, extrinsics, metric, sky):
    from depth_anything_3.model.da3 import NestedDepthAnything3Net as Nested

    def view(x):
        return torch.from_numpy(x.copy())[None, None]

    output = Dict(
        depth=view(depth),
        depth_conf=view(confidence),
        intrinsics=view(intrinsics),
        extrinsics=view(extrinsics),
    )
    metric_output = Dict(depth=view(metric), sky=view(sky))
    output = Nested._apply_metric_scaling(None, output, metric_output)
    output = Nested._apply_depth_alignment(None, output, metric_output)
    return Nested._handle_sky_regions(None, output, metric_output)


def ours(depth, confidence, intrinsics, extrinsics, metric, sky):
    """A scene of one view."""
    focal = [float(intrinsics[0, 0] + intrinsics[1, 1]) / 2]
    given = (each[None] for each in (depth, confidence, extrinsics, metric, sky))
    got = align(*given, focal, METRIC_FOCAL)
    maps = {name: getattr(got, name)[0] for name in ("depth", "confidence", "extrinsics")}
    return got._replace(**maps)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sky_share", [0.0, 0.3, 0.95])
def test_align_equals_upstream(seed, sky_share):
    given = maps(seed, sky_share)
    expected = upstream_nested(*given)
    got = ours(*given)
    np.testing.assert_allclose(got.depth, expected.depth[0, 0].numpy(), rtol=1e-5)
    np.testing.assert_allclose(got.confidence, expected.depth_conf[0, 0].numpy())
    np.testing.assert_allclose(got.extrinsics, expected.extrinsics[0, 0].numpy(), rtol=1e-5)
    assert got.scale == pytest.approx(expected.scale_factor, rel=1e-5)
    assert got.metric
    assert not got.warnings


def test_sky_is_at_most_two_hundred_meters_away():
    depth, confidence, intrinsics, extrinsics, metric, sky = maps(0)
    got = ours(depth, confidence, intrinsics, extrinsics, metric * 1000, sky)
    assert set(np.unique(got.depth[sky >= 0.3])) == {np.float32(200)}


@pytest.mark.parametrize("ground", [0, 1, 10])
def test_an_image_of_almost_only_sky_gets_a_depth_and_a_warning(ground):
    depth, confidence, intrinsics, extrinsics, metric, sky = maps(0)
    sky[:] = 1
    sky.ravel()[:ground] = 0
    got = ours(depth, confidence, intrinsics, extrinsics, metric, sky)
    assert np.isfinite(got.depth).all()
    assert got.depth.min() > 0
    assert "sky" in got.warnings[0]
    with pytest.raises(AssertionError):
        upstream_nested(depth, confidence, intrinsics, extrinsics, metric, sky)


def test_eleven_pixels_of_ground_are_enough_for_a_scale():
    depth, confidence, intrinsics, extrinsics, metric, sky = maps(0)
    sky[:] = 1
    sky[40, 30:41] = 0
    given = depth, confidence, intrinsics, extrinsics, metric, sky
    got = ours(*given)
    assert got.warnings == []
    assert got.scale == pytest.approx(upstream_nested(*given).scale_factor, rel=1e-5)


@pytest.mark.parametrize(("meters", "counts"), [(0.005, False), (0.0099, False), (0.0101, True)])
def test_pixels_below_a_centimeter_do_not_count_for_the_scale(meters, counts):
    depth, _, _, extrinsics, _, _ = maps(0)
    depth = np.ones_like(depth)
    metric = np.full_like(depth, 3)
    metric[:20] = meters
    confidence, sky = np.ones_like(depth), np.zeros_like(depth)
    given = (each[None] for each in (depth, confidence, extrinsics, metric, sky))
    got = align(*given, [300], 300)
    expected = np.average([meters, 3], weights=[20, HEIGHT - 20]) if counts else 3
    assert got.scale == pytest.approx(expected, rel=1e-5)


def test_depth_is_relative_with_a_warning_if_no_pixel_determines_the_scale():
    depth, confidence, intrinsics, extrinsics, metric, sky = maps(0)
    got = ours(depth, confidence, intrinsics, extrinsics, metric * 0, sky)
    assert not got.metric
    assert got.scale == 1
    assert "relative" in got.warnings[0]
    assert np.array_equal(got.depth[sky < 0.3], depth[sky < 0.3])


def test_constant_depth_is_scaled_too():
    depth, confidence, intrinsics, extrinsics, metric, sky = maps(0)
    got = ours(
        np.full_like(depth, 2),
        np.full_like(confidence, 1),
        intrinsics,
        extrinsics,
        np.full_like(metric, 3),
        sky,
    )
    np.testing.assert_allclose(got.depth, 3 * 440 / 300, rtol=1e-6)
    assert got.metric


def raw(given, batch=1):
    depth, confidence, intrinsics, extrinsics, metric, sky = (
        np.stack([x] * batch)[:, None] for x in given
    )
    return {
        "anyview": RawOutputs(depth, confidence, None, intrinsics, extrinsics),
        "metric": RawOutputs(metric, sky=sky),
    }


def test_a_known_lens_replaces_the_predicted_one_in_the_scale():
    given = maps(4)
    own = prediction_of(raw(given), 0, NESTED)
    lens = Lens(given[2] * np.array([[2], [2], [1]], np.float32), "intrinsics")
    known = prediction_of(raw(given), 0, NESTED, lens)
    not_sky = ~known.maps["sky"]
    # Twice the focal length gives twice the meters.
    np.testing.assert_allclose(known.depth.values[not_sky], 2 * own.depth.values[not_sky], rtol=1e-5)
    assert np.array_equal(known.camera.intrinsics, lens.intrinsics)
    assert (own.focal_source, known.focal_source) == ("predicted", "intrinsics")


def test_the_nested_model_returns_meters_unless_no_scale_was_found():
    given = maps(1)
    got = prediction_of(raw(given), 0, NESTED)
    assert (got.depth.unit, got.warnings) == (Unit.METERS, [])
    assert np.array_equal(got.depth.values, ours(*given).depth)
    assert got.camera is not None
    assert np.array_equal(got.camera.extrinsics, ours(*given).extrinsics)
    got = prediction_of(raw((*given[:4], given[4] * 0, given[5])), 0, NESTED)
    assert got.depth.unit is Unit.RELATIVE
    assert got.warnings


@pytest.fixture(scope="module")
def networks(small_monocular, tmp_path_factory):
    """A nested network of small parts: da3-small and the monocular network at its width."""
    from depth_anything_3.model.da3 import NestedDepthAnything3Net

    small = find_variant("da3-small")
    folder = tmp_path_factory.mktemp("nested") / "checkpoint"
    checkpoint = write_random_checkpoint(small, 4, folder)
    nested = NestedDepthAnything3Net.__new__(NestedDepthAnything3Net)
    torch.nn.Module.__init__(nested)
    nested.da3 = load_upstream(small, small.graphs[0], checkpoint.path)
    nested.da3_metric = small_monocular
    return nested.eval()


@pytest.mark.parametrize("case", [Case(HEIGHT * 2, WIDTH * 2, 3), Case(HEIGHT, WIDTH, 2, 3)], ids=str)
def test_the_nested_model_equals_upstreams_forward(networks, case):
    """The views of a scene have one scale and one depth of the sky."""
    images = case_images(case)
    parts = ((networks.da3, SIZES["da3-small"]), (networks.da3_metric, SMALL_MONOCULAR))
    raw = {}
    for (part, sizes), graph in zip(parts, NESTED.graphs, strict=True):
        network = network_of(part, sizes, graph, precision.FP32)
        with torch.inference_mode():
            values = [value.numpy() for value in network(torch.from_numpy(images))]
        raw[graph.name] = RawOutputs(**dict(zip(network.output_names, values, strict=True)))
    assert 0.05 < (raw["metric"].sky >= 0.3).mean() < 0.95
    for index in range(len(images)):
        view = normalize(torch.from_numpy(images[index]))[None]
        with torch.inference_mode():
            expected = networks(view)
        views = predictions_of(raw, index, NESTED, [None] * case.views)
        for number, got in enumerate(views):
            assert got.depth.unit is Unit.METERS
            assert got.warnings == []
            assert got.camera is not None
            np.testing.assert_allclose(got.depth.values, expected.depth[0, number].numpy(), rtol=1e-4)
            camera = expected.intrinsics[0, number].numpy(), expected.extrinsics[0, number].numpy()
            np.testing.assert_allclose(got.camera.intrinsics, camera[0], rtol=1e-4)
            np.testing.assert_allclose(got.camera.extrinsics, camera[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.4, 1.0])
def test_fill_sky_equals_upstream(share, views):
    from depth_anything_3.model.da3 import DepthAnything3Net

    depth, sky = (np.stack([maps(seed, 0)[i] for seed in range(views)]) for i in (0, 5))
    sky.ravel()[: int(sky.size * share)] = 1
    output = Dict(depth=torch.from_numpy(depth.copy())[None], sky=torch.from_numpy(sky)[None])
    expected = DepthAnything3Net._process_mono_sky_estimation(None, output).depth[0].numpy()
    np.testing.assert_allclose(fill_sky(depth, sky), expected, rtol=1e-6)


@pytest.mark.parametrize("count", [10, 11, 50])
@pytest.mark.parametrize("kind", ["sky", "ground"])
def test_fill_sky_needs_more_than_ten_pixels_of_sky_and_of_ground(kind, count):
    from depth_anything_3.model.da3 import DepthAnything3Net

    depth, *_ = maps(2, 0)
    sky = np.full_like(depth, kind == "ground")
    sky.ravel()[:count] = kind == "sky"
    filled = fill_sky(depth, sky)
    assert np.array_equal(filled, depth) == (count == 10)
    output = Dict(depth=torch.from_numpy(depth.copy())[None], sky=torch.from_numpy(sky)[None])
    expected = DepthAnything3Net._process_mono_sky_estimation(None, output).depth[0].numpy()
    np.testing.assert_allclose(filled, expected, rtol=1e-6)


def test_fill_sky_uses_the_exact_percentile_of_a_large_map():
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 9, (400, 400)).astype(np.float32)
    sky = (rng.uniform(0, 1, depth.shape) > 0.7).astype(np.float32)
    assert np.array_equal(fill_sky(depth, sky), fill_sky(depth, sky))
    assert fill_sky(depth, sky)[sky == 1].max() == np.float32(np.quantile(depth[sky == 0], 0.99))


@pytest.mark.parametrize("model", ["da3metric-large", "da3mono-large"])
def test_monocular_depth_is_relative_until_the_focal_length_is_known(model):
    depth, *_, sky = maps(3)
    got = prediction_of(
        {"model": RawOutputs(depth[None, None], sky=sky[None, None])}, 0, find_variant(model)
    )
    assert got.depth.unit is Unit.RELATIVE
    assert got.camera is None
    assert np.array_equal(got.depth.values, fill_sky(depth, sky))
