"""The core behind every way in: units, outputs, limits, files, failures. The network is a stand-in."""

import base64
import http.server
import io
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import cv2
import numpy as np
import pytest
from PIL import Image

import da3_runtime.serve.service
from benchmarks import pillow_pipeline
from da3_runtime.api.response import DepthResponse
from da3_runtime.backends.base import Backend
from da3_runtime.errors import CheckpointError, SettingError
from da3_runtime.image.preprocess import model_input
from da3_runtime.inference.estimator import Estimator
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.network_io import RawOutputs
from da3_runtime.serve.service import Service
from da3_runtime.settings import Settings
from da3_runtime.store.engine_folder import EngineFolder
from da3_runtime.variants import Series, find_head, find_variant
from tests.support.paths import ROOT

WIDTH, HEIGHT = 252, 168
FOCAL_IN_EXIF = 26  # mm on film


class StandIn(Backend):
    """Depth that rises from 3 at the top to 6 at the bottom, and no sky."""

    name = "stand-in"
    precision = "fp32"
    trained = True

    def __init__(self, graph):
        self.graph = graph

    @classmethod
    def unavailable(cls):
        return None

    @classmethod
    def load(cls, folder, graph, settings):
        return cls(graph)

    def run(self, images):
        batch, height, width, _ = images.shape
        depth = np.empty((batch, height, width), np.float32)
        depth[:] = np.linspace(3, 6, height, dtype=np.float32)[:, None]
        if self.graph.series is Series.MONOCULAR:
            return RawOutputs(depth, sky=np.zeros_like(depth))
        lens = np.array([[600, 0, width / 2], [0, 600, height / 2], [0, 0, 1]], np.float32)
        pose = np.eye(3, 4, dtype=np.float32)
        cameras = np.repeat(lens[None], batch, axis=0), np.repeat(pose[None], batch, axis=0)
        return RawOutputs(depth, depth, None, *cameras)


@pytest.fixture
def serve(monkeypatch):
    """Makes a service whose models are stand-ins."""

    def load(engine, images, inference):
        variant, head = find_variant(engine.model_id), find_head(engine.head)
        graphs = {graph.name: StandIn(graph) for graph in variant.graphs}
        folder = EngineFolder(variant, head, engine.engine_dir, None)
        return Estimator(Loaded(folder, graphs, []), images, inference)

    monkeypatch.setattr(da3_runtime.serve.service.Estimator, "load", load)
    return lambda **given: Service(Settings.of(**{"model_id": "da3-small"} | given))


def photo(fmt="PNG", size=(WIDTH, HEIGHT), exif_focal=None, orientation=None, noise=False):
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels) if noise else Image.new("RGB", size, "teal")
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    if exif_focal:
        exif[0x8769] = {0xA405: exif_focal}
    image.save(stream, fmt, exif=exif)
    return base64.b64encode(stream.getvalue()).decode()


def ask(service, image=None, **fields):
    return service.answer({"image_base64": image or photo(), **fields}, "job")


def read_png(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_an_answer_has_the_reference_s_fields_and_ours(serve):
    answer = ask(serve())
    assert {"image_base64", "min_depth", "max_depth", "head_type"} <= set(answer)
    assert "error" not in answer
    assert (answer["min_depth"], answer["max_depth"]) == pytest.approx((3, 6), rel=2e-3)
    assert (answer["head_type"], answer["model_id"]) == ("DualDPT", "da3-small")
    assert (answer["backend"], answer["precision"]) == ("stand-in", "fp32")
    assert (answer["width"], answer["height"]) == (WIDTH, HEIGHT)
    assert set(answer["timings_ms"]) == {
        "fetch", "load", "decode", "preprocess", "wait", "inference", "postprocess", "encode", "total",
    }  # fmt: skip
    assert set(answer) <= set(DepthResponse.model_fields)
    DepthResponse.model_validate(answer)
    picture = read_png(answer["image_base64"])
    assert (picture.dtype, picture.shape) == (np.uint8, (HEIGHT, WIDTH))
    assert picture[0].mean() > picture[-1].mean(), "near is bright"


def test_relative_models_never_say_metres(serve):
    for model in ("da3-small", "da3-large", "da3mono-large"):
        answer = ask(serve(), model_id=model, focal_length_px=500)
        assert (answer["unit"], answer["is_metric"]) == ("relative", False)
        assert answer["focal_source"] is None


LENS = [[500, 0, WIDTH / 2], [0, 700, HEIGHT / 2], [0, 0, 1]]
ON_FILM = FOCAL_IN_EXIF / np.hypot(36, 24) * np.hypot(WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("fields", "exif", "focal", "source"),
    [
        ({"focal_length_px": 400}, None, 400, "focal_length_px"),
        ({"focal_length_px": 400, "intrinsics": LENS}, FOCAL_IN_EXIF, 400, "focal_length_px"),
        ({"intrinsics": LENS}, FOCAL_IN_EXIF, 600, "intrinsics"),
        ({}, FOCAL_IN_EXIF, ON_FILM, "exif"),
    ],
)
def test_the_metric_model_gives_metres_when_it_knows_the_lens(serve, fields, exif, focal, source):
    answer = ask(
        serve(), photo("JPEG", exif_focal=exif), model_id="da3metric-large", processing_res=504, **fields
    )
    assert (answer["unit"], answer["is_metric"], answer["focal_source"]) == ("m", True, source)
    # The network sees the photo twice as large, so its lens too.
    assert answer["max_depth"] == pytest.approx(6 * 2 * focal / 300, rel=1e-3)
    assert answer["warnings"] == []


def test_without_a_lens_the_metric_model_says_what_to_send(serve):
    answer = ask(serve(), model_id="da3metric-large")
    assert (answer["unit"], answer["is_metric"]) == ("relative", False)
    assert "focal_length_px" in answer["warnings"][0]
    assert answer["head_type"] == "DPT"


def test_a_given_lens_replaces_the_nested_model_s_own(serve):
    service = serve()
    own = ask(service, model_id="da3nested-giant-large", processing_res=WIDTH)
    assert (own["unit"], own["focal_source"]) == ("m", "predicted")
    assert own["max_depth"] == pytest.approx(6 * 600 / 300, rel=1e-3)
    given = ask(service, model_id="da3nested-giant-large", processing_res=WIDTH, focal_length_px=300)
    assert (given["unit"], given["focal_source"]) == ("m", "focal_length_px")
    assert given["max_depth"] == pytest.approx(6, rel=1e-3)


def test_every_output_is_read_back(serve):
    outputs = ["depth_png16", "depth_npz", "confidence", "camera", "color"]
    answer = ask(serve(), outputs=outputs, color_map="viridis")
    assert "image_base64" not in answer
    with np.load(io.BytesIO(base64.b64decode(answer["depth_npz_base64"]))) as archive:
        depth = archive["depth"]
    assert (depth.dtype, depth.shape) == (np.float32, (HEIGHT, WIDTH))
    assert (depth.min(), depth.max()) == (answer["min_depth"], answer["max_depth"])
    steps = read_png(answer["depth_png16_base64"])
    assert steps.min() > 0
    np.testing.assert_allclose(steps * answer["depth_scale"], depth, atol=answer["depth_scale"])
    confidence = read_png(answer["confidence_base64"]) * answer["confidence_scale"]
    np.testing.assert_allclose(confidence, depth, atol=answer["confidence_scale"])
    assert read_png(answer["color_base64"]).shape == (HEIGHT, WIDTH, 3)
    # The network saw 504 pixels where the image has 252.
    assert answer["camera"]["intrinsics"][0] == pytest.approx([300, 0, WIDTH / 2])
    assert answer["camera"]["extrinsics"][0] == [1, 0, 0, 0]


def test_sky_is_read_back_and_what_a_model_lacks_is_null_with_a_warning(serve):
    service = serve()
    answer = ask(service, model_id="da3mono-large", outputs=["sky", "confidence", "camera"])
    assert (read_png(answer["sky_base64"]) == 0).all()
    assert (answer["confidence_base64"], answer["camera"]) == (None, None)
    assert any("confidence, camera" in warning for warning in answer["warnings"])
    assert ask(service, outputs=["sky"])["sky_base64"] is None


def test_the_model_s_own_size(serve):
    answer = ask(serve(), output_size="model", outputs=["preview", "camera"])
    assert (answer["width"], answer["height"]) == (504, 336)
    assert read_png(answer["image_base64"]).shape == (336, 504)
    assert answer["camera"]["intrinsics"][0] == pytest.approx([600, 0, 252])


def test_a_turned_photo_is_answered_upright(serve):
    answer = ask(serve(), photo("JPEG", orientation=6))
    assert (answer["width"], answer["height"]) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("name", ["DA3-Small", "depth-anything/DA3-SMALL", "da3-small"])
def test_a_model_is_asked_for_by_any_of_its_names(serve, name):
    assert ask(serve(model_id="da3-base"), model_id=name)["model_id"] == "da3-small"


def test_a_request_may_choose_the_head(serve):
    assert ask(serve(head="sdt"))["head_type"] == "SDTHeadAdapter"
    assert ask(serve(head="sdt"), use_sdt_head=False)["head_type"] == "DualDPT"
    assert ask(serve(), use_sdt_head=True)["head_type"] == "SDTHeadAdapter"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_id": "da3-tiny"}, "model_id 'da3-tiny'"),
        ({"model_id": "\ud800"}, "model_id"),
        ({"use_ray_pose": True, "use_sdt_head": True}, "use_ray_pose: the SDT head has no rays"),
        ({"use_ray_pose": True, "model_id": "da3mono-large"}, "use_ray_pose: da3mono-large has no rays"),
    ],
)
def test_what_no_model_can_do(serve, fields, said):
    answer = ask(serve(), **fields)
    assert answer["status"] == 400
    assert said in answer["error"]
    answer["error"].encode()


def test_ray_pose_is_a_model_of_its_own(serve):
    service = serve()
    ask(service)
    ask(service, use_ray_pose=True)
    assert [key.ray_pose for key in service.pool.loaded()] == [True]
    service = serve(ray_pose=True)
    ask(service)
    assert [key.ray_pose for key in service.pool.loaded()] == [True]
    ask(service, use_ray_pose=False)
    assert [key.ray_pose for key in service.pool.loaded()] == [False]


def test_a_wrong_default_is_refused_at_the_start():
    for given in (
        {"model_id": "da3-tiny"},
        {"head": "fpn"},
        {"model_id": "da3mono-large", "ray_pose": True},
    ):
        with pytest.raises(SettingError):
            Service(Settings.of(**given))


def test_the_key(serve):
    service = serve(api_key="geheim")
    for wrong in (
        {},
        {"api_key": "x"},
        {"api_key": ""},
        {"api_key": 5},
        {"api_key": "\ud800"},
        None,
        "x",
    ):
        answer = service.answer(wrong and {**wrong} if isinstance(wrong, dict) else wrong, "job")
        assert answer["status"] == 401
        assert "geheim" not in answer["error"]
    assert "error" not in ask(service, api_key="geheim")
    assert "error" not in service.answer({"image_base64": photo()}, "job", is_authorized=True)


def test_an_answer_that_is_too_large_names_what_to_leave_out(serve):
    outputs = ["preview", "depth_npz", "depth_png16"]
    small = serve().answer({"image_base64": photo(), "outputs": ["camera"]}, "job", max_bytes=5000)
    assert "error" not in small
    answer = serve().answer({"image_base64": photo(), "outputs": outputs}, "job", max_bytes=5000)
    assert answer["status"] == 413
    assert all(part in answer["error"] for part in ("depth_npz (", "MAX_RESPONSE_BYTES", "output_size"))


class Bucket(http.server.BaseHTTPRequestHandler):
    """Keeps what is put."""

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.put[self.path] = body
        self.send_response(self.server.status)
        self.send_header("ETag", '"x"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def bucket(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    server.put, server.status = {}, 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "geheim")
    yield server
    server.shutdown()


def test_an_answer_that_is_too_large_is_put_in_the_bucket(serve, bucket):
    data = {"image_base64": photo(), "outputs": ["preview", "depth_png16"]}
    answer = serve().answer(data, "job-7", max_bytes=5000)
    assert "image_base64" not in answer
    assert "/job-7/preview.png" in answer["image_url"]
    assert "geheim" not in answer["image_url"]
    assert "depth_scale" in answer
    (stored,) = [body for path, body in bucket.put.items() if "/job-7/preview.png" in path]
    assert b"\x89PNG" in stored
    assert not (ROOT / "local_upload").exists()


def test_a_bucket_that_refuses_is_an_error(serve, bucket):
    bucket.status = 403
    answer = serve().answer({"image_base64": photo()}, "job", max_bytes=10)
    assert answer["status"] == 502
    assert answer["error"].startswith("The outputs could not be uploaded to the bucket")


def test_pictures_are_kept_on_a_volume(serve, tmp_path):
    service = serve(workspace=tmp_path)
    paths = {ask(service)["file_path"] for _ in range(3)}
    assert len(paths) == 3
    for path in paths:
        assert path.startswith(str(tmp_path / "output_images"))
        assert np.asarray(Image.open(path)).shape == (HEIGHT, WIDTH)
    assert "file_path" not in ask(service, outputs=["camera"])
    assert "file_path" not in ask(serve(workspace=tmp_path / "not-mounted"))
    assert "file_path" not in ask(serve())


def test_old_pictures_are_removed_and_nothing_else(serve, tmp_path):
    kept = tmp_path / "output_images"
    kept.mkdir()
    names = ["a" * 32 + ".png", "b" * 32 + ".png", "mine.png"]
    for name in names:
        (kept / name).write_bytes(b"x")
    week = time.time() - 7 * 86400
    for name in (names[0], names[2]):
        os.utime(kept / name, (week, week))
    ask(serve(workspace=tmp_path))
    assert {name for name in names if (kept / name).exists()} == set(names)
    ask(serve(workspace=tmp_path, output_retention_days=6))
    assert {name for name in names if (kept / name).exists()} == set(names[1:])


def test_a_failed_load_is_told_without_its_reason_which_is_in_the_log(serve, monkeypatch, caplog):
    def load(*_):
        raise CheckpointError("WEIGHTS 'secret place/of mine' is not there.")

    service = serve()
    monkeypatch.setattr(da3_runtime.serve.service.Estimator, "load", load)
    answer = ask(service)
    assert answer["status"] == 503
    assert answer["error"] == "da3-small with head dpt cannot be loaded here; the worker's log says why."
    assert "secret place" in caplog.text
    assert not service.has_loaded


def test_weights_are_the_default_model_s_alone(serve, monkeypatch):
    seen = {}
    service = serve(weights="w", revision="r", sdt_weights="s")
    load = da3_runtime.serve.service.Estimator.load

    def remember(engine, *others):
        seen[engine.model_id] = (engine.weights, engine.revision, engine.sdt_weights)
        return load(engine, *others)

    monkeypatch.setattr(da3_runtime.serve.service.Estimator, "load", remember)
    ask(service)
    ask(service, model_id="da3mono-large")
    assert seen == {"da3-small": ("w", "r", "s"), "da3mono-large": (None, None, None)}


def test_a_model_is_let_go_before_its_answer_is_encoded(serve, monkeypatch):
    """So that no more are in memory than may be loaded, however long an upload takes."""
    service = serve()
    alive = []

    def encode(*_):
        (slot,) = service.pool._slots.values()
        model = weakref.ref(slot.loading.result())
        service.pool._slots.clear()
        del slot
        alive.append(model() is not None)
        return iter(())

    monkeypatch.setattr(da3_runtime.serve.service, "encode_outputs", encode)
    ask(service)
    assert alive == [False]


def test_a_fault_of_ours_is_said_without_its_traceback(serve, monkeypatch, caplog):
    def load(*_):
        raise KeyError("inner secret")

    service = serve()
    monkeypatch.setattr(da3_runtime.serve.service.Estimator, "load", load)
    answer = ask(service)
    assert answer["status"] == 500
    assert "secret" not in answer["error"]
    assert "inner secret" in caplog.text


class Brightness(StandIn):
    """Depth is one more than the image's mean; nothing is let through before there are enough."""

    gains_from_batches = True
    batches: ClassVar[list[int]] = []
    enough = threading.Event()

    def run(self, images):
        self.batches.append(len(images))
        assert self.enough.wait(20)
        raw = super().run(images)
        depth = np.ones_like(raw.depth) + images.mean(axis=(1, 2, 3), dtype=np.float32)[:, None, None]
        return raw._replace(depth=depth)

    def largest_batch(self, height, width):
        return 3


@pytest.mark.parametrize(("max_batch", "largest"), [(None, 3), (2, 2), (8, 3), (1, 1)])
def test_requests_that_wait_together_run_together_and_are_answered_as_if_alone(
    serve, monkeypatch, max_batch, largest
):
    monkeypatch.setitem(globals(), "StandIn", Brightness)
    monkeypatch.setattr(Brightness, "batches", [])
    monkeypatch.setattr(Brightness, "enough", threading.Event())
    service = serve(max_batch=max_batch, max_concurrency=9)

    def gray(value):
        stream = io.BytesIO()
        size = (WIDTH, HEIGHT) if value % 2 else (WIDTH, 252)
        Image.new("RGB", size, (value, value, value)).save(stream, "PNG")
        return base64.b64encode(stream.getvalue()).decode()

    with ThreadPoolExecutor(9) as threads:
        answers = {value: threads.submit(ask, service, gray(value)) for value in range(10, 19)}
        with service.pool.borrow(service.default) as estimator:
            deadline = time.monotonic() + 20
            while sum(Brightness.batches) + len(estimator._batcher._waiting) < 9:
                assert time.monotonic() < deadline
                time.sleep(0.001)
        Brightness.enough.set()
    for value, answer in answers.items():
        told = answer.result()
        assert (told["min_depth"], told["max_depth"]) == (value + 1, value + 1)
        assert told["height"] == (HEIGHT if value % 2 else 252)
    assert sum(Brightness.batches) == 9
    assert max(Brightness.batches) == largest


def test_what_gains_nothing_from_batches_runs_none_unless_told_to(serve):
    for max_batch, expected in ((None, 1), (4, 4), (64, 8)):
        with (service := serve(max_batch=max_batch)).pool.borrow(service.default) as estimator:
            assert estimator._batcher._largest(HEIGHT, WIDTH) == expected


class Hills(StandIn):
    """A depth with near and far in it."""

    def run(self, images):
        raw = super().run(images)
        coarse = np.random.default_rng(0).uniform(0.3, 9, (7, 9)).astype(np.float32)
        height, width = raw.depth.shape[1:]
        hills = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        return raw._replace(depth=np.maximum(hills, 0.2)[None])


@pytest.mark.parametrize(
    ("size", "fmt"), [((640, 480), "PNG"), ((1920, 1080), "JPEG"), ((1512, 2016), "JPEG")]
)
def test_the_preview_is_the_reference_services_from_end_to_end(serve, monkeypatch, size, fmt):
    monkeypatch.setitem(globals(), "StandIn", Hills)
    image = photo(fmt, size)
    picture = read_png(ask(serve(), image)["image_base64"]).astype(int)
    rgb = pillow_pipeline.decode(image)
    depth = Hills(find_variant("da3-small").graphs[0]).run(model_input(rgb)).depth[0]
    apart = np.abs(picture - pillow_pipeline.preview(depth, *size))
    assert (apart <= 1).mean() >= 0.99
    # The rest lies at kinks of this map, where OpenCV's cubic is steeper than Pillow's.
    assert (apart <= 3).mean() >= 0.999
