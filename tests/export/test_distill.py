"""Distilling an SDT head: its photos, its curve, going on after a stop, and what it refuses."""

import errno
import json
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from da3_export import distill as distill_module
from da3_export.crops import PhotoFolder, RandomCrops, split
from da3_export.curve import draw
from da3_export.distill import Distillation, distill
from da3_runtime.errors import BuildError, SettingError
from da3_runtime.store.checkpoint import BUNDLED_DIR, HUB, SDT_FILE, find_checkpoint
from da3_runtime.util.files import locked
from da3_runtime.variants import find_variant
from tests.support.paths import NANO, PHOTOS

VARIANT = find_variant(NANO)
CHECKPOINT = find_checkpoint(VARIANT, HUB).path
BUNDLED_HEAD = BUNDLED_DIR / NANO / SDT_FILE


@pytest.fixture
def images(tmp_path):
    """Four photos in two folders, and files that are none."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for name in ("cat.jpg", "temple.jpg"):
        shutil.copy(PHOTOS / name, folder)
    small = cv2.resize(cv2.imread(str(PHOTOS / "coffee.jpg")), (120, 100))
    cv2.imwrite(str(folder / "more" / "coffee.png"), small)
    cv2.imwrite(str(folder / "more" / "coffee.tiff"), small[:, ::-1])
    cv2.imwrite(str(folder / "more" / "coffee.depth.png"), np.zeros((9, 9), np.uint16))
    (folder / "notes.txt").write_text("no photo")
    return folder


@pytest.fixture
def task(images, monkeypatch):
    """A distillation of six steps that reports after three and after six, and saves after each."""
    monkeypatch.setattr(distill_module, "REPORTS", 2)
    monkeypatch.setattr(distill_module, "_SAVE_EVERY", -1.0)
    return Distillation(VARIANT, PhotoFolder.find(images), fused=8, steps=6, batch=2, longest=84)


def stop_at(monkeypatch, step):
    """Let a run be interrupted in the middle of a step."""
    learn = distill_module._Run._learn

    def stop(self, *args):
        if self._state.step == step:
            raise KeyboardInterrupt
        return learn(self, *args)

    monkeypatch.setattr(distill_module._Run, "_learn", stop)


def curve_of(out):
    lines = map(json.loads, out.with_suffix(".curve.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def test_photos_are_those_that_depth_finds(images):
    photos = PhotoFolder.find(images)
    assert photos.names == ("cat.jpg", "more/coffee.png", "more/coffee.tiff", "temple.jpg")
    assert photos.skipped == "1 .txt, 1 .depth.png"


def test_held_out_photos_stay_the_same_when_others_are_added_and_are_not_learned_from(images):
    def halves():
        parts = split(PhotoFolder.find(images), 50, 140)
        assert not set(parts.training) & set(parts.held_out)
        return parts

    before = halves()
    for number in range(6):
        shutil.copy(images / "cat.jpg", images / f"{number}.jpg")
    after = halves()
    assert set(before.held_out) <= set(after.held_out)
    assert set(before.training) <= set(after.training)
    assert 1 < len(after.held_out) < 9
    assert len(split(PhotoFolder.find(images), 1e-9, 84).held_out) == 1
    for image in after.held_out.values():
        assert (image.dtype, image.shape[:2], max(image.shape)) == (torch.uint8, (1, 1), 140)


def test_an_unreadable_photo_is_never_held_out_and_crops_take_the_next_one(images):
    first = next(iter(split(PhotoFolder.find(images), 1e-9, 84).held_out))
    (images / first).write_bytes(b"damaged")
    photos = PhotoFolder.find(images)
    parts = split(photos, 1e-9, 84)
    assert list(parts.unreadable) == [first]
    assert first not in {*parts.training, *parts.held_out}
    (images / parts.training[0]).write_bytes(b"damaged")
    crops = RandomCrops(photos, parts.training, 8, 84, 0)
    batches = [crops[step] for step in range(3)]
    assert [list(each.unreadable) for each in batches] == [[parts.training[0]], [], []]
    assert all(each.images is not None and len(each.images) == 8 for each in batches)
    (images / parts.training[1]).unlink()
    assert RandomCrops(photos, parts.training, 2, 84, 0)[0].images is None


def test_the_curve_is_drawn_on_axes_that_hold_every_value():
    lines = [
        {"step": step, "loss": 3 / step, "held_out_abs_rel": 0.5 / step} for step in (100, 200, 250)
    ]
    for points in (lines, lines[:1], [{"step": 1, "loss": 0.0, "held_out_abs_rel": 1e9}]):
        root = ET.fromstring(draw(points, "a < b"))
        height = float(root.get("height"))
        tracks = [each.get("points").split() for each in root.findall(".//{*}polyline")]
        assert [len(track) for track in tracks] == [len(points)] * 2
        for x, y in (map(float, point.split(",")) for track in tracks for point in track):
            assert 0 < x <= float(root.get("width"))
            assert 0 < y < height / 2
    assert not ET.fromstring(draw([], "empty")).findall(".//{*}polyline")


def test_a_stopped_run_goes_on_as_if_it_had_not_been(task, tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more add in another order
    try:
        whole, stopped = tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
        error = distill(task, CHECKPOINT, whole)
        with monkeypatch.context() as patch:
            stop_at(patch, 4)
            with pytest.raises(KeyboardInterrupt):
                distill(task, CHECKPOINT, stopped)
        assert not stopped.exists()
        assert len(curve_of(stopped)) == 1
        capsys.readouterr()
        assert distill(task, CHECKPOINT, stopped) == error
    finally:
        torch.set_num_threads(threads)
    assert "continuing at step 4 of 6" in capsys.readouterr().err
    one, two = load_file(whole), load_file(stopped)
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert curve_of(whole) == curve_of(stopped)
    assert [line["step"] for line in curve_of(whole)] == [3, 6]
    names = {path.name for path in tmp_path.iterdir()} - {"images"}
    assert names == {
        f"{name}.{kind}"
        for name in ("whole", "stopped")
        for kind in ("safetensors", "curve.jsonl", "curve.svg")
    }


def test_a_stopped_run_goes_on_with_its_own_settings_only(task, tmp_path, monkeypatch):
    out = tmp_path / "head.safetensors"
    state = tmp_path / "head.state.pt"
    stop_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        distill(task, CHECKPOINT, out)
    content = state.read_bytes()
    for other, named in (
        (replace(task, steps=7), "--steps 6"),
        (replace(task, seed=1, batch=1), "--batch 2, --seed 0"),
        (replace(task, fused=16), "SDT_FUSION_CHANNELS 8"),
        (replace(task, start=BUNDLED_HEAD, fused=32), "the head to start from not given"),
        (replace(task, photos=replace(task.photos, names=("a.jpg",))), r"--images 4 photos \(digest"),
    ):
        with pytest.raises(SettingError, match=rf"unfinished run with .*{named}.*: give the same again"):
            distill(other, CHECKPOINT, out)
    assert state.read_bytes() == content
    for damage in (content[: len(content) // 2], b"", b"not a state"):
        state.write_bytes(damage)
        with pytest.raises(
            SettingError, match=r"damaged: give another --out, or delete head\.state\.pt"
        ):
            distill(task, CHECKPOINT, out)


def test_two_runs_do_not_write_one_output(task, tmp_path):
    out = tmp_path / "head.safetensors"
    with (
        locked(tmp_path / ".head.safetensors.lock"),
        pytest.raises(SettingError, match="another run writes it"),
    ):
        distill(task, CHECKPOINT, out)


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(task, tmp_path, monkeypatch):
    out = tmp_path / "head.safetensors"
    write = distill_module.write_atomically

    def full_at_the_second(path, data):
        if path.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(distill_module, "write_atomically", full_at_the_second)
        with pytest.raises(BuildError, match=r"--out .*: No space left .* goes on from the last saved"):
            distill(task, CHECKPOINT, out)
    assert torch.load(tmp_path / "head.state.pt", weights_only=True)["step"] == 1
    assert not out.exists()


@pytest.mark.parametrize(
    "name", ["head.safetensors", "head.curve.svg", "head.curve.jsonl", "head.state.pt"]
)
def test_a_folder_in_the_place_of_a_result_is_refused_at_the_start(task, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(SettingError, match=rf"--out .*: {name} is a folder; give another name"):
        distill(task, CHECKPOINT, tmp_path / "head.safetensors")


REFUSED = {
    "no-folder": (["--images", "{0}/none"], "no such folder"),
    "file": (["--images", "{0}/images/cat.jpg"], "is a file, not a folder"),
    "empty": (["--images", "{0}/empty"], "contains no photo, only 1 .txt; the known endings are"),
    "one": (["--images", "{0}/images/more/one"], "contains one photo; give two or more"),
    "unreadable": (["--images", "{0}/bad"], "none of the 2 photos can be read, two are needed. a.jpg: "),
    "ending": (["--out", "{0}/head.pt"], "give a name that ends in .safetensors"),
    "under-a-file": (["--out", "{0}/images/cat.jpg/head.safetensors"], "--out"),
    "steps": (["--steps", "0"], "--steps 0: give a whole number from 1."),
    "batch": (["--batch", "-2"], "--batch -2: give a whole number from 1."),
    "longest": (["--longest", "0"], "--longest 0: give a whole number from 84."),
    "seed": (["--seed", "-1"], "--seed -1: give a whole number from 0."),
    "workers": (["--workers", "-1"], "--workers -1: give a whole number from 0."),
    "held-out-none": (["--held-out", "0"], "--held-out 0: give a percentage from above 0 to 50."),
    "held-out-most": (["--held-out", "nan"], "--held-out nan: give a percentage"),
    "checkpoint": (
        ["--weights", str(BUNDLED_HEAD)],
        "The checkpoint does not fit da3-nano",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_are_one_sentence(case, images, tmp_path, run_here):
    for folder, name in (("bad", "a.jpg"), ("bad", "b.png"), ("empty", "a.txt")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(b"no photo")
    (images / "more" / "one").mkdir()
    shutil.copy(images / "cat.jpg", images / "more" / "one")
    options, sentence = REFUSED[case]
    given = {"--images": str(images), "--out": str(tmp_path / "head.safetensors"), "--workers": "0"}
    given |= {options[0]: options[1].format(tmp_path)}
    done = run_here(
        "da3_export", "distill-sdt", "--model", NANO, *(part for each in given.items() for part in each)
    )
    assert done.code == 2 or case == "checkpoint"
    assert done.code
    assert sentence in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("head.*"))
