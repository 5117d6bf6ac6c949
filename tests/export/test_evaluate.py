"""Accuracy on people's own data: files, sentences, figures; and the same figures on rendered scenes."""

import json

import cv2
import numpy as np
import pytest

import da3_export.evaluate
from da3_export.evaluate import (
    EAGER_FP32,
    FP16_ROUNDED,
    accuracy,
    evaluate,
    find_pairs,
    read_depth,
    table,
)
from da3_export.settings import BuildSettings
from da3_runtime.errors import SettingError
from da3_runtime.postprocess.depth import Depth
from da3_runtime.variants import Head, Unit
from tests.support.paths import NANO, PHOTOS, ROOT
from tests.support.processes import run_module
from tools.nano.render import HELD_OUT_SEED, SIZES, known_depth, render_folder
from tools.nano.scenes import render

TRUTH = np.array([[1, 2, 4, 8, np.inf, 0, -1, np.nan]])


@pytest.fixture
def data(tmp_path):
    """A folder with one photo, 8 x 6 pixels, and its depth."""
    cv2.imwrite(str(tmp_path / "a.png"), np.full((6, 8, 3), 90, np.uint8))
    np.savez(tmp_path / "a.depth.npz", depth=np.ones((6, 8), np.float32))
    return tmp_path


def test_accuracy_by_hand():
    depth = np.array([[3, 6, 12, 24, 1, 1, 1, 1]], np.float32)
    assert accuracy(depth, TRUTH, scale=True) == (0, 1, 0)
    as_is = accuracy(depth, TRUTH, scale=False)
    assert as_is.abs_rel == pytest.approx(2)
    assert as_is.delta1 == 0
    assert as_is.rmse == pytest.approx(np.sqrt((4 + 16 + 64 + 256) / 4))
    got = accuracy(np.array([[1, 2, 4, 16, 1, 1, 1, 1]], np.float32), TRUTH, scale=True)
    assert got.abs_rel == pytest.approx(0.25)
    assert got.delta1 == 0.75
    assert got.rmse == pytest.approx(4)


def test_depth_is_read_from_each_kind_of_file(tmp_path):
    depth = np.array([[1.5, 2], [0, 4]])
    np.savez(tmp_path / "a.depth.npz", depth=depth)
    np.save(tmp_path / "a.npy", depth.astype(np.float32))
    cv2.imwrite(str(tmp_path / "a.depth.png"), (depth * 1000).astype(np.uint16))
    for name in ("a.depth.npz", "a.npy", "a.depth.png"):
        assert read_depth(tmp_path / name, 0.001).tolist() == depth.tolist()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.depth.png", None, r"a PNG of depth needs --depth-scale"),
        ("a.npy", b"nothing", r"a\.npy is not a depth file"),
        ("a.depth.npz", b"nothing", r"a\.depth\.npz is not a depth file"),
        ("a.npy", np.ones((2, 2, 3)), r"a\.npy holds 2 x 2 x 3 float64: depth is a map"),
        ("a.npy", np.array([["x"]]), r"a\.npy holds 1 x 1 <U1: depth is a map"),
    ],
)
def test_a_file_that_holds_no_depth_is_named(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / name, content)
    with pytest.raises(SettingError, match=message):
        read_depth(tmp_path / name)


def test_an_8_bit_png_and_an_npz_without_depth_are_no_depth(tmp_path):
    cv2.imwrite(str(tmp_path / "a.depth.png"), np.ones((2, 2), np.uint8))
    np.savez(tmp_path / "a.depth.npz", other=np.ones((2, 2)))
    for name in ("a.depth.png", "a.depth.npz"):
        with pytest.raises(SettingError, match="is not a depth file"):
            read_depth(tmp_path / name, 1.0)


def test_photos_and_depth_are_paired_by_name(data):
    cv2.imwrite(str(data / "b.jpg"), np.zeros((6, 8, 3), np.uint8))
    cv2.imwrite(str(data / "b.depth.png"), np.ones((6, 8), np.uint16))
    (data / "._b.jpg").write_bytes(b"a sidecar")
    assert [(p.photo.name, p.depth.name) for p in find_pairs(data)] == [
        ("a.png", "a.depth.npz"),
        ("b.jpg", "b.depth.png"),
    ]


def run(data, **options):
    return evaluate(BuildSettings(model_id=NANO), data, heads=(Head.DPT,), **options)


def test_a_folder_without_photos_and_a_photo_without_depth_are_refused(data, tmp_path_factory):
    with pytest.raises(SettingError, match="is not a folder with photos in it"):
        run(tmp_path_factory.mktemp("empty"))
    cv2.imwrite(str(data / "b.jpg"), np.zeros((6, 8, 3), np.uint8))
    with pytest.raises(
        SettingError, match=r"1 of 2 photos have no depth file, b\.jpg first; put b\.depth\.npz"
    ):
        run(data)


def test_depth_of_another_size_and_depth_without_a_valid_pixel_are_refused(data):
    np.savez(data / "a.depth.npz", depth=np.ones((8, 6)))
    with pytest.raises(
        SettingError, match=r"a\.depth\.npz is 6 x 8 pixels, a\.png \(upright\) is 8 x 6"
    ):
        run(data)
    np.savez(data / "a.depth.npz", depth=np.array([[0, np.nan, np.inf, -1] * 2] * 6))
    with pytest.raises(SettingError, match=r"a\.depth\.npz has no valid pixel"):
        run(data)


@pytest.mark.parametrize(
    ("unit", "scaling", "abs_rel"), [(Unit.RELATIVE, "median", 0), (Unit.METERS, "none", 1)]
)
def test_only_depth_without_a_unit_is_scaled(data, monkeypatch, unit, scaling, abs_rel):
    far = Depth(np.full((6, 8), 2, np.float32), unit)
    monkeypatch.setattr(da3_export.evaluate, "ways_to_run", lambda *_: [("twice as far", None)])
    monkeypatch.setattr(da3_export.evaluate, "_estimate", lambda *_: lambda photo: far)
    (figures,) = run(data)
    assert (figures.scaling, figures.abs_rel, figures.rmse, figures.photos) == (
        scaling,
        abs_rel,
        abs_rel,
        1,
    )
    assert scaling in table([figures])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.nano.render._PROFILE_SCENES", 20)
        render_folder(folder, 3)
    return folder


def test_rendered_scenes_are_stored_without_loss(scenes):
    assert len(find_pairs(scenes)) == 3
    scene = render(HELD_OUT_SEED, 1, *SIZES[1])
    assert np.array_equal(cv2.imread(str(scenes / "00001.png"))[..., ::-1], scene.rgb)
    assert np.array_equal(read_depth(scenes / "00001.depth.npz"), known_depth(scene))
    about = json.loads((scenes / "about.json").read_text())
    assert about["count"] == 3
    assert str(HELD_OUT_SEED) in about["scenes"]
    assert 0.05 < about["baseline"]["abs_rel"] < 1


def test_every_way_to_run_both_heads_is_measured(engine, sdt_engine, scenes, tmp_path):
    target = tmp_path / "figures.json"
    done = run_module(
        "da3_export", "evaluate", "--model", NANO, "--engine-dir", str(engine.engine_dir),
        "--data", str(scenes), "--json", str(target),
    )  # fmt: skip
    assert done.code == 0, done.stderr
    content = json.loads(target.read_text())
    assert content["data"] == json.loads((scenes / "about.json").read_text())
    rows = {(row["head"], row["how"]): row for row in content["figures"]}
    for head in ("dpt", "sdt"):
        eager, onnx = (rows[head, way]["abs_rel"] for way in (EAGER_FP32, "onnxruntime-cpu fp32"))
        assert 0.02 < eager < 0.2
        assert onnx == pytest.approx(eager, rel=1e-4)
        assert f"{eager:.4f}" in done.stdout
    eager, half = (rows["dpt", way]["abs_rel"] for way in (EAGER_FP32, FP16_ROUNDED))
    assert half == pytest.approx(eager, abs=2e-3)
    assert half != eager
    assert ("sdt", FP16_ROUNDED) not in rows
    assert f"sdt, {FP16_ROUNDED}: not run" in done.stderr
    assert "cuda" in done.stderr  # a backend that cannot run is named with the reason
    assert str(ROOT) not in target.read_text()


def test_comparison_images_are_written(engine, sdt_engine, tmp_path):
    done = run_module(
        "tools.nano", "pictures", "--engine-dir", str(engine.engine_dir),
        "--photo", str(PHOTOS / "temple.jpg"), "--out", str(tmp_path),
    )  # fmt: skip
    assert done.code == 0, done.stderr
    scene, photo = (cv2.imread(str(tmp_path / f"nano-{name}.jpg")) for name in ("scene", "photo"))
    assert scene.shape == (378, 4 * 504, 3)
    assert photo.shape[1] > 2 * photo.shape[0]
