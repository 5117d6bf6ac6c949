"""Training, distillation and figures: what is minimised, and that a stopped run goes on as it was."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tools.nano.distill import Photos, distill
from tools.nano.evaluate import accuracy, row_profile
from tools.nano.muon import Muon, orthogonal

from da3_runtime.errors import SettingError
from da3_runtime.network.load import load_sdt, load_upstream
from da3_runtime.store.checkpoint import HUB, find_checkpoint
from da3_runtime.variants import find_variant
from tests.conftest import PHOTOS
from tools.nano import losses, train
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
    assert losses.gradient_matching(residual, MASK).item() == pytest.approx((0.4 + 0.2) / 4, rel=1e-5)


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
    assert losses.camera(lens, pose, lens).item() == 0
    assert losses.camera(lens * 1.1, pose, lens).item() == pytest.approx(np.log(1.1), rel=1e-4)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_orthogonal_keeps_directions_and_brings_their_lengths_to_about_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    got = orthogonal(matrices)
    lengths = torch.linalg.svdvals(got)
    assert lengths.min() > 0.6
    assert lengths.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inner = left.mT @ got @ right.mT
    off_diagonal = inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(off_diagonal, torch.zeros_like(inner), rtol=0, atol=1e-4)


def test_muon_moves_matrices_as_pytorchs_does():
    """To what PyTorch's bfloat16 is good for."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(*shape, generator=generator) for shape in ((24, 60), (60, 24), (24, 60))]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    optimizers = (
        Muon(ours, lr=0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for before, one, other in zip(start, ours, theirs, strict=True):
        assert (one - other).norm() < 0.05 * (other - before).norm()


def test_muon_leaves_what_has_no_gradient():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    Muon([parameter], lr=1.0, weight_decay=1.0).step()
    assert torch.equal(parameter, torch.ones(2, 2))


def test_batches_come_twice_the_second_time_mirrored_whoever_renders_them(small_steps, monkeypatch):
    monkeypatch.setattr(train, "KEPT_BATCHES", 2)
    scenes = train.Scenes(seed=3, steps=8)
    batches = [scenes[step] for step in range(8)]
    for first, second in ((0, 2), (1, 3), (4, 6), (5, 7)):
        again = train.Scenes(seed=3, steps=8)[second]  # with nothing kept
        for name, value in batches[second].items():
            shown = batches[first][name]
            assert torch.equal(value, shown if name == "intrinsics" else shown.flip(2))
            assert torch.equal(value, again[name])
    assert not torch.equal(batches[0]["images"], batches[1]["images"])
    assert not torch.equal(batches[0]["images"], batches[4]["images"])
    assert not scenes._kept


@pytest.fixture
def small_steps(monkeypatch):
    for name in ("EARLY_SIZES", "LATE_SIZES"):
        monkeypatch.setattr(train, name, ((84, 2, 1.0),))
    monkeypatch.setattr(train, "ASPECTS", (1.0,))
    monkeypatch.setattr(train, "ASPECT_ODDS", (1.0,))
    monkeypatch.setattr(train, "SAVE_EVERY", 2)
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(train, "RAY_SHARE", 0.3)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(small_steps, tmp_path, monkeypatch):
    whole = train.train(NANO, 1, 6, 0, tmp_path / "whole")
    rate = train._rate

    def stop_at_three(step, steps):
        if step == 3:
            raise KeyboardInterrupt
        return rate(step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_rate", stop_at_three)
        with pytest.raises(KeyboardInterrupt):
            train.train(NANO, 1, 6, 0, tmp_path / "stopped")
    resumed = train.train(NANO, 1, 6, 0, tmp_path / "stopped")
    one, two = load_file(whole), load_file(resumed)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-2, atol=1e-3)
    curve = torch.load(tmp_path / "stopped" / train.STATE_FILE, weights_only=True)["curve"]
    assert [line["step"] for line in curve] == [1, 2, 3, 4, 5, 6]
    assert ["rays" in line for line in curve] == [False] * 5 + [True]
    load_upstream(NANO, NANO.graphs[0], resumed)
    with pytest.raises(SettingError, match="holds a run of da3-nano with seed 1 and 6 steps"):
        train.train(NANO, 1, 7, 0, tmp_path / "stopped")


def test_training_lowers_the_loss(small_steps, tmp_path):
    train.train(NANO, 2, 36, 0, tmp_path)
    curve = torch.load(tmp_path / train.STATE_FILE, weights_only=True)["curve"]
    depth = [line["depth"] for line in curve if "depth" in line]
    assert np.mean(depth[-8:]) < 0.8 * np.mean(depth[:4])


def test_only_one_any_view_network_is_trained(tmp_path):
    for model in ("da3metric-large", "da3nested-giant-large"):
        with pytest.raises(SettingError, match="not one any-view network"):
            train.train(find_variant(model), 0, 10, 0, tmp_path)


def test_a_head_distilled_from_photos_comes_nearer_to_the_dpt_head(tmp_path):
    checkpoint = find_checkpoint(NANO, HUB).path
    (tmp_path / "notes.jpg").write_bytes(b"not a photo")
    for photo in PHOTOS.glob("*.jpg"):
        (tmp_path / photo.name).write_bytes(photo.read_bytes())
    few = Photos(str(tmp_path), 2, 2, 140, seed=0)
    more = Photos(str(tmp_path), 30, 2, 140, seed=0)
    errors = []
    for photos in (few, more):
        out = tmp_path / f"{photos.steps}.safetensors"
        distill(NANO, checkpoint, photos, 16, 0, out)
        errors.append(
            distance_to_dpt(checkpoint, out, Photos(str(tmp_path), 1, 4, 140, seed=9)[0].numpy())
        )
    assert errors[1] < 0.9 * errors[0]
    assert not list(tmp_path.glob("*.part"))


def distance_to_dpt(checkpoint, sdt, images):
    from da3_export.parity.reference import run_reference
    from da3_runtime.network.load import feature_width

    (graph,) = NANO.graphs
    upstream = load_upstream(NANO, graph, checkpoint)
    head = load_sdt(feature_width(graph), sdt)
    dpt, sdt = run_reference(upstream, images, graph), run_reference(upstream, images, graph, head)
    return np.abs(np.log(dpt.depth) - np.log(sdt.depth)).mean()


def test_photos_must_be_there(tmp_path):
    for source in (str(tmp_path), str(tmp_path / "none"), "scenes:x"):
        with pytest.raises(SettingError, match="--images"):
            Photos(source, 1, 1, 140, 0)
    (tmp_path / "a.jpg").write_bytes(b"no")
    with pytest.raises(SettingError, match=r"a\.jpg"):
        Photos(str(tmp_path), 1, 1, 140, 0)[0]


def test_the_baseline_knows_that_the_ground_is_near():
    profile = row_profile()
    assert profile[-1] < profile[len(profile) // 2] - 0.3
    scene = render(1, 3, 84, 112)
    assert accuracy(np.where(scene.valid, scene.depth, 1), scene) == (0, 1)
