"""From raw outputs to depth, and the depth command."""

import json
import shlex
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from da3_export.util.tensors import save_tensors
from da3_runtime.api.response import DepthResponse
from da3_runtime.commands.options import CLOSED_PIPE
from da3_runtime.errors import InferenceError
from da3_runtime.network_io import RawOutputs
from da3_runtime.postprocess.camera import Camera, Lens
from da3_runtime.postprocess.depth import NO_FOCAL, Depth, Prediction, prediction_of, resize_prediction
from da3_runtime.util.files import write_atomically
from da3_runtime.variants import Unit, find_variant
from tests.support.paths import NANO, PHOTOS, ROOT, SMALL
from tests.support.processes import clean_env, command, run_module

VARIANT = find_variant(NANO)


def raw(depth):
    depth = np.asarray(depth, np.float32)[None]
    return {"model": RawOutputs(depth, depth, None, np.eye(3)[None, None], np.eye(3, 4)[None, None])}


def test_main_series_depth_is_never_in_meters():
    assert prediction_of(raw([[[1.0, 2.0]]]), 0, VARIANT).depth.unit is Unit.RELATIVE


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_depth_that_is_not_finite_is_an_error(bad):
    with pytest.raises(InferenceError, match="not finite"):
        prediction_of(raw([[[1.0, bad]]]), 0, VARIANT)


def test_resizing_keeps_unit_and_range_and_moves_the_camera_along():
    depth = Depth(np.array([[1, 2], [3, 4]], np.float32), Unit.METERS)
    camera = Camera(np.array([[10, 0, 1], [0, 20, 1], [0, 0, 1]], np.float32), np.eye(3, 4))
    sky = np.array([[True, True], [False, False]])
    maps = {"confidence": depth.values + 1, "sky": sky}
    small = Prediction(depth, camera, maps, "exif", ["a warning"])
    big = resize_prediction(small, 7, 6)
    assert big.depth.values.shape == (6, 7)
    assert {name: values.shape for name, values in big.maps.items()} == dict.fromkeys(maps, (6, 7))
    assert big.depth.unit is Unit.METERS
    assert (big.depth.values.min(), big.depth.values.max()) == (1, 4)
    assert (big.maps["confidence"].min(), big.maps["confidence"].max()) == (2, 5)
    assert big.maps["sky"].all(axis=1).tolist() == [True] * 3 + [False] * 3
    np.testing.assert_allclose(big.camera.intrinsics, [[35, 0, 3.5], [0, 60, 3], [0, 0, 1]])
    assert (big.focal_source, big.warnings) == ("exif", ["a warning"])
    assert resize_prediction(small, 2, 2) == small
    for size in ((2, 2), (7, 6)):
        alone = resize_prediction(small, *size, maps=())
        assert alone.maps == {}
        assert alone.depth.values.shape == size[::-1]


METRIC = find_variant("da3metric-large")
LENS = Lens(np.array([[500, 0, 1], [0, 700, 1], [0, 0, 1]], np.float32), "intrinsics")


def metric_raw(sky):
    depth = np.arange(1, 1 + sky.size, dtype=np.float32).reshape(1, 1, *sky.shape)
    return {"model": RawOutputs(depth, sky=np.asarray(sky, np.float32)[None, None])}


def test_a_metric_network_returns_meters_only_if_the_focal_length_is_known():
    raw_outputs = metric_raw(np.zeros((4, 4)))
    known = prediction_of(raw_outputs, 0, METRIC, LENS)
    np.testing.assert_allclose(known.depth.values, raw_outputs["model"].depth[0, 0] * 2)  # 600 / 300
    assert (known.depth.unit, known.focal_source, known.warnings) == (Unit.METERS, "intrinsics", [])
    unknown = prediction_of(raw_outputs, 0, METRIC)
    np.testing.assert_allclose(unknown.depth.values, raw_outputs["model"].depth[0, 0])
    assert (unknown.depth.unit, unknown.focal_source) == (Unit.RELATIVE, None)
    assert unknown.warnings == [NO_FOCAL]
    assert "focal_length_px" in NO_FOCAL


def test_the_sky_map_is_thresholded():
    sky = np.zeros((8, 8))
    sky[:3] = 1
    predicted = prediction_of(metric_raw(sky), 0, METRIC, LENS)
    assert np.array_equal(predicted.maps["sky"], sky > 0.5)
    assert prediction_of(raw([[[1.0, 2.0]]]), 0, VARIANT).maps.keys() == {"confidence"}


@pytest.mark.parametrize("model", ["da3-small", "da3mono-large"])
def test_a_focal_length_that_cannot_scale_the_depth_is_the_cameras_and_said(model):
    outputs = metric_raw(np.zeros((4, 4))) if "mono" in model else raw([[[1.0, 2.0]]])
    given = prediction_of(outputs, 0, find_variant(model), LENS)
    without = prediction_of(outputs, 0, find_variant(model))
    assert np.array_equal(given.depth.values, without.depth.values)
    assert (given.depth.unit, given.focal_source) == (Unit.RELATIVE, None)
    assert given.warnings == [
        f"intrinsics does not change the depth of {model}; only the camera uses it."
    ]
    assert np.array_equal(given.camera.intrinsics, LENS.intrinsics)
    assert np.array_equal(given.camera.extrinsics, np.eye(3, 4))
    assert without.warnings == []


def test_the_camera_of_a_metric_network_is_the_lens_that_scaled_its_depth():
    known = prediction_of(metric_raw(np.zeros((4, 4))), 0, METRIC, LENS)
    assert np.array_equal(known.camera.intrinsics, LENS.intrinsics)
    assert np.array_equal(known.camera.extrinsics, np.eye(3, 4))
    assert prediction_of(metric_raw(np.zeros((4, 4))), 0, METRIC).camera is None


def test_an_atomic_write_replaces_whole_files_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    with pytest.raises(OSError):
        write_atomically(tmp_path / "missing" / "x", b"")


@pytest.mark.parametrize(
    "name", ["x" * 255, "\N{CJK UNIFIED IDEOGRAPH-6DF1}" * 85], ids=["ascii", "chinese"]
)
def test_a_file_may_have_the_longest_name_that_the_disk_accepts(tmp_path, name):
    write_atomically(tmp_path / name, b"data")
    save_tensors({"a": torch.zeros(1)}, tmp_path / name[:-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((name, name[:-1]))


def line_of(engine, out, *args, images=(PHOTOS / "temple.jpg",)):
    folder = ("--engine-dir", str(engine.engine_dir))
    return ["depth", *map(str, images), "--out", str(out), *folder, "--model", NANO, *args]


@pytest.fixture
def run_depth(run_here):
    def run(*args, images=(PHOTOS / "temple.jpg",), **env):
        return run_here("da3_runtime", *line_of(*args, images=images), **env)

    return run


def test_depth_writes_the_preview_and_prints_the_summary(engine, tmp_path):
    out = tmp_path / "a preview's name.png"
    done = run_module("da3_runtime", *line_of(engine, out))
    assert done.code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["model_id"], summary["head_type"]) == (NANO, "DualDPT")
    assert set(summary) - {"image", "preview"} <= set(DepthResponse.model_fields)
    assert summary["unit"] == "relative"
    assert (summary["width"], summary["height"]) == (640, 427)
    assert 0 < summary["min_depth"] < summary["max_depth"]
    assert summary["camera"]["intrinsics"][2] == [0, 0, 1]
    assert [row[2] for row in summary["camera"]["intrinsics"][:2]] == [320, 213.5]
    assert len(done.stdout.splitlines()) == 1
    assert summary["warnings"] == []
    assert list(summary["timings_ms"]) == [
        "load",
        "decode",
        "preprocess",
        "wait",
        "inference",
        "postprocess",
        "encode",
    ]
    assert all(value >= 0 for value in summary["timings_ms"].values())
    preview = cv2.imread(str(out), cv2.IMREAD_UNCHANGED)
    assert preview.shape == (427, 640)
    assert preview.dtype == np.uint8
    assert (preview.min(), preview.max()) == (0, 255)


def test_random_weights_give_a_depth_that_varies_over_a_photo(small_engine):
    from da3_runtime.inference.estimator import Estimator, Timings
    from da3_runtime.inference.settings import InferenceSettings
    from da3_runtime.store.settings import EngineSettings

    settings = EngineSettings(engine_dir=small_engine.engine_dir, model_id=SMALL)
    estimator = Estimator.load(settings, settings=InferenceSettings(processing_res=252))
    for name in ("temple.jpg", "coffee.jpg", "cat.jpg"):
        values = estimator.estimate((PHOTOS / name).read_bytes(), Timings()).depth.values
        assert values.std() / values.mean() >= 0.05


@pytest.mark.parametrize(
    ("args", "env", "message", "code"),
    [
        (["--outputs", "preview,mesh"], {}, "'mesh' is not one of: preview, depth_png16", 2),
        (["--outputs", " , "], {}, "at least one", 2),
        (["--color-map", "jet"], {}, "--color-map", 2),
        (["--focal-length-px", "-3"], {}, "--focal-length-px", 2),
        (["--focal-length-px", "nan"], {}, "--focal-length-px", 2),
        (["--out", "README.md/d.png"], {}, "README.md: ", 2),
        (["--out", "depth.jpg"], {}, ".png", 2),
        (["--model", "da3-tiny"], {}, "da3-small", 2),
        (["--head", "fpn"], {}, "HEAD", 2),
        (["--backend", "tpu"], {}, "BACKEND", 2),
        (["--processing-res", "5000"], {}, "PROCESSING_RES", 2),
        ([], {"MAX_IMAGE_BYTES": "100"}, "MAX_IMAGE_BYTES", 2),
        ([], {"MAX_IMAGE_PIXELS": "100"}, "MAX_IMAGE_PIXELS", 2),
        ([], {"THREADS": "many"}, "THREADS", 2),
    ],
)
def test_bad_input_is_one_sentence_that_names_it(engine, run_depth, tmp_path, args, env, message, code):
    done = run_depth(engine, tmp_path / "d.png", *args, **env)
    assert done.code == code
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["no/such.jpg"], "no/such.jpg: no such file"),
        (["README.md"], "none of the formats"),
        (["scripts"], "scripts contains no image"),
        (["examples/cat.jpg", "examples/temple.jpg"], "2 images need a folder"),
    ],
)
def test_an_invalid_image_is_one_sentence_that_names_it(engine, run_depth, tmp_path, images, message):
    done = run_depth(engine, tmp_path / "d.png", images=images)
    assert done.code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_every_output_of_one_image_can_be_read_back(engine, run_depth, tmp_path):
    outputs = "preview,color,depth_png16,depth_npz,confidence,sky,camera"
    done = run_depth(
        engine,
        tmp_path / "new",
        "--outputs",
        outputs,
        "--color-map",
        "viridis",
        "--processing-res",
        "140",
    )
    assert done.code == 0, done.stderr
    summary = json.loads(done.stdout)
    folder = tmp_path / "new"
    assert {path.name for path in folder.iterdir()} == {
        "temple.png", "temple.color.png", "temple.depth.png", "temple.depth.npz", "temple.confidence.png",
    }  # fmt: skip
    with np.load(summary["depth_npz"]) as archive:
        depth = archive["depth"]
    assert depth.shape == (427, 640)
    assert (depth.min(), depth.max()) == pytest.approx((summary["min_depth"], summary["max_depth"]))
    steps = cv2.imread(summary["depth_png16"], cv2.IMREAD_UNCHANGED)
    np.testing.assert_allclose(steps * summary["depth_scale"], depth, atol=summary["depth_scale"])
    confidence = cv2.imread(summary["confidence"], cv2.IMREAD_UNCHANGED) * summary["confidence_scale"]
    assert confidence.min() >= 0.999
    assert cv2.imread(summary["color"], cv2.IMREAD_UNCHANGED).shape == (427, 640, 3)
    assert summary["sky"] is None  # the model predicts no sky


def test_warnings_about_an_image_are_in_the_summary(engine, run_depth, tmp_path):
    wide = tmp_path / "wide.png"
    cv2.imwrite(str(wide), (np.arange(900 * 90).reshape(90, 900) % 1000).astype(np.uint16))
    done = run_depth(engine, tmp_path / "d.png", "--focal-length-px", "500", images=[wide])
    assert done.code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["warnings"] == [
        "The brightness range of the image was assumed: 0 is black, 1023 is white.",
        "The image is wide or tall: processing_res was raised from 168 to 766, so that the network sees "
        "84 pixels of the short side.",
        "focal_length_px does not change the depth of da3-nano; only the camera uses it.",
    ]
    intrinsics = [[500, 0, 450], [0, 500, 45], [0, 0, 1]]
    np.testing.assert_allclose(summary["camera"]["intrinsics"], intrinsics, rtol=1e-5)


def test_one_failed_image_does_not_stop_the_others(engine, run_depth, tmp_path):
    photos = tmp_path / "photos"
    (photos / "deep").mkdir(parents=True)
    (photos / "deep" / "cat.jpg").write_bytes((PHOTOS / "cat.jpg").read_bytes())
    (photos / "a bad one.png").write_bytes(b"not an image")
    (photos / "notes.txt").write_text("no image")
    (photos / "coffee.jpg").write_bytes((PHOTOS / "coffee.jpg").read_bytes())
    done = run_depth(
        engine, tmp_path / "out", "--model-size", "--processing-res", "140", images=[photos]
    )
    assert done.code == 1
    assert "per second: 2 done, 1 failed." in done.stderr
    summaries = {line["image"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert "none of the formats" in summaries[str(photos / "a bad one.png")]["error"]
    cat = summaries[str(photos / "deep" / "cat.jpg")]
    assert cat["preview"] == str(tmp_path / "out" / "deep" / "cat.png")
    assert (cat["width"], cat["height"]) == (140, 98)
    assert cv2.imread(cat["preview"], cv2.IMREAD_UNCHANGED).shape == (98, 140)
    assert (tmp_path / "out" / "coffee.png").exists()


def test_pretty_indents_a_block_for_each_image(engine, run_depth, tmp_path):
    done = run_depth(engine, tmp_path / "a.png", "--pretty")
    assert json.loads(done.stdout)["model_id"] == NANO
    assert len(done.stdout.splitlines()) > 10
    assert "[ 0.0, 0.0, 1.0 ]" in done.stdout


def test_the_only_image_has_a_line_even_if_it_fails(engine, run_depth, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"x")
    done = run_depth(engine, tmp_path / "out", images=[bad])
    line = json.loads(done.stdout)
    assert (done.code, line["image"]) == (2, str(bad))
    assert f"error: {line['error']}" in done.stderr


def test_images_of_one_stem_are_both_answered_and_the_skipped_are_counted(engine, run_depth, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, photo in (("a.jpg", "cat.jpg"), ("a.png", "temple.jpg")):
        (photos / name).write_bytes((PHOTOS / photo).read_bytes())
    for name in ("notes.txt", "more.txt", "._a.jpg"):
        (photos / name).write_bytes(b"")
    done = run_depth(engine, photos / "depth", images=[photos])
    assert (done.code, done.stderr.splitlines()[0]) == (0, "Skipped in the folders: 2 .txt.")
    summaries = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(each["preview"]).name for each in summaries] == ["a.jpg.png", "a.png.png"]
    assert [(each["width"], each["height"]) for each in summaries] == [(451, 300), (640, 427)]


def test_the_reader_of_the_lines_may_stop_early(engine, tmp_path):
    line = shlex.join(command("da3_runtime", "depth", *map(str, [PHOTOS / "cat.jpg"] * 2)))
    options = f"--out {tmp_path} --engine-dir {engine.engine_dir} --model {NANO}"
    script = f"set -o pipefail; {line} {PHOTOS / 'temple.jpg'} {options} | true"
    done = subprocess.run(
        ["bash", "-c", script], env=clean_env(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (CLOSED_PIPE, "")
    assert not (tmp_path / ".manifest.unfinished").exists()


def test_a_result_whose_name_is_too_long_is_one_sentence(engine, run_depth, tmp_path):
    photo = tmp_path / f"{'x' * 247}.jpg"
    photo.write_bytes((PHOTOS / "cat.jpg").read_bytes())
    done = run_depth(engine, tmp_path / "out", images=[photo])
    assert done.code == 0, done.stderr
    done = run_depth(engine, tmp_path / "out", "--outputs", "confidence", images=[photo])
    assert done.code == 2
    assert done.stderr.endswith("is longer than the disk accepts; rename the image.\n")


def test_an_image_is_never_written_over(engine, run_depth, tmp_path):
    image = tmp_path / "photo.png"
    cv2.imwrite(str(image), np.zeros((40, 40, 3), np.uint8))
    before = image.read_bytes()
    for out, message in ((image, "is one of the images"), (tmp_path, "is one of the images")):
        done = run_depth(engine, out, images=[image])
        assert (done.code, image.read_bytes()) == (2, before)
        assert f"photo.png {message}" in done.stderr
