"""The Python API with the bundled model: its engine, and PyTorch."""

import doctest
import io
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import da3_runtime as da3
import da3_runtime.inference.model
from da3_runtime.inference.estimator import Estimator, Timings
from da3_runtime.output.files import ENDINGS
from da3_runtime.settings import GROUPS, Settings
from da3_runtime.util.setting_group import settings_of_group
from da3_runtime.variants import Unit
from tests.support.paths import NANO, PHOTOS, ROOT

CAT = PHOTOS / "cat.jpg"


@pytest.fixture(scope="module", params=["onnxruntime-cpu", "eager"])
def model(engine, request):
    with da3.load(NANO, engine_dir=engine.engine_dir, backend=request.param) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def fast(engine):
    """The model with its engine only."""
    with da3.load(NANO, engine_dir=engine.engine_dir, backend="onnxruntime-cpu") as loaded:
        yield loaded


@pytest.mark.parametrize("module", [da3, da3_runtime.inference.model], ids=lambda each: each.__name__)
def test_the_documented_examples_run(engine, module, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ENGINE_DIR", str(engine.engine_dir))
    result = doctest.testmod(module)
    assert (result.attempted > 0, result.failed) == (True, 0)


def test_a_result_describes_its_numbers(model):
    depth = model.depth(CAT)
    with Image.open(CAT) as photo:
        assert depth.values.shape == photo.size[::-1]
    assert (depth.values.dtype, depth.unit, depth.focal_source) == (np.float32, Unit.RELATIVE, None)
    assert depth.confidence.shape == depth.values.shape
    assert depth.confidence.min() >= 0.99
    assert depth.sky is None
    assert depth.camera.intrinsics.shape == (3, 3)
    assert depth.camera.extrinsics.shape == (3, 4)
    assert depth.warnings == []
    assert (depth.model_id, depth.backend, depth.precision) == (NANO, model.backend, "fp32")
    assert list(depth.timings_ms) == ["decode", "preprocess", "wait", "inference", "postprocess"]


def test_every_kind_of_image_gives_the_same_depth(model):
    expected = model.depth(CAT).values
    with Image.open(CAT) as photo:
        assert np.array_equal(model.depth(str(CAT)).values, expected)
        assert np.array_equal(model.depth(CAT.read_bytes()).values, expected)
        np.testing.assert_allclose(model.depth(photo).values, expected, rtol=1e-3)
        np.testing.assert_allclose(model.depth(np.asarray(photo)).values, expected, rtol=1e-3)


def test_orientation_and_focal_length_of_a_pillow_image_come_from_its_exif(fast):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x8769] = {0xA405: 26}
    stream = io.BytesIO()
    with Image.open(CAT) as photo:
        photo.save(stream, "JPEG", exif=exif)
    with Image.open(stream) as photo:
        width, height = photo.size
        assert fast.depth(photo).values.shape == (width, height)
        seen = da3_runtime.inference.model.photo_of_image(photo, 10**8)
    assert seen.focal_px == pytest.approx(26 / np.hypot(36, 24) * np.hypot(width, height))


@pytest.mark.parametrize("max_batch", [1, 2, 8])
def test_a_list_runs_in_batches_of_one_size_and_keeps_its_order(engine, max_batch, monkeypatch):
    names = ["cat", "coffee", "cat", "temple", "cat", "coffee"]
    with da3.load(NANO, engine_dir=engine.engine_dir, max_batch=max_batch, processing_res=140) as model:
        alone = {name: model.depth(PHOTOS / f"{name}.jpg").values for name in names}
        batches = []
        run = model._estimator.loaded.backend.run
        monkeypatch.setattr(
            model._estimator.loaded.backend,
            "run",
            lambda images, conditions: batches.append(images.shape) or run(images, conditions),
        )
        depths = model.depth([PHOTOS / f"{name}.jpg" for name in names])
    for name, depth in zip(names, depths, strict=True):
        np.testing.assert_allclose(depth.values, alone[name], rtol=1e-4)
        assert set(depth.timings_ms) == {"decode", "preprocess", "inference", "postprocess"}
    assert sum(shape[0] for shape in batches) == len(names)
    by_size = {}
    for count, *size in batches:
        by_size.setdefault(tuple(size), []).append(count)
    for counts in by_size.values():
        assert all(count == max_batch for count in counts[:-1]), "every batch but a size's last is full"
        assert counts[-1] <= max_batch


def test_few_photos_of_a_long_list_are_in_memory(fast, monkeypatch):
    alive, most = [0], [0]
    lock = threading.Lock()
    prepare = Estimator.prepare

    def count(change):
        with lock:
            alive[0] += change
            most[0] = max(most[0], alive[0])

    def counting(self, photo, *args):
        count(1)
        try:
            return prepare(self, photo, *args)
        finally:
            count(-1)

    monkeypatch.setattr(Estimator, "prepare", counting)
    assert len(fast.depth([CAT] * 70, processing_res=140, model_size=True)) == 70
    assert most[0] <= 4


def test_an_empty_list_is_an_empty_list(fast):
    assert fast.depth([]) == []


def test_arguments_are_those_of_a_request(fast):
    small = fast.depth(CAT, processing_res=140, model_size=True)
    assert max(small.values.shape) == 140
    with pytest.raises(da3.SettingError, match="processing_res must be from 84 to 1036"):
        fast.depth(CAT, processing_res=83)
    for wrong in (0, float("nan"), -1, 1e7):
        with pytest.raises(da3.SettingError, match="focal_length_px must be from 1 to 1e6"):
            fast.depth(CAT, focal_length_px=wrong)
    right = [[500, 0, 250], [0, 500, 150], [0, 0, 1]]
    assert fast.depth(CAT, intrinsics=right, focal_length_px=400).unit == "relative"
    for wrong in (right[:2], [[0.5, 0, 0], [0, 500, 0], [0, 0, 1]], "x", [[500, 0, 0], [1, 500, 0], [0, 0, 1]],
                  [[np.inf, 0, 0], [0, 500, 0], [0, 0, 1]], [[500, 0, 0], [0, 500, 0], [0, 0, 2]]):  # fmt: skip
        with pytest.raises(da3.SettingError, match="intrinsics must be"):
            fast.depth(CAT, intrinsics=wrong)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (ROOT / "no" / "such.jpg", "such.jpg: No such file"),
        (ROOT / "README.md", "README.md: The image is in none of the formats"),
        (b"", "empty"),
        (np.zeros((4, 4), np.uint8), r"uint8 \[4, 4\]; give RGB"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (5, "cannot be of type int"),
    ],
)
def test_an_image_that_cannot_be_read_is_one_sentence(fast, image, message):
    for given in (image, [image]):
        with pytest.raises(da3.ImageError, match=message):
            fast.depth(given)


def test_limits_hold_for_every_kind_of_image(engine):
    with (
        da3.load(NANO, engine_dir=engine.engine_dir, max_image_pixels=1000) as model,
        Image.open(CAT) as photo,
    ):
        for image in (CAT, CAT.read_bytes(), photo, np.asarray(photo)):
            with pytest.raises(da3.ImageError, match="MAX_IMAGE_PIXELS"):
                model.depth(image)


def test_own_files_have_larger_limits_than_a_servers(fast):
    assert fast._max_pixels == 100_000_000
    assert Settings.from_env({}).images.max_image_pixels == 25_000_000
    assert 5712 * 4284 < 25_000_000  # a photo of 24 megapixels
    given = Settings.from_env({"MAX_IMAGE_PIXELS": "7"}, own_files=True).images
    assert (given.max_image_pixels, given.max_image_bytes) == (7, 2**29)


def test_every_saved_file_describes_itself(fast, tmp_path):
    depth = fast.depth(CAT)
    saved = depth.save(tmp_path / "a.b.depth.png")
    with Image.open(saved) as png:
        scale = float(png.text["depth_scale"])
        assert (png.mode, png.text["unit"]) == ("I;16", "relative")
        np.testing.assert_allclose(np.asarray(png) * scale, depth.values, atol=scale)
    with np.load(depth.save(tmp_path / "a.depth.npz")) as archive:
        assert np.array_equal(archive["depth"], depth.values)
    with Image.open(depth.save(str(tmp_path / "A.CONFIDENCE.PNG"))) as png:
        scale = float(png.text["confidence_scale"])
        np.testing.assert_allclose(np.asarray(png) * scale, depth.confidence, atol=scale)
    with Image.open(depth.save(tmp_path / "a.png")) as png:
        assert (png.mode, png.size) == ("L", depth.values.shape[::-1])
    with Image.open(depth.save(tmp_path / "a.color.png")) as png:
        assert png.mode == "RGB"


def test_an_output_that_cannot_be_saved_is_one_sentence(fast, tmp_path):
    depth = fast.depth(CAT)
    with pytest.raises(da3.SettingError, match=r"a\.jpg: the ending selects no output") as caught:
        depth.save(tmp_path / "a.jpg")
    assert all(ending in str(caught.value) for ending in ENDINGS.values())
    with pytest.raises(da3.SettingError, match="da3-nano has no sky map"):
        depth.save(tmp_path / "a.sky.png")
    with pytest.raises(da3.SettingError, match="No such file or directory"):
        depth.save(tmp_path / "no folder" / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_shows_the_preview_with_unit_and_range(fast):
    depth = fast.depth(CAT)
    assert depth._repr_png_().startswith(b"\x89PNG")
    html = depth._repr_html_()
    low, high = depth.values.min(), depth.values.max()
    assert f"depth {low:.3g} to {high:.3g} (relative)" in html
    assert 'src="data:image/png;base64,iVBOR' in html
    assert repr(depth).startswith("<ImageDepth 451 x 300, depth ")
    assert "\n" not in repr(depth) + repr(fast)


def test_threads_may_share_a_model(fast):
    expected = [fast.depth(PHOTOS / name).values for name in ("cat.jpg", "coffee.jpg")]
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(fast.depth, PHOTOS / name) for name in ("cat.jpg", "coffee.jpg") * 6]
        for index, answer in enumerate(asked):
            np.testing.assert_allclose(answer.result(60).values, expected[index % 2], rtol=1e-4)


def test_a_closed_model_raises_a_clear_error(engine):
    model = da3.load(NANO, engine_dir=engine.engine_dir)
    model.close()
    model.close()
    assert "closed" in repr(model)
    with pytest.raises(da3.InferenceError, match="The model is closed"):
        model.depth(CAT)


def test_a_photo_that_reaches_a_closed_model_raises_the_same_error(engine):
    """A thread may be decoding while another one closes the model."""
    with da3.load(NANO, engine_dir=engine.engine_dir, backend="onnxruntime-cpu") as model:
        estimator = model._estimator
    with pytest.raises(da3.InferenceError, match=r"^The model is closed; load it again\.$"):
        estimator.estimate(CAT.read_bytes(), Timings())


def test_results_are_compared_by_identity(fast):
    depth = fast.depth(CAT)
    assert depth == depth
    assert depth != fast.depth(CAT)
    assert depth in {depth}


def test_variables_of_a_server_do_not_concern_a_model(engine, monkeypatch):
    monkeypatch.setenv("PORT", "abc")
    with da3.load(NANO, engine_dir=engine.engine_dir, backend="onnxruntime-cpu") as model:
        assert model.model_id == NANO


def test_options_are_the_settings_of_the_same_name():
    names = {
        each.name
        for group in ("engine", "images", "inference")
        for each in settings_of_group(GROUPS[group])
    }
    assert set(da3.ModelOptions.__annotations__) == names - {"model_id"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thread": 1}, "thread is not an option of load; the options are: head, "),
        ({"port": 80}, "port is not an option"),
        ({"threads": -1}, "threads must be a whole number from 0 to 1024, not -1"),
        ({"backend": "tpu"}, "BACKEND 'tpu' is not one of"),
        ({"head": "fpn"}, "HEAD 'fpn' is not a known head"),
        ({"max_image_pixels": 0}, "max_image_pixels must be"),
        ({"weights": ROOT / "README.md"}, "WEIGHTS"),
    ],
)
def test_a_wrong_option_is_one_sentence(options, message, tmp_path):
    with pytest.raises(da3.DA3Error, match=message):
        da3.load(NANO, engine_dir=tmp_path, **options)


def test_an_option_overrides_the_environment(monkeypatch):
    seen = []
    monkeypatch.setattr(
        da3_runtime.inference.model.Model, "__init__", lambda _, *groups: seen.append(groups)
    )
    for name, value in {
        "MODEL_ID": "da3-base",
        "HEAD": "sdt",
        "THREADS": "2",
        "MAX_IMAGE_BYTES": "9",
    }.items():
        monkeypatch.setenv(name, value)
    da3.load()
    da3.load(NANO, head="dpt", threads=3)
    (first, images, _), (second, *_) = seen
    assert (first.model_id, first.head, first.threads, images.max_image_bytes) == (
        "da3-base",
        "sdt",
        2,
        9,
    )
    assert (second.model_id, second.head, second.threads) == (NANO, "dpt", 3)
    monkeypatch.undo()
    assert Settings.from_env({}).engine.model_id == "da3-small"


def test_importing_the_package_is_light():
    heavy = "{'numpy', 'pydantic', 'PIL', 'cv2', 'onnxruntime', 'torch'}"
    code = (
        "import sys, da3_runtime as da3, json, os\n"
        f"print(json.dumps([sorted({heavy} & set(sys.modules)), os.environ['ORT_DISABLE_TELEMETRY'],\n"
        "  da3.Model.__name__, da3.ImageDepth.__name__, hasattr(da3, 'nothing')]))"
    )
    env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [[], "1", "Model", "ImageDepth", False]


BLOCK = """
import importlib.abc, importlib.util, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.partition(".")[0] in BLOCKED else find_spec(name, *more)
sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize(
    ("blocked", "options", "message"),
    [
        (
            {"onnxruntime", "torch", "tensorrt", "tensorrt_lean", "tensorrt_rtx"},
            {},
            'No installed package can run da3-nano: pip install "da3-runtime[cpu]"',
        ),
        ({"onnxruntime"}, {"backend": "onnxruntime-cpu"}, 'pip install "da3-runtime[cpu]"'),
        ({"onnxruntime"}, {"backend": "onnxruntime-cuda"}, 'pip install "da3-runtime[gpu]"'),
        ({"tensorrt_rtx"}, {"backend": "tensorrt-rtx"}, 'pip install "da3-runtime[tensorrt-rtx]"'),
    ],
)
def test_a_missing_extra_is_one_sentence_that_names_it(engine, blocked, options, message):
    code = f"BLOCKED = {blocked!r}\n{BLOCK}\nimport da3_runtime as da3\ntry:\n  da3.load({NANO!r}, engine_dir={str(engine.engine_dir)!r}, **{options!r})\nexcept da3.DA3Error as error:\n  print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert message in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1
