"""The ray branch, the camera from its rays, and the engine that has both."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from addict import Dict

import da3_runtime.inference.backend_choice
from da3_export.build import build
from da3_export.parity.cases import Case, case_images
from da3_export.parity.reference import Reference, run_reference
from da3_export.parity.report import compare
from da3_export.parity.subjects import FP16
from da3_export.parity.upstream import load_upstream
from da3_export.random_weights import write_random_checkpoint
from da3_export.request import request_of
from da3_export.settings import BuildSettings
from da3_runtime.errors import BackendUnavailableError, CheckpointError, SettingError
from da3_runtime.inference.backend_choice import load_backend
from da3_runtime.inference.estimator import Estimator, Timings
from da3_runtime.network import precision
from da3_runtime.network.load import load_network
from da3_runtime.network_io import RawOutputs
from da3_runtime.postprocess.camera import Camera, resize_camera
from da3_runtime.postprocess.depth import prediction_of
from da3_runtime.postprocess.rays import (
    SAMPLE,
    cameras_from_rays,
    candidate_count,
    image_plane,
    seeded_samples,
)
from da3_runtime.store.checkpoint import HUB, find_checkpoint
from da3_runtime.store.manifest import Kind, read_manifest
from da3_runtime.variants import find_variant
from tests.support.builds import copy_with, measure_on
from tests.support.paths import NANO, PHOTOS

SMALL = find_variant("da3-small")
NESTED = find_variant("da3nested-giant-large")
NANO_VARIANT = find_variant(NANO)
ROWS, COLUMNS = 56, 72
WIDTH, HEIGHT = 252, 196


def rotation(seed):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q *= np.sign(np.linalg.det(q))
    turn = np.array([[0.9, -0.1, 0.2], [0.15, 0.95, -0.1], [-0.2, 0.1, 0.97]])
    u, _, vt = np.linalg.svd(turn + 0.1 * q)
    return u @ vt


def ray_map(seed, focal=(1.1, 1.3), origin=(0.3, -0.2, 0.5)):
    """Rays of a known camera: focal lengths given on a plane two units wide and high."""
    plane = image_plane(ROWS, COLUMNS).astype(np.float64)
    camera = np.column_stack((plane / focal, np.ones(len(plane))))
    directions = camera @ rotation(seed).T
    rays = np.column_stack((directions, np.broadcast_to(origin, directions.shape)))
    return rays.reshape(ROWS, COLUMNS, 6).astype(np.float32)


def noisy(seed):
    rng = np.random.default_rng(seed)
    rays = ray_map(seed)
    rays += rng.normal(0, 0.02, rays.shape).astype(np.float32)
    wrong = rng.uniform(size=(ROWS, COLUMNS)) < 0.2
    rays[wrong, :3] = rng.normal(0, 1, (int(wrong.sum()), 3))
    rays[rng.uniform(size=wrong.shape) < 0.01, 2] = 5e-5
    confidence = 1 + rng.exponential(1, wrong.shape) * np.where(wrong, 0.3, 1)
    return rays, confidence.astype(np.float32)


def upstreams_camera(rays, confidence, samples, monkeypatch):
    """Upstream's own estimate for a photo, drawing ``samples`` where it draws at random."""
    from depth_anything_3.model.da3 import DepthAnything3Net

    candidates = candidate_count(ROWS * COLUMNS)
    # Upstream has the candidates in the order of their confidence.
    order = np.argsort(-confidence.reshape(-1), kind="stable")[:candidates]
    hypotheses = iter(torch.from_numpy(np.argsort(order)[samples.hypotheses]))

    def randperm(n, device=None):
        if n == candidates:
            return next(hypotheses)
        return torch.from_numpy(samples.refit[samples.refit < n])

    monkeypatch.setattr(torch, "randperm", randperm)
    rays, confidence = (torch.from_numpy(each.copy())[None, None] for each in (rays, confidence))
    output = Dict(ray=rays, ray_conf=confidence[..., None])
    output = DepthAnything3Net._process_ray_pose_estimation(None, output, HEIGHT, WIDTH)
    return output.extrinsics[0, 0].numpy(), output.intrinsics[0, 0].numpy()


def test_the_camera_is_upstreams_on_the_same_samples(monkeypatch):
    photos = [noisy(seed) for seed in range(2)]
    rays, confidence = (np.stack(values) for values in zip(*photos, strict=True))
    samples = seeded_samples(ROWS * COLUMNS)
    for photo, camera in zip(photos, cameras_from_rays(rays, confidence, WIDTH, HEIGHT), strict=True):
        assert camera is not None
        extrinsics, intrinsics = upstreams_camera(*photo, samples, monkeypatch)
        np.testing.assert_allclose(camera.extrinsics, extrinsics, atol=2e-4)
        np.testing.assert_allclose(camera.intrinsics, intrinsics, rtol=1e-3)


def test_rounding_of_the_confidence_changes_no_camera():
    rng = np.random.default_rng(4)
    rays, _ = noisy(4)
    rays += rng.normal(0, 0.2, rays.shape).astype(np.float32)
    # The candidates have one confidence, so that rounding decides their order.
    count = ROWS * COLUMNS
    levels = 1.0 + (rng.permutation(count) < candidate_count(count)).reshape(ROWS, COLUMNS)
    cameras = [
        cameras_from_rays(rays[None], confidence[None].astype(np.float32), WIDTH, HEIGHT)[0]
        for confidence in (levels, levels + rng.normal(0, 1e-6, levels.shape))
    ]
    for one, other in zip(*cameras, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("outliers", [False, True])
def test_a_known_camera_is_found(outliers):
    rays, confidence = ray_map(5), np.ones((ROWS, COLUMNS), np.float32)
    if outliers:
        rays[::3, ::2, :3] = np.random.default_rng(0).normal(0, 1, rays[::3, ::2, :3].shape)
    (camera,) = cameras_from_rays(rays[None], confidence[None], WIDTH, HEIGHT)
    assert camera is not None
    world = -camera.extrinsics[:, :3].T @ camera.extrinsics[:, 3]
    tolerance = 5e-3 if outliers else 1e-5  # a random ray may fall among the inliers
    np.testing.assert_allclose(camera.extrinsics[:, :3], rotation(5).T, atol=tolerance)
    np.testing.assert_allclose(world, [0.3, -0.2, 0.5], atol=1e-5)
    want = [1.1 * WIDTH / 2, 1.3 * HEIGHT / 2, WIDTH / 2, HEIGHT / 2]
    got = camera.intrinsics[(0, 1, 0, 1), (0, 1, 2, 2)]
    np.testing.assert_allclose(got, want, rtol=10 * tolerance)


def test_the_same_photo_gives_the_same_camera_in_any_batch():
    photos = [noisy(seed) for seed in range(3)]
    rays, confidence = (np.stack(values) for values in zip(*photos, strict=True))
    together = cameras_from_rays(rays, confidence, WIDTH, HEIGHT)
    for (one, weight), camera in zip(photos, together, strict=True):
        (alone,) = cameras_from_rays(one[None], weight[None], WIDTH, HEIGHT)
        assert alone is not None
        assert camera is not None
        assert np.array_equal(alone.extrinsics, camera.extrinsics)
        assert np.array_equal(alone.intrinsics, camera.intrinsics)


def test_samples_are_distinct_points_and_always_the_same():
    samples, again = seeded_samples.__wrapped__(400), seeded_samples.__wrapped__(400)
    assert np.array_equal(samples.hypotheses, again.hypotheses)
    assert np.array_equal(samples.refit, again.refit)
    assert samples.hypotheses.shape == (100, SAMPLE)
    assert samples.hypotheses.max() < 120
    assert all(len(set(row)) == SAMPLE for row in samples.hypotheses)
    assert np.array_equal(np.sort(samples.refit), np.arange(400))


@pytest.mark.parametrize("fault", ["confidence", "flat", "constant", "zero"])
def test_rays_that_determine_no_camera_leave_the_decoders(fault):
    rays, confidence = ray_map(0), np.ones((ROWS, COLUMNS), np.float32)
    if fault == "confidence":
        confidence[:] = 0
    elif fault == "flat":
        rays[..., 2] = 0
    elif fault == "constant":
        rays[:] = rays[0, 0]
    else:
        rays[:] = 0
    assert cameras_from_rays(rays[None], confidence[None], WIDTH, HEIGHT) == [None]
    got = prediction_of({"model": raw(rays, confidence)}, 0, SMALL)
    assert got.camera is not None
    assert np.array_equal(got.camera.intrinsics, np.diag([300, 300, 1]))
    assert got.warnings == ["The rays determine no camera; the camera decoder's is returned."]


def raw(rays, confidence):
    depth = np.random.default_rng(1).uniform(1, 2, (1, 1, HEIGHT, WIDTH)).astype(np.float32)
    pose = np.eye(3, 4, dtype=np.float32)[None, None]
    lens = np.diag([300, 300, 1]).astype(np.float32)[None, None]
    rays, confidence = np.asarray(rays)[None, None], np.asarray(confidence)[None, None]
    return RawOutputs(depth, depth, None, lens, pose, rays, confidence)


def test_the_rays_camera_takes_the_decoders_place_in_the_answer_and_in_the_nested_scale():
    rays, confidence = ray_map(2), np.ones((ROWS, COLUMNS), np.float32)
    (camera,) = cameras_from_rays(rays[None], confidence[None], WIDTH, HEIGHT)
    assert camera is not None
    outputs = raw(rays, confidence)
    got = prediction_of({"model": outputs}, 0, SMALL)
    assert got.camera is not None
    assert np.array_equal(got.camera.extrinsics, camera.extrinsics)
    metric = RawOutputs(outputs.depth * 2, sky=outputs.depth * 0)
    nested = prediction_of({"anyview": outputs, "metric": metric}, 0, NESTED)
    scale = 2 * camera.focal / 300
    np.testing.assert_allclose(nested.depth.values, outputs.depth[0, 0] * scale, rtol=1e-5)
    assert nested.camera is not None
    moved = camera.extrinsics[:, 3] * scale
    np.testing.assert_allclose(nested.camera.extrinsics[:, 3], moved, rtol=1e-5)


def test_intrinsics_follow_the_images_size():
    lens = np.array([[300, 0, 126], [0, 310, 98], [0, 0, 1]], np.float32)
    resized = resize_camera(Camera(lens, np.eye(3, 4, dtype=np.float32)), 4, 5)
    assert resized.intrinsics.tolist() == [[1200, 0, 504], [0, 1550, 490], [0, 0, 1]]


@pytest.mark.parametrize("shape", [(2, 1, 98, 140), (1, 3, 182, 84)])
def test_the_ray_branch_is_upstreams(tmp_path, shape):
    checkpoint = write_random_checkpoint(SMALL, 3, tmp_path / "checkpoint")
    (graph,) = SMALL.ray_graphs
    images = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    reference = run_reference(load_upstream(SMALL, graph, checkpoint.path), images, graph).outputs
    network = load_network(SMALL, graph, checkpoint.path, precision.FP32)
    with torch.inference_mode():
        outputs = network(torch.from_numpy(images))
    assert network.output_names[-2:] == ("rays", "ray_confidence")
    for name, got in zip(network.output_names, outputs, strict=True):
        np.testing.assert_allclose(got.numpy(), getattr(reference, name), rtol=1e-4, atol=1e-5)
    *batch, height, width = shape
    assert reference.rays is not None
    assert reference.rays.shape == (*batch, height // 14 * 8, width // 14 * 8, 6)


# Of the photos at this size the one whose camera hangs least on the order of nearly equal confidences.
PHOTO, LONGEST = (PHOTOS / "coffee.jpg").read_bytes(), 252
CASES = [Case(84, 112, 2), Case(154, 98, 1)]


@pytest.fixture(scope="module")
def built(engine, tmp_path_factory):
    """A copy of the engine's FP32 ONNX, with the ray graph's beside it."""
    copy = copy_with(engine, tmp_path_factory.mktemp("rays"), Kind.ONNX_FP32)
    settings = BuildSettings(
        engine_dir=copy.engine_dir, model_id=NANO, ray_pose=True, processing_res=LONGEST
    )
    with pytest.MonkeyPatch.context() as patch:
        measure_on(patch, CASES)
        build(request_of(settings, "onnx-fp32"))
    return settings, copy.folder


def test_the_ray_graph_is_built_beside_the_other_and_in_parity(engine, built):
    _, folder = built
    names = {path.name for path in folder.iterdir() if path.is_file()}
    graphs = {"model.fp32.onnx", "model-rays.fp32.onnx"}
    assert names == {"manifest.json", "parity.json", *graphs, *(f"{name}.data" for name in graphs)}
    kept = "model.fp32.onnx"
    assert (folder / kept).stat().st_ino == (engine.folder / kept).stat().st_ino
    report = json.loads((folder / "parity.json").read_text())
    assert report["ok"]
    for graph, extra in (("model", set()), ("model-rays", {"rays", "ray_confidence"})):
        rows = [row for row in report["rows"] if row["graph"] == graph]
        outputs = {"depth", "confidence", "intrinsics", "rotation", "translation", "reference"} | extra
        assert {row["output"] for row in rows} == outputs
        assert {row["arithmetic"] for row in rows} == {"fp32"}


def test_the_ray_branch_is_within_tolerance_in_fp16():
    """In eager FP16, whose policy the FP16 ONNX carries; test_torch_to_onnx looks at that."""
    (graph,) = NANO_VARIANT.ray_graphs
    checkpoint = find_checkpoint(NANO_VARIANT, HUB).path
    images = case_images(CASES[0])
    reference = run_reference(load_upstream(NANO_VARIANT, graph, checkpoint), images, graph).outputs
    network = load_network(NANO_VARIANT, graph, checkpoint, precision.FP16)
    with torch.inference_mode():
        outputs = [value.numpy() for value in network(torch.from_numpy(images))]
    rows = compare(FP16, CASES[0], RawOutputs.of(network.output_names, outputs), Reference(reference))
    assert {row.output for row in rows} >= {"rays", "ray_confidence"}
    assert all(row.ok for row in rows), rows
    assert next(row.mean for row in rows if row.output == "rays") > 1e-6


def estimate(settings):
    estimator = Estimator.load(settings, settings=settings)
    return estimator.estimate(PHOTO, Timings()), estimator.loaded


def test_engine_and_eager_find_the_same_camera_from_rays(built):
    settings, _ = built
    engine, loaded = estimate(settings)
    assert loaded.backend.name == "onnxruntime-cpu"
    assert engine.warnings == []
    eager, _ = estimate(replace(settings, backend="eager"))
    decoder, _ = estimate(replace(settings, ray_pose=False))
    for one, other in zip(engine.camera, eager.camera, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-3)
    assert not np.allclose(engine.camera.intrinsics, decoder.camera.intrinsics, rtol=1e-3)
    np.testing.assert_allclose(engine.depth.values, decoder.depth.values, rtol=1e-4)


def test_an_engine_without_rays_falls_to_eager_and_says_so(engine, built):
    settings, _ = built
    plain = replace(settings, engine_dir=engine.engine_dir)
    answer, loaded = estimate(plain)
    assert loaded.backend.name == "eager"
    assert any("built without rays" in warning for warning in answer.warnings)
    for one, other in zip(answer.camera, estimate(settings)[0].camera, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-3)


def test_without_eager_an_engine_without_rays_is_a_clear_error(engine, built, monkeypatch):
    settings, _ = built
    reason = classmethod(lambda cls: "torch not installed")
    monkeypatch.setattr(da3_runtime.inference.backend_choice.Eager, "unavailable", reason)
    with pytest.raises(BackendUnavailableError, match=r"built without rays .*torch not installed"):
        load_backend(replace(settings, engine_dir=engine.engine_dir))


def test_without_eagers_weights_the_error_says_that_rays_are_missing(small_copy):
    settings = BuildSettings(engine_dir=small_copy.engine_dir, model_id="da3-small", ray_pose=True)
    shutil.rmtree(small_copy.folder / "checkpoint")
    with pytest.raises(CheckpointError, match=r"built without rays .*weights of da3-small are missing"):
        load_backend(settings)


def test_a_rebuild_that_asks_for_no_rays_keeps_them_while_they_are_whole(built, capsys, monkeypatch):
    settings, folder = built
    measure_on(monkeypatch, CASES[1:])
    plain = request_of(replace(settings, ray_pose=False), "onnx-fp32")
    rays = folder / "model-rays.fp32.onnx"
    number = rays.stat().st_ino
    build(plain)
    assert "up to date" in capsys.readouterr().err
    (folder / "parity.json").unlink()
    build(plain)
    assert rays.stat().st_ino == number
    assert "model-rays" in {
        row["graph"] for row in json.loads((folder / "parity.json").read_text())["rows"]
    }
    rays.write_bytes(b"damaged")
    build(plain)
    assert "model-rays onnx-fp32 is damaged" in capsys.readouterr().err
    assert not rays.exists()
    manifest = read_manifest(folder)
    assert manifest is not None
    assert list(manifest.graphs) == ["model"]


@pytest.mark.parametrize("model", ["da3metric-large", "da3mono-large"])
def test_models_without_a_camera_have_no_rays(model, tmp_path):
    settings = BuildSettings(engine_dir=tmp_path, model_id=model, ray_pose=True)
    for refused in (load_backend, lambda settings: request_of(settings, None)):
        with pytest.raises(SettingError, match=f"{model} has no rays"):
            refused(settings)


def test_the_nested_model_has_rays_in_its_any_view_network_only():
    plain, with_rays = NESTED.graphs_for(False), NESTED.graphs_for(True)
    assert [graph.key for graph in plain] == ["anyview", "metric"]
    assert [graph.key for graph in with_rays] == ["anyview-rays", "metric"]
    assert [graph.name for graph in with_rays] == ["anyview", "metric"]
