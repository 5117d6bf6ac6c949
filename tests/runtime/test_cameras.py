"""Files of known cameras: COLMAP's text model and scene.json, each camera found by its photo's name."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from da3_runtime.errors import SettingError
from da3_runtime.image.cameras import cameras_of

PHOTOS = [Path("walk/b one.jpg"), Path("walk/a.jpg")]
CAMERAS = "# Camera list\n1 PINHOLE 640 480 500 510 320 240\n2 SIMPLE_PINHOLE 480 640 400 240 320\n"
IMAGES = (
    "# Image list\n\n"
    "7 0.5 0.5 0.5 0.5 1 2 3 1 a.jpg\n10 10 -1 20 20 3\n"
    "9 1 0 0 0 -1 0 2.5 2 b one.jpg\n\n"
)


@pytest.fixture
def colmap(tmp_path):
    def write(cameras=CAMERAS, images=IMAGES):
        (tmp_path / "cameras.txt").write_text(cameras)
        (tmp_path / "images.txt").write_text(images)
        return tmp_path

    return write


def view(image="a.jpg", **changes):
    lens, pose = [[500, 0, 320], [0, 500, 240], [0, 0, 1]], np.eye(3, 4).tolist()
    camera = {"image": image, "width": 640, "height": 480, "intrinsics": lens, "extrinsics": pose}
    return camera | changes


@pytest.fixture
def scene(tmp_path):
    def write(*views):
        path = tmp_path / "scene.json"
        path.write_text(json.dumps({"views": views}))
        return path

    return write


def test_a_colmap_model_gives_each_photo_its_camera(colmap):
    second, first = cameras_of(colmap(), PHOTOS)
    assert (first.image, first.width, first.height) == ("a.jpg", 640, 480)
    np.testing.assert_allclose(first.intrinsics, [[500, 0, 320], [0, 510, 240], [0, 0, 1]])
    # A third of a turn about the diagonal.
    turn = cv2.Rodrigues(np.full(3, 2 * np.pi / 3 / np.sqrt(3)))[0]
    np.testing.assert_allclose(first.extrinsics, np.c_[turn, [1, 2, 3]], atol=1e-12)
    np.testing.assert_allclose(second.intrinsics, [[400, 0, 240], [0, 400, 320], [0, 0, 1]])
    np.testing.assert_allclose(second.extrinsics, np.c_[np.eye(3), [-1, 0, 2.5]])


def test_a_scene_json_is_read_as_it_was_written(scene):
    (camera,) = cameras_of(scene(view("elsewhere/a.jpg"), view("c.jpg")), [Path("photos/a.jpg")])
    assert camera.image == "elsewhere/a.jpg"
    np.testing.assert_array_equal(camera.extrinsics, np.eye(3, 4))


def test_the_folder_decides_between_photos_of_one_name(scene):
    path = scene(view("left/a.jpg", width=320, height=240), view("right/a.jpg"))
    assert cameras_of(path, [Path("rig/right/a.jpg")])[0].image == "right/a.jpg"
    assert cameras_of(path, [Path("rig/left/a.jpg")])[0].image == "left/a.jpg"
    with pytest.raises(SettingError, match=r"has 2 cameras for other/a\.jpg: give their folders too"):
        cameras_of(path, [Path("other/a.jpg")])


def test_a_lens_follows_the_size_of_the_photo(colmap):
    (camera,) = cameras_of(colmap(), [Path("a.jpg")])
    lens = camera.lens(1280, 960)
    np.testing.assert_allclose(lens.intrinsics, [[1000, 0, 640], [0, 1020, 480], [0, 0, 1]])
    with pytest.raises(SettingError, match=r"a\.jpg has 480 x 640 pixels, and its camera 640 x 480"):
        camera.lens(480, 640)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": CAMERAS.replace("PINHOLE 640", "OPENCV 640")}, "camera 1 has the model OPENCV"),
        ({"cameras": CAMERAS.replace(" 240\n2", "\n2")}, "is not a whole COLMAP text model"),
        ({"cameras": "2 PINHOLE x 480 500 510 320 240\n"}, "is not a whole COLMAP text model"),
        ({"images": IMAGES.replace(" 1 a.jpg", " 5 a.jpg")}, "is not a whole COLMAP text model"),
        ({"images": IMAGES.replace("0.5 0.5 0.5 0.5", "0 0 0 0")}, "is not a whole COLMAP text model"),
        ({"images": IMAGES.replace(" 2 3 1 a.jpg", " 2 1 a.jpg")}, "is not a whole COLMAP text model"),
        ({"images": IMAGES.replace("a.jpg", "z.jpg")}, "has no camera for a.jpg"),
        ({"images": IMAGES.replace("1 2 3 1", "1 nan 3 1")}, "is not a whole COLMAP text model"),
        ({"images": ""}, "has no camera for a.jpg"),
    ],
)  # fmt: skip
def test_a_faulty_colmap_model_is_one_sentence(colmap, change, message):
    with pytest.raises(SettingError, match=message):
        cameras_of(colmap(**change), [Path("a.jpg")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[]", "must be JSON"),
        ('{"cameras": []}', "a view lacks 'views'"),
        (json.dumps({"views": [{"image": "a.jpg"}]}), "a view lacks 'width'"),
        (json.dumps({"views": [view(extrinsics=None)]}), "3 rows of 4"),
        (json.dumps({"views": [view(intrinsics=[[1, 2], [3, 4]])]}), "3 rows of 3"),
        (json.dumps({"views": [view(intrinsics=[[0] * 3] * 3)]}), "fx and fy at least 1"),
        (json.dumps({"views": [view(width=0)]}), "width and height are at least 1"),
        (json.dumps({"views": [view(extrinsics=[[1, 2, 3, "x"]] * 3)]}), "must be JSON"),
    ],
)
def test_a_faulty_json_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "cameras.json"
    path.write_text(text)
    with pytest.raises(SettingError, match=message) as caught:
        cameras_of(path, [Path("a.jpg")])
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there_or_not_text_are_named(tmp_path):
    with pytest.raises(SettingError, match=r"nowhere: nowhere: No such file"):
        cameras_of(tmp_path / "nowhere", [Path("a.jpg")])
    with pytest.raises(SettingError, match=r"cameras\.txt: No such file"):
        cameras_of(tmp_path, [Path("a.jpg")])
    (tmp_path / "cameras.bin").write_bytes(b"")
    with pytest.raises(SettingError, match="is a binary COLMAP model: convert it with"):
        cameras_of(tmp_path, [Path("a.jpg")])
    (tmp_path / "photo.json").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(SettingError, match="is not text"):
        cameras_of(tmp_path / "photo.json", [Path("a.jpg")])
