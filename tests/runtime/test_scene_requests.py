"""A request with several images of one scene: its fields, its limits, and what it answers."""

import asyncio
import base64
import io
import re
import threading
import time
import zipfile
from functools import partial

import numpy as np
import pytest
from PIL import Image

import da3_runtime.image.fetch
from da3_runtime.api.response import DepthResponse, SceneResponse
from da3_runtime.backends.base import Backend
from da3_runtime.errors import ImageError
from da3_runtime.inference.estimator import Estimator
from da3_runtime.network_io import RawOutputs
from da3_runtime.serve import service as service_module
from tests.support.stand_in import client_of, service_of


class Views(Backend):
    """A network whose depth is 1, 2, 3, ... for the first, second, third view of a scene."""

    name, precision, trained = "stand-in", "fp32", True

    def __init__(self):
        self.shapes, self.conditions = [], []

    @classmethod
    def unavailable(cls):
        return None

    @classmethod
    def load(cls, folder, graph, settings):
        return cls()

    def run(self, images, conditions=None):
        self.shapes.append(images.shape)
        self.conditions.append(conditions)
        scenes, views, height, width, _ = images.shape
        depth = np.ones((scenes, views, height, width), np.float32)
        depth *= np.arange(1, views + 1, dtype=np.float32)[:, None, None]
        lens = np.array([[200, 0, width / 2], [0, 200, height / 2], [0, 0, 1]], np.float32)
        pose = np.tile(np.eye(3, 4, dtype=np.float32), (scenes, views, 1, 1))
        pose[..., 0, 3] = np.arange(views) / 2
        reference = np.where(conditions.reference < 0, views - 1, conditions.reference)
        reference[conditions.poses[:, 0, 7] > 0] = 0
        return RawOutputs(
            depth, depth, None, np.tile(lens, (scenes, views, 1, 1)), pose, reference=reference
        )


@pytest.fixture
def network():
    return Views()


@pytest.fixture
def serve(monkeypatch, tmp_path, network):
    return partial(service_of, monkeypatch, lambda graph: network, tmp_path, model_id="da3-small")


def encoded(size=(252, 168), fmt="PNG", noise=0):
    pixels = np.random.default_rng(noise).integers(0, 256, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels if noise else pixels // 64).save(stream, fmt)
    return stream.getvalue()


def base64_of(data):
    return base64.b64encode(data).decode()


def images(count=3, **fields):
    return [{"image_base64": base64_of(encoded()), **fields} for _ in range(count)]


def ask(service, views, **fields):
    return service.answer({"images": views, **fields}, "job")


def pose(x):
    return [[1, 0, 0, x], [0, 1, 0, 0], [0, 0, 1, 0]]


def posed():
    return [*images(1, extrinsics=pose(0)), *images(1, extrinsics=pose(1))]


def test_a_scene_has_a_view_for_each_image_and_the_facts_of_the_scene(serve, network):
    response = ask(serve(), images(3), outputs=["preview", "depth_png16"])
    SceneResponse.model_validate(response)
    assert network.shapes == [(1, 3, 336, 504, 3)]
    assert (response["reference"], response["model_id"], response["license"]) == (
        2,
        "da3-small",
        "Apache-2.0",
    )
    assert response["warnings"] == []
    assert {"fetch", "decode", "preprocess", "inference", "postprocess", "encode", "total"} <= set(
        response["timings_ms"]
    )
    assert [view["max_depth"] for view in response["views"]] == [1, 2, 3]
    for view in response["views"]:
        assert (view["width"], view["height"], view["crop"]) == (252, 168, [0, 0, 252, 168])
        assert (view["unit"], view["model_id"]) == ("relative", "da3-small")
        assert {"image_base64", "depth_png16_base64", "depth_scale", "camera", "warnings"} <= set(view)
        np.testing.assert_allclose(np.array(view["camera"]["intrinsics"])[:2, 2], (126, 84))


def test_files_of_points_are_of_the_whole_scene(serve):
    outputs = ["preview", "glb", "ply", "colmap", "scene_npz"]
    fields = {"outputs": outputs, "points_edge": 0, "points_confidence": 0, "points_max": 1000}
    response = ask(serve(), images(3), **fields)
    SceneResponse.model_validate(response)
    files = {f"{name}_base64": response[f"{name}_base64"] for name in outputs[1:]}
    for view in response["views"]:
        assert "image_base64" in view
        assert not set(files) & set(view)
    ply = base64.b64decode(files["ply_base64"])
    assert b"element vertex 1000\n" in ply
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(files["colmap_base64"]))) as archive:
        pictures = archive.read("sparse/0/images.bin")
    assert all(f"{index:04d}.jpg\0".encode() in pictures for index in range(3))
    with np.load(io.BytesIO(base64.b64decode(files["scene_npz_base64"]))) as archive:
        assert archive["image"].shape == (3, 336, 504, 3)
    single = serve().answer({**images(1)[0], **fields}, "job")
    DepthResponse.model_validate(single)
    assert {"image_base64", *files} <= set(single)


def test_what_cannot_be_made_of_a_depth_is_422(serve):
    image = images(1)[0]
    response = serve().answer({**image, "outputs": ["depth_png16"], "depth_unit": "mm"}, "job")
    assert response["status"] == 422
    assert response["error"].startswith("depth_unit mm needs depth in meters, and the unit of this")


def test_meters_may_be_sent_in_millimeters(serve):
    fields = {"outputs": ["depth_png16"], "depth_unit": "mm", "focal_length_px": 150}
    response = serve(model_id="da3metric-large").answer({**images(1)[0], **fields}, "job")
    assert (response["unit"], response["depth_scale"], response["warnings"]) == ("m", 0.001, [])
    # The network's input is twice as large as the image: 1 x 300 / 300.
    with Image.open(io.BytesIO(base64.b64decode(response["depth_png16_base64"]))) as png:
        assert png.getextrema() == (1000, 1000)
    far = serve(model_id="da3metric-large").answer(
        {**images(1)[0], **fields, "focal_length_px": 15000}, "job"
    )
    assert far["warnings"][0].startswith("100.0% of the pixels are farther than 65.535 m")


def test_files_that_are_too_large_are_named(serve):
    service, data = serve(), {"images": images(2), "outputs": ["glb", "ply"], "points_edge": 0}
    error = service.answer(data, "job", max_bytes=100_000)["error"]
    assert re.search(r"Leave out some of glb \([\d.]+ MB\), ply \([\d.]+ MB\)", error)
    assert error.endswith("or send a smaller points_max or processing_res.")


def test_images_of_different_shapes_are_cropped_to_one(serve, network):
    views = [{"image_base64": base64_of(encoded(size))} for size in ((252, 168), (168, 252))]
    first, second = ask(serve(), views)["views"]
    assert network.shapes == [(1, 2, 336, 336, 3)]
    assert (first["crop"], second["crop"]) == ([42, 0, 168, 168], [0, 42, 168, 168])
    assert "the middle 168 x 168 of 252 x 168 pixels" in first["warnings"][0]


@pytest.mark.parametrize(
    ("reference", "wanted"), [(None, -1), ("auto", -1), ("first", 0), ("middle", 1), (2, 2)]
)
def test_the_reference_is_passed_on(serve, network, reference, wanted):
    assert "error" not in ask(serve(), images(3), reference=reference)
    assert network.conditions[0].reference.tolist() == [wanted]


def test_known_cameras_give_the_depth_their_unit(serve, network):
    views = [
        {"image_base64": base64_of(encoded()), "focal_length_px": 300, "extrinsics": pose(x)}
        for x in (0, 100, 200)
    ]
    response = ask(serve(), views)
    assert response["reference"] == 0
    assert network.conditions[0].poses[0, :, 7].min() > 0
    for number, view in enumerate(response["views"], 1):
        # The network puts the cameras 0.5 apart, the request 100.
        assert (view["unit"], view["max_depth"]) == ("cameras", pytest.approx(200 * number, rel=1e-5))
        assert view["camera"]["extrinsics"] == pose(100 * (number - 1))
        assert view["camera"]["intrinsics"][0][0] == pytest.approx(300)


def test_the_request_s_lens_is_for_images_without_one(serve):
    views = images(2)
    views[1]["focal_length_px"] = 333
    first, second = ask(serve(), views, focal_length_px=222)["views"]
    assert (first["camera"]["intrinsics"][0][0], second["camera"]["intrinsics"][0][0]) == (
        pytest.approx(222),
        pytest.approx(333),
    )


@pytest.mark.parametrize(
    ("views", "fields", "status", "error"),
    [
        (images(17), {}, 400, "images has 17; the limit is 16 (MAX_VIEWS): send fewer."),
        ([], {}, 400, "images must be a list of 1 to 256, each an object."),
        ([*images(1), {}], {}, 400, "images[1]: No image: send one of image_url and image_base64."),
        ([*images(1), {"image_base64": "***"}], {}, 400, "images[1]: image_base64 is not valid Base64"),
        ([*images(2), {"image_base64": base64_of(b"<html>")}], {}, 415, "images[2]: "),
        ([*images(1), {"image_base64": base64_of(encoded()[:300])}], {}, 422, "images[1]: "),
        ([{"image_base64": base64_of(encoded((900, 9)))}], {}, 422, "images[0]: "),
        ([*images(1), {"image_url": "file:///etc/passwd"}], {}, 400, "images[1]: image_url must be a public"),
        (images(1, focal_length_px=0), {}, 400, "images[0].focal_length_px must be a number from 1 to"),
        (images(2), {"reference": 2}, 400, "reference 2 is not one of: auto, first, middle, or an index"),
        (images(1), {"image_base64": "x"}, 400, "Two images: send one of"),
        ([*images(1), *images(1, extrinsics=pose(1))], {}, 400, "images[0] has no extrinsics"),
        (posed(), {}, 400, "images[0]: extrinsics need intrinsics or focal_length_px of the same photo"),
        (images(2, extrinsics=pose(1), focal_length_px=9), {}, 400, "extrinsics put all cameras at one"),
        (images(1, extrinsics=pose(1), focal_length_px=9), {}, 400, "extrinsics of one photo give no scale"),
        (images(16), {"processing_res": 1036}, 507, "The scene has 16 views of 1036 x 686 pixels"),
    ],
)  # fmt: skip
def test_a_faulty_scene_is_one_sentence_that_names_the_image(serve, views, fields, status, error):
    response = ask(serve(), views, **fields)
    assert response["status"] == status
    assert error in response["error"]
    assert "\n" not in response["error"]


def test_the_limits_are_for_all_images_together(serve):
    one = encoded(noise=1)
    assert "error" not in ask(
        serve(max_image_bytes=3 * len(one)), [{"image_base64": base64_of(one)}] * 3
    )
    response = ask(serve(max_image_bytes=3 * len(one) - 1), [{"image_base64": base64_of(one)}] * 3)
    assert (response["status"], response["error"]) == (
        413,
        f"images[2]: images together have more than {3 * len(one) - 1} bytes (MAX_IMAGE_BYTES).",
    )
    assert "error" not in ask(serve(max_image_pixels=3 * 252 * 168), images(3))
    response = ask(serve(max_image_pixels=3 * 252 * 168 - 1), images(3))
    assert (response["status"], response["error"]) == (
        413,
        f"images together have more than {3 * 252 * 168 - 1} pixels (MAX_IMAGE_PIXELS): send smaller or "
        "fewer ones.",
    )


def test_a_too_large_scene_says_what_to_leave_out(serve):
    response = service_answer(serve(), 60_000)
    assert response["status"] == 413
    assert "depth_npz" in response["error"]


def service_answer(service, max_bytes):
    data = {
        "images": [{"image_base64": base64_of(encoded(noise=1))}] * 3,
        "outputs": ["preview", "depth_npz"],
    }
    views = service.answer({**data, "processing_res": 84}, "job", max_bytes=None)["views"]
    assert len(views) == 3
    return service.answer(data, "job", max_bytes=4096 * 3 + 100)


def test_downloads_run_side_by_side(serve, monkeypatch):
    together = threading.Barrier(3)

    async def download(url, budget, seconds, hosts):
        await asyncio.to_thread(together.wait, 10)  # all three, or none
        return encoded(noise=int(url[-1]))

    monkeypatch.setattr(service_module, "download", download)
    response = ask(serve(), [{"image_url": f"http://photos.example/{i}"} for i in (1, 2, 3)])
    assert [view["max_depth"] for view in response["views"]] == [1, 2, 3]


def test_downloads_share_the_limit_of_bytes(serve, monkeypatch):
    async def download(url, budget, seconds, hosts):
        budget.take(100_000, "image_url")
        return encoded()

    monkeypatch.setattr(service_module, "download", download)
    views = [{"image_url": "http://photos.example/"}] * 3
    assert "error" not in ask(serve(max_image_bytes=300_000), views)
    response = ask(serve(max_image_bytes=299_999), views)
    assert (response["status"], response["error"]) == (
        413,
        "images[2]: images together have more than 299999 bytes (MAX_IMAGE_BYTES).",
    )


def test_one_image_and_several_have_each_their_sentence_for_a_slow_download(serve, monkeypatch):
    async def never(*_):
        await asyncio.sleep(30)

    monkeypatch.setattr(da3_runtime.image.fetch, "_download", never)
    service, url = serve(download_seconds=1), "http://photos.example/"
    single = service.answer({"image_url": url}, "job")
    scene = ask(service, [{"image_url": url}] * 2)
    assert (single["status"], single["error"]) == (422, "image_url took longer than 1 seconds.")
    assert (scene["status"], scene["error"]) == (422, "images took longer than 1 seconds to download.")


def test_a_failed_download_ends_the_others_and_names_its_image(serve, monkeypatch):
    ended = []

    async def download(url, budget, seconds, hosts):
        if url.endswith("2"):
            raise ImageError("image_url could not be downloaded.")
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            ended.append(url)
            raise

    monkeypatch.setattr(service_module, "download", download)
    views = [*images(1), *({"image_url": f"http://photos.example/{i}"} for i in (1, 2, 3))]
    response = ask(serve(), views)
    assert (response["status"], response["error"]) == (
        422,
        "images[2]: image_url could not be downloaded.",
    )
    assert len(ended) == 2


def test_the_time_to_decode_is_that_of_all_images(serve, monkeypatch):
    decode = Estimator.decode

    def slowly(estimator, data):
        time.sleep(0.05)
        return decode(estimator, data)

    monkeypatch.setattr(Estimator, "decode", slowly)
    assert ask(serve(), images(3))["timings_ms"]["decode"] >= 150


def test_unknown_fields_of_an_image_are_listed(serve):
    response = ask(serve(), [*images(1), *images(1, focal=3)])
    assert response["warnings"] == ["Ignored unknown fields: images[1].'focal'."]


def test_one_image_in_images_is_a_scene_of_one_view(serve):
    response = ask(serve(), images(1))
    assert (len(response["views"]), response["reference"]) == (1, 0)


def test_files_of_a_form_are_a_scene(serve):
    files = [("file", (f"{i}.png", encoded(noise=i), "image/png")) for i in (1, 2)]

    async def send():
        async with client_of(serve()) as client:
            fields = {"outputs": "depth_png16", "reference": "first"}
            scene = await client.post("/runsync", files=files, data=fields)
            return scene.json()["output"], (await client.post("/runsync", files=files[:1])).json()

    scene, single = asyncio.run(send())
    assert (len(scene["views"]), scene["reference"]) == (2, 0)
    assert {"image_base64", "min_depth"} <= set(single["output"])
    assert "views" not in single["output"]
