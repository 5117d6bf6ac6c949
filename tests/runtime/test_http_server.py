"""The HTTP server, driven over loopback: real requests, a real engine."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from da3_runtime.serve.http_server import make_app
from da3_runtime.serve.service import Service
from da3_runtime.settings import Settings
from tests.support.images import PHOTO, encode
from tests.support.images import base64_text as text
from tests.support.images import image_of as picture
from tests.support.invalid_requests import INVALID_REQUESTS as WRONG
from tests.support.paths import NANO, PHOTOS, ROOT
from tests.support.processes import Server, free_port, run_module

KEY = "a key"


@pytest.fixture(scope="module")
def server(engine):
    made = Server(
        "serve",
        ENGINE_DIR=str(engine.engine_dir),
        RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS="1",
        HF_HUB_OFFLINE="1",
    )
    made.wait()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def locked(engine):
    made = Server("serve", ENGINE_DIR=str(engine.engine_dir), DA3_API_KEY=KEY)
    made.wait()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site with a photo, on loopback."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "-d", str(PHOTOS)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    process.terminate()


def test_runsync_answers_in_runpod_s_envelope(server):
    answer = server.ask(image_base64=PHOTO)
    assert answer.status_code == 200
    envelope = answer.json()
    assert set(envelope) == {"id", "status", "delayTime", "executionTime", "output"}
    assert envelope["status"] == "COMPLETED"
    output = envelope["output"]
    assert (output["backend"], output["model_id"]) == ("onnxruntime-cpu", NANO)
    with Image.open(PHOTOS / "cat.jpg") as photo:
        assert picture(output).size == photo.size == (output["width"], output["height"])
    assert 0 < output["min_depth"] < output["max_depth"]


def test_the_reference_s_documented_calls_pass_as_written(server, locked, site, tmp_path):
    """Its README's three curl calls; only host, picture's address, model and key are ours."""
    host, address = f"http://127.0.0.1:{server.port}", f"{site}/cat.jpg"
    (tmp_path / "sample.jpg").write_bytes((PHOTOS / "cat.jpg").read_bytes())
    standard = f"""curl -X POST {host}/runsync \\
      -H "Content-Type: application/json" \\
      -d '{{
        "input": {{
          "image_url": "{address}",
          "model_id": "{NANO}"
        }}
      }}'"""
    with_key = f"""curl -X POST http://127.0.0.1:{locked.port}/runsync \\
      -H "Content-Type: application/json" \\
      -H "da3-api-key: {KEY}" \\
      -d '{{
        "input": {{
          "image_base64": "{text(encode(Image.new("RGB", (84, 84))))}"
        }}
      }}'"""
    as_base64 = f"""IMAGE_BASE64=$(base64 -w 0 sample.jpg)
    curl -X POST {host}/runsync \\
      -H "Content-Type: application/json" \\
      -d "{{
        \\"input\\": {{
          \\"image_base64\\": \\"${{IMAGE_BASE64}}\\",
          \\"model_id\\": \\"{NANO}\\"
        }}
      }}\""""
    for call in (standard, with_key, as_base64):
        done = subprocess.run(
            ["bash", "-c", call], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        answer = json.loads(done.stdout)
        assert answer["status"] == "COMPLETED", answer
        assert picture(answer["output"]).mode == "L"


@pytest.mark.parametrize(
    ("fmt", "mode"),
    [
        ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"),
        ("PNG", "1"), ("PNG", "I;16"), ("WEBP", "RGBA"), ("BMP", "RGB"), ("TIFF", "CMYK"), ("GIF", "P"),
        ("ICO", "RGBA"), ("AVIF", "RGB"),
    ],
)  # fmt: skip
def test_every_format_and_mode(server, fmt, mode):
    with Image.open(PHOTOS / "cat.jpg") as photo:
        small = photo.resize((128, 96))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    else:
        image = small.convert(mode)
    output = server.ask(image_base64=text(encode(image, fmt))).json()["output"]
    assert picture(output).size == (output["width"], output["height"])


@pytest.mark.parametrize("name", WRONG)
def test_every_wrong_input_gets_its_status_and_one_sentence(server, name):
    fields, status, said = WRONG[name]
    answer = server.ask(**fields)
    assert answer.status_code == status
    envelope = answer.json()
    assert (envelope["status"], envelope["output"]) == ("FAILED", {"status": status})
    error = envelope["error"]
    assert said in error
    assert error.endswith(".")
    assert "\n" not in error
    assert "Traceback" not in error
    assert str(ROOT) not in error


@pytest.mark.parametrize(
    ("body", "said"),
    [(b"", "JSON"), (b"{", "JSON"), (b"[1]", "object"), (b'"x"', "object"), (b"[" * 100_000, "JSON"),
     (b'{"input": 5}', "input must be an object"), (b"{}", "input must be an object"), (b"\xff", "JSON")],
)  # fmt: skip
def test_a_body_that_is_no_job(server, body, said):
    answer = server.client.post("/runsync", content=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_images_at_the_limits_are_answered(server):
    for size in ((4096, 4096), (1, 1)):
        output = server.ask(image_base64=text(encode(Image.new("1", size)))).json()["output"]
        assert (output["width"], output["height"]) == size


def test_an_animation_is_its_first_frame(server):
    frames = [Image.new("RGB", (96, 96), colour) for colour in ("white", "black")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    output = server.ask(image_base64=text(data), outputs=["depth_npz"]).json()["output"]
    first = server.ask(image_base64=text(encode(frames[0])), outputs=["depth_npz"]).json()["output"]
    assert output["depth_npz_base64"] == first["depth_npz_base64"]


def test_a_body_larger_than_any_image_is_refused_while_it_comes(engine):
    small = Server("serve", ENGINE_DIR=str(engine.engine_dir), MAX_IMAGE_BYTES="1000")
    try:
        small.wait()
        answer = small.ask(image_base64="A" * 200_000)
        assert answer.status_code == 413
        assert "MAX_IMAGE_BYTES" in answer.json()["error"]
    finally:
        small.stop()


def test_run_and_status(server):
    queued = server.ask("/run", image_base64=PHOTO)
    assert queued.status_code == 200
    job = queued.json()["id"]
    assert queued.json()["status"] in ("IN_QUEUE", "IN_PROGRESS", "COMPLETED")
    for _ in range(600):
        told = server.client.get(f"/status/{job}").json()
        if told["status"] == "COMPLETED":
            break
        assert told["status"] in ("IN_QUEUE", "IN_PROGRESS")
        time.sleep(0.05)
    assert picture(told["output"])
    failed = server.ask("/run").json()["id"]
    for _ in range(600):
        told = server.client.get(f"/status/{failed}").json()
        if told["status"] == "FAILED":
            break
        time.sleep(0.05)
    assert told["output"] == {"status": 400}
    assert "No image" in told["error"]
    assert server.client.get("/status/nothing").status_code == 404


def test_the_sdk_s_client_finds_its_way(server, monkeypatch):
    import runpod

    monkeypatch.setattr(runpod, "endpoint_url_base", f"http://127.0.0.1:{server.port}/v2")
    endpoint = runpod.Endpoint("any-id", api_key="unused")
    output = endpoint.run_sync({"input": {"image_base64": PHOTO}}, timeout=60)
    assert picture(output)
    job = endpoint.run({"input": {"image_base64": PHOTO}})
    assert picture(job.output(timeout=60))
    assert job.status() == "COMPLETED"


def test_many_at_once_get_the_answer_they_would_get_alone(server):
    def ask(name):
        data = text((PHOTOS / name).read_bytes())
        return server.ask(image_base64=data, outputs=["depth_npz"]).json()["output"]["depth_npz_base64"]

    names = ["cat.jpg", "coffee.jpg", "temple.jpg"] * 3
    alone = {name: ask(name) for name in set(names)}
    with ThreadPoolExecutor(len(names)) as threads:
        for name, answer in zip(names, threads.map(ask, names), strict=True):
            assert answer == alone[name]


def test_more_than_may_wait_are_turned_away(engine):
    busy = Server("serve", ENGINE_DIR=str(engine.engine_dir), MAX_CONCURRENCY="1", MAX_QUEUED_JOBS="0")
    try:
        busy.wait()
        with ThreadPoolExecutor(6) as threads:
            answers = list(threads.map(lambda _: busy.ask(image_base64=PHOTO), range(6)))
        statuses = {answer.status_code for answer in answers}
        assert statuses == {200, 503}
        turned_away = next(answer for answer in answers if answer.status_code == 503)
        assert turned_away.headers["retry-after"] == "1"
        assert busy.ask(image_base64=PHOTO).status_code == 200
    finally:
        busy.stop()


def test_metrics_count_what_was_answered(server):
    server.ask(image_base64=PHOTO)
    server.ask()
    told = server.client.get("/metrics").text
    assert f'da3_requests_total{{backend="onnxruntime-cpu",model="{NANO}",status="200"}}' in told
    assert 'status="400"' in told
    assert 'da3_stage_seconds_count{stage="inference"}' in told
    assert "da3_loaded_models 1.0" in told


def test_schemas_and_documentation_are_served(server):
    schema = server.client.get("/schema").json()
    assert "image_base64" in schema["request"]["$defs"]["DepthRequest"]["properties"]
    assert "unit" in schema["response"]["$defs"]["DepthResponse"]["properties"]
    openapi = server.client.get("/openapi.json").json()
    assert {"/runsync", "/run", "/status/{job_id}", "/ping", "/metrics", "/schema"} <= set(
        openapi["paths"]
    )
    named = json.dumps(openapi).split('"#/components/schemas/')[1:]
    assert {name.partition('"')[0] for name in named} <= set(openapi["components"]["schemas"])
    assert "swagger" in server.client.get("/docs").text


PATHS = [
    "/metrics",
    "/schema",
    "/docs",
    "/openapi.json",
    "/status/x",
    "/nothing",
    "/docs/run",
    "/v2/a/b/run",
]


@pytest.mark.parametrize("path", PATHS)
def test_with_a_key_nothing_but_ping_answers_without_it(locked, path):
    assert locked.client.post(path).status_code == 401
    assert locked.client.get(path).status_code == 401
    assert locked.client.get(path, headers={"da3-api-key": "wrong"}).status_code == 401
    assert locked.client.get(path, headers={"da3-api-key": KEY}).status_code != 401
    assert locked.client.get("/ping").status_code == 200


@pytest.mark.parametrize("path", ["/runsync", "/run", "/v2/id/runsync", "/v2/id/run"])
@pytest.mark.parametrize("name", ["da3-api-key", "DA3-API-KEY"])
def test_the_key_in_a_header_of_any_case_or_in_the_input(locked, path, name):
    fields = {"image_base64": text(encode(Image.new("L", (84, 84))))}
    for wrong in ({}, {"api_key": "wrong"}, {"api_key": None}):
        answer = locked.ask(path, **fields, **wrong)
        assert answer.status_code == 401
        assert KEY not in answer.text
    assert locked.ask(path, headers={name: "wrong"}, **fields).status_code == 401
    assert locked.ask(path, headers={name: KEY}, **fields).status_code == 200
    assert locked.ask(path, **fields, api_key=KEY).status_code == 200
    assert locked.client.post(path, content=b"{").status_code == 401
    assert locked.client.post(path, content=b"{", headers={name: KEY}).status_code == 400


def test_another_address_needs_a_key_or_a_word(engine, tmp_path):
    port = str(free_port())
    refused = run_module("da3_runtime", "serve", MODEL=NANO, PORT=port, DA3_HOST="0.0.0.0")
    assert refused.code == 2
    assert "DA3_API_KEY" in refused.stderr
    assert "DA3_ALLOW_ANONYMOUS=1" in refused.stderr
    refused = run_module("da3_runtime", MODEL=NANO, PORT=port, RUNPOD_ENDPOINT_ID="x")
    assert refused.code == 2, "a load-balancing worker listens on every address"
    allowed = Server(DA3_HOST="0.0.0.0", DA3_ALLOW_ANONYMOUS="1", ENGINE_DIR=str(engine.engine_dir))
    try:
        allowed.wait()
        assert allowed.ask(image_base64=PHOTO).status_code == 200
    finally:
        allowed.stop()


def test_a_load_balancing_worker_has_its_health_on_a_port_of_its_own(engine):
    health = free_port()
    worker = Server(
        RUNPOD_ENDPOINT_ID="x",
        PORT_HEALTH=str(health),
        DA3_API_KEY=KEY,
        ENGINE_DIR=str(engine.engine_dir),
    )
    try:
        worker.wait()
        with httpx.Client(base_url=f"http://127.0.0.1:{health}") as client:
            assert client.get("/ping").status_code == 200
            assert client.get("/metrics").status_code == 404
        assert worker.ask(image_base64=PHOTO, api_key=KEY).status_code == 200
    finally:
        worker.stop()


def test_a_taken_port_is_one_sentence(server):
    done = run_module("da3_runtime", "serve", MODEL=NANO, PORT=str(server.port))
    assert done.code == 2
    assert f"PORT: cannot listen on 127.0.0.1:{server.port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_cannot_be_had_is_unhealthy_and_says_why(tmp_path):
    broken = Server("serve", ENGINE_DIR=str(tmp_path), WEIGHTS=str(tmp_path))
    try:
        for _ in range(600):
            try:
                status = broken.client.get("/ping").status_code
            except httpx.TransportError:
                status = None
            if status == 503:
                break
            time.sleep(0.05)
        assert status == 503
        answer = broken.ask(image_base64=PHOTO)
        assert answer.status_code == 503
        assert "cannot be loaded here" in answer.json()["error"]
        assert str(tmp_path) not in answer.text
        assert "WEIGHTS" in "".join(broken.log)
    finally:
        broken.stop()


def test_no_engine_and_eager_answers_with_a_warning(tmp_path):
    eager = Server("serve", ENGINE_DIR=str(tmp_path), PROCESSING_RES="140")
    try:
        statuses = eager.wait()
        assert 204 in statuses, "loading takes a while"
        output = eager.ask(image_base64=PHOTO).json()["output"]
        assert output["backend"] == "eager"
        assert any("eager" in warning for warning in output["warnings"])
    finally:
        eager.stop()


def test_models_are_asked_for_in_turn(server, engine, sdt_engine):
    for use_sdt_head, head in ((True, "SDTHeadAdapter"), (False, "DualDPT"), (True, "SDTHeadAdapter")):
        output = server.ask(image_base64=PHOTO, use_sdt_head=use_sdt_head).json()["output"]
        assert output["head_type"] == head
        assert "load" in output["timings_ms"], "one model stays loaded"
    assert "load" not in server.ask(image_base64=PHOTO, use_sdt_head=True).json()["output"]["timings_ms"]


def test_told_to_stop_it_finishes_the_request_in_hand(engine):
    server = Server("serve", ENGINE_DIR=str(engine.engine_dir))
    server.wait()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(server.ask, image_base64=text(encode(Image.new("1", (4096, 4096)))))
        time.sleep(0.3)
        os.kill(server.process.pid, signal.SIGTERM)
        assert asked.result(60).status_code == 200
    assert server.process.wait(60) in (0, -signal.SIGTERM)


def test_a_model_that_cannot_be_loaded_leaves_a_worker_healthy(server):
    answer = server.ask(image_base64=PHOTO, model_id="da3-giant", use_ray_pose=True)
    assert answer.status_code == 503
    assert server.client.get("/ping").status_code == 200


def test_no_log_line_holds_a_key_or_a_picture(locked):
    assert locked.ask(image_base64=PHOTO, api_key=KEY).status_code == 200
    locked.ask(image_base64=PHOTO, api_key="wrong key")
    job = locked.ask(api_key=KEY).json()["id"]
    while f"job {job}" not in (log := "".join(locked.log)):
        time.sleep(0.01)
    assert KEY not in log
    assert PHOTO[:40] not in log


def test_a_lost_gpu_makes_a_server_unhealthy(engine):
    service = Service(Settings.of(engine_dir=engine.engine_dir, model_id=NANO))
    service.load_default()
    client = TestClient(make_app(service, threading.Thread()))
    assert client.get("/ping").status_code == 200
    service.is_lost = True
    assert client.get("/ping").status_code == 503
    answer = client.post("/runsync", json={"input": {"image_base64": PHOTO}})
    assert (answer.status_code, answer.json()["status"]) == (500, "FAILED")
    assert "needs a fresh one" in answer.json()["error"]
    assert answer.json()["output"] == {"status": 500}
