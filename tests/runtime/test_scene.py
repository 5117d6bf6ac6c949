"""Several photos of one scene: the network sees them together, whatever their shapes."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image

import da3_runtime as da3
import da3_runtime.backends.onnxruntime
from da3_runtime.backends.base import MAX_TOKENS, tokens_of
from da3_runtime.errors import OutOfMemoryError, SceneTooLargeError, SettingError
from da3_runtime.image.decode import decode_photo
from da3_runtime.inference.estimator import Estimator, Timings
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.inference.scene import Crop, common_crops, reference_index
from da3_runtime.inference.settings import InferenceSettings
from da3_runtime.network_io import CHOOSE, Conditions, RawOutputs
from da3_runtime.postprocess.camera import centered_lens
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.variants import Head, Unit, find_variant
from tests.support.paths import NANO, PHOTOS, SMALL
from tests.support.processes import run_module

NAMES = ("temple.jpg", "coffee.jpg", "cat.jpg")
FILES = [PHOTOS / name for name in NAMES]
RES = 140


@pytest.fixture(scope="module")
def load(engine, small_engine):
    folders = {NANO: engine, SMALL: small_engine}

    def load(model, **options):
        folder = folders[model].engine_dir
        return da3.load(model, engine_dir=folder, processing_res=RES, **options)

    return load


@pytest.fixture(scope="module")
def scene(load):
    with load(SMALL, backend="onnxruntime-cpu") as model:
        return model.scene(FILES)


def photos():
    limits = {"max_bytes": 2**27, "max_pixels": 10**8}
    return [decode_photo(file.read_bytes(), **limits) for file in FILES]


def test_engine_and_eager_give_a_scene_the_same_depths_and_cameras(load, scene):
    with load(SMALL, backend="eager") as model:
        eager = model.scene(FILES)
    assert eager.reference == scene.reference
    for one, other in zip(scene, eager, strict=True):
        np.testing.assert_allclose(one.values, other.values, rtol=1e-3)
        np.testing.assert_allclose(one.camera.intrinsics, other.camera.intrinsics, rtol=1e-3)
        np.testing.assert_allclose(one.camera.extrinsics, other.camera.extrinsics, atol=1e-3)


def test_a_scene_of_one_photo_is_the_photo(load):
    with load(SMALL) as model:
        (view,) = model.scene(FILES[:1])
        alone = model.depth(FILES[0])
    np.testing.assert_array_equal(view.values, alone.values)
    np.testing.assert_array_equal(view.camera.extrinsics, alone.camera.extrinsics)


def test_the_views_of_a_scene_see_each_other(load, scene):
    with load(SMALL) as model:
        alone = model.depth(FILES[0])
    assert np.abs(scene[0].values / alone.values - 1).mean() > 1e-3


@pytest.mark.parametrize(("reference", "index"), [("first", 0), ("Middle", 1), (2, 2), ("2", 2)])
def test_the_reference_may_be_given(load, scene, reference, index):
    with load(SMALL) as model:
        given = model.scene(FILES, reference=reference)
    assert given.reference == index
    same = np.array_equal(given[0].values, scene[0].values)
    assert same == (index == scene.reference)


def test_a_reference_that_is_none_is_one_sentence():
    assert reference_index("auto", 3) == CHOOSE
    for wrong in ("last", 3, -1, "", "1.0", True, None):
        with pytest.raises(
            SettingError, match=r"is not one of: auto, first, middle, or an index from 0 to 2"
        ):
            reference_index(wrong, 3)


def test_a_crop_moves_the_camera_and_is_said(load):
    tall = Image.open(FILES[0]).rotate(90, expand=True)
    with load(SMALL) as model:
        wide, high = model.scene([FILES[0], tall], focal_length_px=500)
    # 98 x 98 pixels of 140 x 98 and of 98 x 140.
    assert (wide.values.shape, high.values.shape) == ((427, 448), (448, 427))
    assert (wide.crop, high.crop) == ((96, 0), (0, 96))
    for view, of in ((wide, "448 x 427 of 640 x 427"), (high, "427 x 448 of 427 x 640")):
        height, width = view.values.shape
        np.testing.assert_allclose(view.camera.intrinsics[:2, 2], [width / 2, height / 2], atol=0.5)
        np.testing.assert_allclose(view.camera.intrinsics[(0, 1), (0, 1)], 500, rtol=1e-4)
        assert any(f"the maps cover the middle {of} pixels" in each for each in view.warnings)


def test_maps_may_have_the_size_of_the_networks_input(load):
    with load(SMALL) as model:
        views = model.scene(FILES, model_size=True)
    assert {view.values.shape for view in views} == {(98, 140)}


def test_da3_nano_says_that_its_cameras_of_a_scene_mean_nothing(load, scene):
    with load(NANO) as model:
        (warning,) = model.scene(FILES).warnings
    assert warning == (
        "da3-nano is too small to find the cameras of a scene: they mean nothing, and the scale of given "
        "ones is rough."
    )
    assert not any("too small" in warning for warning in scene.warnings)


@pytest.mark.parametrize("wrong", ["photo.jpg", b"", [], FILES[0]])
def test_what_is_no_list_of_photos_is_one_sentence(load, wrong):
    with load(NANO) as model, pytest.raises(SettingError, match="a list of at least one photo"):
        model.scene(wrong)


def test_an_elongated_photo_is_named_by_its_index(load):
    strip = np.zeros((20, 2000, 3), np.uint8)
    with load(NANO) as model, pytest.raises(da3.ImageError, match=r"images\[1\]: .* too elongated"):
        model.scene([FILES[0], strip])


def test_a_scene_that_does_not_fit_is_refused_before_it_runs(load, monkeypatch):
    tokens = 2 * tokens_of(98, 140)
    limit = 4 * 5 * tokens**2
    monkeypatch.setattr(da3_runtime.backends.onnxruntime, "_MOST_SCORE_BYTES", limit)
    with load(NANO, backend="onnxruntime-cpu") as model:
        assert len(model.scene(FILES[:2])) == 2
        with pytest.raises(SceneTooLargeError) as caught:
            model.scene(FILES)
    assert caught.value.status == 507
    assert str(caught.value) == (
        "The scene has 3 views of 140 x 98 pixels, and onnxruntime-cpu takes at most 2 of this size: send "
        "fewer photos, or a smaller processing_res."
    )


def known_cameras(scene, scale=1.0):
    """The cameras that a scene was given, in another unit."""
    return [(view.camera.intrinsics, view.camera.extrinsics * [1, 1, 1, scale]) for view in scene]


def test_known_cameras_are_returned_and_give_the_depth_their_unit(load, scene):
    with load(SMALL, backend="onnxruntime-cpu") as model, load(SMALL, backend="eager") as eager:
        one, ten = (model.scene(FILES, cameras=known_cameras(scene, scale)) for scale in (100, 1000))
        other = eager.scene(FILES, cameras=known_cameras(scene, 100))
    assert one.reference == 0
    for view, larger, same, before in zip(one, ten, other, scene, strict=True):
        assert (view.unit, view.focal_source, len(view.warnings)) == (
            Unit.CAMERAS,
            None,
            len(before.warnings),
        )
        np.testing.assert_allclose(view.camera.intrinsics, before.camera.intrinsics, rtol=1e-5)
        np.testing.assert_allclose(view.camera.extrinsics[:, :3], before.camera.extrinsics[:, :3])
        # The network sees the same whatever the unit is.
        np.testing.assert_allclose(larger.values, 10 * view.values, rtol=1e-3)
        np.testing.assert_allclose(same.values, view.values, rtol=2e-3)
        assert not np.allclose(
            view.values / view.values.mean(), before.values / before.values.mean(), rtol=1e-4
        )


def test_cameras_far_from_their_world_s_origin_are_as_exact_as_near_ones(load, scene):
    near = [
        (lens, np.c_[cv2.Rodrigues(cv2.Rodrigues(pose[:, :3])[0])[0], pose[:, 3]])
        for lens, pose in known_cameras(scene, 100)
    ]
    shift = np.array([5e5, 5e6, 300])
    far = [(lens, np.c_[pose[:, :3], pose[:, 3] - pose[:, :3] @ shift]) for lens, pose in near]
    with load(SMALL, backend="onnxruntime-cpu") as model:
        one, other = (model.scene(FILES, cameras=cameras) for cameras in (near, far))
    for view, same, (_, pose) in zip(one, other, far, strict=True):
        np.testing.assert_allclose(same.values, view.values, rtol=1e-3)
        np.testing.assert_array_equal(same.camera.extrinsics, pose)


def test_a_scene_json_is_a_file_of_known_cameras(engine, load, scene, tmp_path, run_here):
    path = tmp_path / "scene.json"
    views = [
        {
            "image": name,
            "width": view.values.shape[1],
            "height": view.values.shape[0],
            "intrinsics": lens.tolist(),
            "extrinsics": pose.tolist(),
        }
        for name, view, (lens, pose) in zip(NAMES, scene, known_cameras(scene, 100), strict=True)
    ]
    path.write_text(json.dumps({"views": views[::-1]}))
    done = run_here(
        *line_of(engine, *FILES, "--cameras", path, "--out", tmp_path / "out", "--outputs", "depth_npz")
    )
    assert done.code == 0, done.stderr
    with da3.load(NANO, engine_dir=engine.engine_dir) as model:
        wanted = model.scene(FILES, cameras=path)
    for view, each in zip(json.loads(done.stdout)["views"], wanted, strict=True):
        assert view["unit"] == "cameras"
        assert view["max_depth"] == pytest.approx(float(each.values.max()), rel=1e-4)
        np.testing.assert_allclose(view["extrinsics"], each.camera.extrinsics, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda known: known[:2], "cameras has 2 of 3 photos: pass one for each."),
        (lambda known: [(known[0][0], np.eye(3)), *known[1:]], "extrinsics must be [R | t]"),
        (lambda known: [(np.eye(3), known[0][1]), *known[1:]], None),
        (lambda known: [(np.zeros((3, 3)), known[0][1]), *known[1:]], "intrinsics must be"),
        (lambda known: known[:1] * 3, "all cameras at one place"),
    ],
)
def test_cameras_that_cannot_be_used_are_refused(load, scene, change, message):
    cameras = change(known_cameras(scene, 100))
    with load(SMALL, backend="onnxruntime-cpu") as model:
        if message is None:
            assert model.scene(FILES, cameras=cameras)[0].unit is Unit.CAMERAS
            return
        with pytest.raises(SettingError) as caught:
            model.scene(FILES, cameras=cameras)
    assert message in str(caught.value)


def test_known_cameras_leave_no_choice_and_need_names_for_a_file(load, scene, tmp_path):
    known = known_cameras(scene, 100)
    with load(SMALL, backend="onnxruntime-cpu") as model:
        with pytest.raises(SettingError, match="leave reference out"):
            model.scene(FILES, cameras=known, reference=1)
        with pytest.raises(SettingError, match="leave focal_length_px and intrinsics out"):
            model.scene(FILES, cameras=known, focal_length_px=500)
        with pytest.raises(SettingError, match="pass photos as paths"):
            model.scene([file.read_bytes() for file in FILES], cameras=tmp_path)


def test_a_photo_with_extrinsics_needs_a_lens_and_a_model_that_sees_scenes():
    pose = np.tile(np.eye(3, 4), (3, 1, 1))
    pose[:, 0, 3] = (0, 1, 2)
    pictures = photos()
    with pytest.raises(
        SettingError, match=r"images\[0\]: extrinsics need intrinsics or focal_length_px"
    ):
        estimator_of(Network()).estimate_scene(pictures, Timings(), extrinsics=pose)
    folder = EngineFolder(find_variant("da3metric-large"), Head.DPT, None, None)
    metric = Estimator(Loaded(folder, {"model": Network()}, []))
    with pytest.raises(SettingError, match="da3metric-large sees each photo alone and cannot use"):
        metric.estimate_scene(pictures, Timings(), extrinsics=pose)


class Network:
    """A network whose depth is the number of views, plus the wanted reference."""

    name, precision, trained, gains_from_batches = "stand-in", "fp32", True, True
    parity = "verified"

    def __init__(self, room=8):
        self.room, self.batches = room, []

    def largest_batch(self, views, height, width):
        return int(views * tokens_of(height, width) <= MAX_TOKENS) * 8

    def run(self, images, conditions):
        self.batches.append(images.shape)
        scenes, views, *size, _ = images.shape
        if scenes * views > self.room:
            raise OutOfMemoryError("The GPU has too little free memory.")
        depth = (
            np.full((scenes, views, *size), views, np.float32)
            + conditions.reference[:, None, None, None]
            + 2
        )
        lens = np.broadcast_to(np.eye(3, dtype=np.float32), (scenes, views, 3, 3))
        return RawOutputs(
            depth, depth, None, lens, lens[..., (0, 1, 2, 2)], reference=conditions.reference
        )

    def free(self):
        pass


def wanted(reference, views=3):
    conditions = Conditions.none(1, views)
    conditions.reference[:] = reference
    return conditions


def estimator_of(network, **settings):
    folder = EngineFolder(find_variant(SMALL), Head.DPT, None, None)
    loaded = Loaded(folder, {"model": network}, [])
    return Estimator(loaded, settings=InferenceSettings(processing_res=RES, **settings))


def test_scenes_of_one_shape_share_a_batch_and_keep_their_references():
    network = Network(room=64)
    batcher = estimator_of(network)._batcher
    images = np.zeros((1, 3, 98, 140, 3), np.uint8)
    with batcher.expect() as one, batcher.expect() as other:
        one.image, one.conditions = images, wanted(0)
        other.image, other.conditions = images, wanted(2)
        batcher._run_together([one, other])
    assert network.batches == [(2, 3, 98, 140, 3)]
    assert [each.outcome.raw["model"].reference[each.outcome.position] for each in (one, other)] == [
        0,
        2,
    ]


def test_a_scene_that_lacks_memory_is_never_split():
    network = Network(room=2)
    with pytest.raises(OutOfMemoryError) as caught:
        estimator_of(network).estimate_scene(photos(), Timings())
    assert caught.value.status == 507
    assert {shape[1] for shape in network.batches} == {3}


def test_a_metric_model_gives_a_scene_one_sky_and_each_photo_its_own_lens():
    class Metric(Network):
        def run(self, images, conditions):
            raw = super().run(images, conditions)
            depth = raw.depth * np.arange(1, 4, dtype=np.float32)[None, :, None, None]
            sky = np.zeros_like(depth)
            sky[:, :, :20] = 1
            return RawOutputs(depth, sky=sky)

    folder = EngineFolder(find_variant("da3metric-large"), Head.DPT, None, None)
    estimator = Estimator(
        Loaded(folder, {"model": Metric()}, []), settings=InferenceSettings(processing_res=RES)
    )
    pictures = photos()
    lenses = [centered_lens(600, *photo.rgb.shape[1::-1], "focal_length_px") for photo in pictures]
    estimate = estimator.estimate_scene(pictures, Timings(), lenses=[*lenses[:2], None], model_size=True)
    assert estimate.reference is None
    assert [view.prediction.depth.unit for view in estimate.views] == [
        Unit.METERS,
        Unit.METERS,
        Unit.RELATIVE,
    ]
    far = [view.prediction.depth.values[0, 0] for view in estimate.views]
    sizes = [photo.rgb.shape[:2] for photo in pictures[:2]]
    scales = [600 * (140 / width + 98 / height) / 2 / 300 for height, width in sizes]
    np.testing.assert_allclose(far, [4 * 3 * scales[0], 4 * 3 * scales[1], 4 * 3], rtol=0.01)


def test_crops_are_the_middle_of_what_all_have():
    assert common_crops([(140, 98), (98, 140), (126, 126)]) == [
        Crop(21, 0, 98, 98),
        Crop(0, 21, 98, 98),
        Crop(14, 14, 98, 98),
    ]


def line_of(engine, *args):
    folder = ("--engine-dir", str(engine.engine_dir), "--model", NANO)
    return ["da3_runtime", "scene", *map(str, args), *folder]


def test_the_command_writes_every_camera_and_the_outputs_of_every_photo(engine, tmp_path):
    out = tmp_path / "out"
    done = run_module(
        *line_of(engine, *FILES, "--out", out, "--reference", "1", "--outputs", "preview,depth_npz")
    )
    assert done.code == 0, done.stderr
    scene = json.loads(done.stdout)
    assert json.loads((out / "scene.json").read_text()) == scene
    assert {path.name for path in out.iterdir()} == {
        "scene.json", *(f"{name[:-4]}{ending}" for name in NAMES for ending in (".png", ".depth.npz")),
    }  # fmt: skip
    assert (scene["reference"], scene["model_id"], scene["license"]) == (1, NANO, "MIT")
    for view, file in zip(scene["views"], FILES, strict=True):
        width, height = Image.open(file).size
        assert (view["image"], view["width"], view["height"]) == (str(file), width, height)
        assert view["crop"] == [0, 0, width, height]
        np.testing.assert_allclose(
            np.array(view["intrinsics"])[:2, 2], [width / 2, height / 2], atol=0.5
        )
        assert np.array(view["extrinsics"]).shape == (3, 4)
        assert view["unit"] == "relative"


def test_the_command_takes_a_folder(engine, tmp_path, run_here):
    folder = tmp_path / "photos"
    folder.mkdir()
    for file in FILES[:2]:
        (folder / file.name).write_bytes(file.read_bytes())
    done = run_here(*line_of(engine, folder, "--out", tmp_path / "out"))
    assert [view["image"] for view in json.loads(done.stdout)["views"]] == [
        str(folder / name) for name in sorted(NAMES[:2])
    ]


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["--out", "x.png", *FILES], 2, "--out x.png: a scene needs a folder"),
        (["--out", "x", "--reference", "3", *FILES], 2, "reference '3' is not one of"),
        (["--out", "x", "--outputs", "depht", *FILES], 2, "'depht' is not one of"),
        (["--out", "x", "none.jpg"], 2, "none.jpg: no such file"),
        (["--out", "x", FILES[0], PHOTOS.parent / "README.md"], 2, "README.md: "),
        (FILES, 2, "--out"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_one_sentence(engine, tmp_path, args, code, sentence, run_here):
    done = run_here(*line_of(engine, *args))
    assert done.code == code
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
