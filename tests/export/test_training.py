"""Training and distillation: their losses, and that a stopped run continues as if it had not been."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from da3_export.accuracy.metrics import accuracy
from da3_export.crops import PhotoFolder, RandomCrops
from da3_export.distill import Distillation, distill
from da3_export.losses import gradient_matching
from da3_export.optimizers import MATRIX_PEAK_RATE, WEIGHT_DECAY, Optimizers
from da3_export.parity.upstream import load_upstream
from da3_runtime.errors import SettingError
from da3_runtime.network.load import build_network, load_sdt, load_weights
from da3_runtime.store.checkpoint import HUB, bundled_sdt, find_checkpoint
from da3_runtime.variants import find_variant
from tests.support.paths import PHOTOS as EXAMPLES
from tools.nano import losses, train
from tools.nano.render import by_row, known_depth, row_profile
from tools.nano.scenes import render

NANO = find_variant("da3-nano")


def maps(*values):
    return torch.tensor(values, dtype=torch.float32)[None]


MASK = torch.tensor([[[True, True], [True, False]]])


def test_the_residual_ignores_the_targets_scale_and_what_is_masked():
    target, depth = maps([2, 4], [8, np.inf]), maps([1, 2], [4, 77])
    for scale in (1, 10):
        got = losses.log_residual(depth, target * scale, MASK)
        expected = np.log([[1 / 0.5, 2 / 1], [4 / 2, 1]])
        np.testing.assert_allclose(got[0], expected, rtol=1e-5)


def test_the_scale_invariant_loss_by_hand():
    residual = maps([0.1, 0.3], [0.2, 99])
    expected = np.sqrt(0.14 / 3 - 0.85 * 0.2**2)
    assert losses.scale_invariant(residual, MASK).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_loss_by_hand():
    residual = maps([0.1, 0.3], [0.5, 99])
    # One pair down, one across; the coarser scales have a single pixel.
    assert gradient_matching(residual, MASK).item() == pytest.approx((0.4 + 0.2) / 4, rel=1e-5)


def test_confidence_is_best_at_reward_over_error():
    error = torch.full((1, 2, 2), 0.05)
    confidences = torch.linspace(1, 10, 901)
    values = [losses.confidence(torch.full((1, 2, 2), c.item()), error, MASK) for c in confidences]
    best = confidences[int(torch.stack(values).argmin())].item()
    assert best == pytest.approx(losses.CONFIDENCE_REWARD / 0.05, abs=0.02)


def test_sky_is_pushed_away_until_it_is_farthest_and_no_more():
    sky = torch.tensor([[[True, False]]])
    near, far = maps([1.0, 5.0]), maps([20.0, 5.0])
    assert losses.sky(near, sky, torch.tensor([10.0])).item() == pytest.approx(np.log(10), rel=1e-5)
    assert losses.sky(far, sky, torch.tensor([10.0])).item() == 0


def test_the_camera_loss_is_zero_for_the_right_camera_only():
    lens = torch.tensor([[[300.0, 0, 50], [0, 310, 40], [0, 0, 1]]])
    pose = torch.eye(3, 4)[None]
    assert losses.camera(lens, pose, lens, pose).item() == 0
    assert losses.camera(lens * 1.1, pose, lens, pose).item() == pytest.approx(np.log(1.1), rel=1e-4)
    assert losses.camera(lens, pose + 0.5, lens, pose).item() == pytest.approx(0.5)


def test_the_pose_loss_is_the_angle_and_the_share_of_the_baseline():
    turn = torch.tensor(cv2.Rodrigues(np.array([0.0, 0.2, 0.0]))[0], dtype=torch.float32)
    right = torch.cat((torch.eye(3), torch.tensor([[0.0], [0.0], [-2.0]])), dim=1)[None]  # at z = 2
    assert losses.relative_pose(right, right).item() < 0.002
    turned = torch.cat((turn, turn @ torch.tensor([[0.0], [0.0], [-2.0]])), dim=1)[
        None
    ]  # at z = 2, turned
    assert losses.relative_pose(turned, right).item() == pytest.approx(0.2, rel=0.02)
    near = right.clone()
    near[:, 2, 3] = -1
    assert losses.relative_pose(near, right).item() == pytest.approx(0.3 * 1 / 2.1, rel=0.02)


def test_a_convolution_is_updated_as_the_matrix_of_its_output_channels():
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 5), torch.nn.Linear(9, 12, bias=False))
    matrices = [network[0].weight.detach().flatten(1).clone(), network[1].weight.detach().clone()]
    plain = [torch.nn.Parameter(matrix) for matrix in matrices]
    muon = torch.optim.Muon(
        plain, lr=0.5 * MATRIX_PEAK_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
    )
    bias = network[0].bias.detach().clone()
    optimizers = Optimizers(network, [network])
    for _ in range(3):
        for own, parameter in zip(plain, (network[0].weight, network[1].weight), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            own.grad = parameter.grad.flatten(1).clone()
        optimizers.step(0.5)
        muon.step()
    assert torch.equal(network[0].weight.flatten(1), plain[0])
    assert torch.equal(network[1].weight, plain[1])
    assert torch.equal(network[0].bias, bias)  # without a gradient nothing moves
    assert not torch.equal(network[1].weight, matrices[1] * 0)


def test_batches_come_twice_the_second_time_mirrored_whoever_renders_them(small_steps, monkeypatch):
    monkeypatch.setattr(train, "KEPT_BATCHES", 2)
    scenes = train.Scenes(SMALL_PHOTOS, seed=3, steps=8)
    batches = [scenes[step] for step in range(8)]
    for first, second in ((0, 2), (1, 3), (4, 6), (5, 7)):
        again = train.Scenes(SMALL_PHOTOS, seed=3, steps=8)[second]  # with nothing kept
        for name, value in batches[second].items():
            shown = batches[first][name]
            if name in ("images", "depth", "sky"):
                shown = shown.flip(3)
            assert torch.equal(value, again[name])
            assert name == "extrinsics" or torch.equal(value, shown)
    assert not torch.equal(batches[0]["images"], batches[1]["images"])
    assert not torch.equal(batches[0]["images"], batches[4]["images"])
    assert not scenes._kept


SMALL_PHOTOS = replace(train.PHOTOS, early=((84, 2, 1.0),), late=((84, 2, 1.0),))
SMALL_SCENES = replace(
    train.SCENES, early=((84, 4, 1.0),), late=((84, 4, 1.0),), views=((1, 0.3), (2, 0.7))
)


def points_of(scene, view, every=7):
    """World points of some pixels of a view, and their pixels."""
    depth = scene["depth"][view].numpy()
    rows, columns = (each[::every] for each in np.nonzero(depth < 20))
    lens, pose = scene["intrinsics"][view].numpy(), scene["extrinsics"][view].numpy()
    pixels = np.stack((columns + 0.5, rows + 0.5, np.ones(len(rows))))
    seen = np.linalg.inv(lens) @ pixels * depth[rows, columns]
    return (pose[:, :3].T @ (seen - pose[:, 3:])).T, rows, columns


@pytest.mark.parametrize("mirror", [False, True])
def test_cameras_of_a_scene_agree_with_its_depths(mirror):
    """Points of one view are, seen from the other, where its own depth says, or hidden."""
    stage = replace(SMALL_SCENES, views=((2, 1.0),))
    agree = []
    for number in range(6):
        batch = train.Scenes(stage, seed=5, steps=200)._render(number)
        batch = train.mirrored(batch) if mirror else batch
        scene = {name: value[0] for name, value in batch.items()}
        points, *_ = points_of(scene, 0)
        pose = scene["extrinsics"][1].numpy()
        x, y, z = pose[:, :3] @ points.T + pose[:, 3:]
        lens, depth = scene["intrinsics"][1].numpy(), scene["depth"][1].numpy()
        column = np.floor(lens[0, 0] * x / z + lens[0, 2]).astype(int)
        row = np.floor(lens[1, 1] * y / z + lens[1, 2]).astype(int)
        inside = (
            (z > 0.2) & (row >= 0) & (row < depth.shape[0]) & (column >= 0) & (column < depth.shape[1])
        )
        assert inside.mean() > 0.2
        error = np.abs(depth[row[inside], column[inside]] / z[inside] - 1)
        agree.append((error < 0.03).mean())
    assert np.mean(agree) > 0.75


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(train, "ASPECTS", (1.0,))
    monkeypatch.setattr(train, "ASPECT_ODDS", (1.0,))
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "RAY_SHARE", 0.3)
    monkeypatch.setattr(train, "PATCH_SCENES", 8)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(small_steps, tmp_path, monkeypatch):
    whole = train.train(NANO, 1, 4, 0, tmp_path / "whole", SMALL_PHOTOS)
    rate = train._rate

    def stop_at_two(step, *counts):
        if step == 2:
            raise KeyboardInterrupt
        return rate(step, *counts)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_rate", stop_at_two)
        with pytest.raises(KeyboardInterrupt):
            train.train(NANO, 1, 4, 0, tmp_path / "stopped", SMALL_PHOTOS)
    resumed = train.train(NANO, 1, 4, 0, tmp_path / "stopped", SMALL_PHOTOS)
    one, two = load_file(whole), load_file(resumed)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-2, atol=1e-3)
    curve = torch.load(tmp_path / "stopped" / train.STATE_FILE, weights_only=True)["curve"]
    assert [line["step"] for line in curve] == [1, 2, 3, 4]
    assert ["rays" in line for line in curve] == [False] * 3 + [True]
    load_upstream(NANO, NANO.graphs[0], resumed)
    with pytest.raises(SettingError, match="holds a run of da3-nano with seed 1 and 4 steps"):
        train.train(NANO, 1, 5, 0, tmp_path / "stopped", SMALL_PHOTOS)


def test_training_on_scenes_starts_from_a_checkpoint_and_learns_every_part(small_steps, tmp_path):
    start = find_checkpoint(NANO, HUB).path
    path = train.train(NANO, 1, 6, 0, tmp_path, SMALL_SCENES, start=start)
    before, after = load_file(start), load_file(path)
    assert before.keys() == after.keys()
    fixed = {name for name in before if torch.equal(before[name], after[name])}
    assert all("_aux." in name for name in fixed)  # three of the ray branch's four levels make no output
    curve = torch.load(tmp_path / train.STATE_FILE, weights_only=True)["curve"]
    assert all("rays" in line for line in curve)
    assert ["pose" in line for line in curve].count(True) >= 2
    # Most of the decoder's units pass a gradient.
    network = build_network(NANO.graphs[0])
    load_weights(network, NANO, NANO.graphs[0], path)
    images = np.stack([[render(9, i, 84, 84).rgb] for i in range(8)])
    with torch.no_grad():
        tokens = network.backbone(torch.from_numpy(images)).tokens[-1]
        assert (network.cam_dec.backbone[:2](tokens) > 0).float().mean() > 0.2


def test_training_lowers_the_loss(small_steps, tmp_path):
    train.train(NANO, 2, 24, 0, tmp_path, SMALL_PHOTOS)
    curve = torch.load(tmp_path / train.STATE_FILE, weights_only=True)["curve"]
    depth = [line["depth"] for line in curve if "depth" in line]
    assert np.mean(depth[-6:]) < 0.8 * np.mean(depth[:4])


def test_only_one_any_view_network_is_trained(tmp_path):
    for model in ("da3metric-large", "da3nested-giant-large"):
        with pytest.raises(SettingError, match="not one any-view network"):
            train.train(find_variant(model), 0, 10, 0, tmp_path)


def test_a_head_distilled_from_photos_comes_nearer_to_the_dpt_head(tmp_path, monkeypatch):
    monkeypatch.setattr("da3_export.distill.REPORTS", 5)
    checkpoint = find_checkpoint(NANO, HUB).path
    images = tmp_path / "images"
    images.mkdir()
    (images / "notes.jpg").write_bytes(b"not a photo")
    for photo in EXAMPLES.glob("*.jpg"):
        (images / photo.name).write_bytes(photo.read_bytes())
    photos = PhotoFolder.find(images)
    shown = RandomCrops(photos, ["cat.jpg", "temple.jpg"], 4, 84, seed=9)[0].images.numpy()
    few = Distillation(NANO, photos, fused=16, steps=2, batch=1, longest=84)
    more = replace(few, steps=30)
    further = replace(few, fused=32, start=bundled_sdt(NANO).path)
    held_out, shown_errors = [], []
    for number, task in enumerate((few, more, further)):
        out = tmp_path / f"{number}.safetensors"
        held_out.append(distill(task, checkpoint, out))
        shown_errors.append(distance_to_dpt(checkpoint, out, shown))
    for errors in (held_out, shown_errors):
        assert errors[1] < 0.95 * errors[0]
        assert errors[2] < errors[1]
    curve = [json.loads(line) for line in (tmp_path / "1.curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == [6, 12, 18, 24, 30]
    assert curve[-1]["held_out_abs_rel"] == pytest.approx(held_out[1], abs=1e-6)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".part", ".pt", ".lock")]


def distance_to_dpt(checkpoint, sdt, images):
    from da3_export.parity.reference import run_reference
    from da3_runtime.network.load import feature_width

    (graph,) = NANO.graphs
    upstream = load_upstream(NANO, graph, checkpoint)
    head = load_sdt(feature_width(graph), sdt)
    dpt, sdt = (run_reference(upstream, images[:, None], graph, each).outputs for each in (None, head))
    return np.abs(np.log(dpt.depth) - np.log(sdt.depth)).mean()


def test_the_baseline_knows_that_the_ground_is_near(monkeypatch):
    monkeypatch.setattr("tools.nano.render._PROFILE_SCENES", 50)
    profile = row_profile()
    assert profile[-1] < profile[len(profile) // 2] - 0.3
    assert np.ptp(by_row(profile, 20, 30), axis=1).max() == 0
    scene = render(1, 3, 84, 112)
    truth = known_depth(scene)
    assert accuracy(np.where(scene.valid, scene.depth, 1), truth).abs_rel == 0
