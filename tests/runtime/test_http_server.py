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
from tests.support.images import PHOTO, encode, image_of
from tests.support.images import base64_text as text
from tests.support.invalid_requests import INVALID_REQUESTS
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
    """A web site with photos, on loopback."""
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


def test_runsync_returns_runpods_envelope(server):
    response = server.ask(image_base64=PHOTO)
    assert response.status_code == 200
    envelope = response.json()
    assert set(envelope) == {"id", "status", "delayTime", "executionTime", "output"}
    assert envelope["status"] == "COMPLETED"
    output = envelope["output"]
    assert (output["backend"], output["model_id"]) == ("onnxruntime-cpu", NANO)
    with Image.open(PHOTOS / "cat.jpg") as photo:
        assert image_of(output).size == photo.size == (output["width"], output["height"])
    assert 0 < output["min_depth"] < output["max_depth"]


def test_the_references_documented_calls_work(server, locked, site, tmp_path):
    """The three curl calls of its README, with another host, image address, model and key."""
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
        response = json.loads(done.stdout)
        assert response["status"] == "COMPLETED", response
        assert image_of(response["output"]).mode == "L"


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
    assert image_of(output).size == (output["width"], output["height"])


@pytest.mark.parametrize("name", INVALID_REQUESTS)
def test_every_invalid_request_gets_its_status_and_one_sentence(server, name):
    fields, status, message = INVALID_REQUESTS[name]
    response = server.ask(**fields)
    assert response.status_code == status
    envelope = response.json()
    assert (envelope["status"], envelope["output"]) == ("FAILED", {"status": status})
    error = envelope["error"]
    assert message in error
    assert error.endswith(".")
    assert "\n" not in error
    assert "Traceback" not in error
    assert str(ROOT) not in error


@pytest.mark.parametrize(
    ("body", "message"),
    [(b"", "JSON"), (b"{", "JSON"), (b"[1]", "object"), (b'"x"', "object"), (b"[" * 100_000, "JSON"),
     (b'{"input": 5}', "input must be a JSON object"), (b"{}", "input must be a JSON object"), (b"\xff", "JSON")],
)  # fmt: skip
def test_a_body_that_is_not_a_job_is_400(server, body, message):
    response = server.client.post("/runsync", content=body)
    assert response.status_code == 400
    assert message in response.json()["error"]


def test_images_at_the_limits_are_accepted(server):
    for size in ((4096, 4096), (1, 1)):
        output = server.ask(image_base64=text(encode(Image.new("1", size)))).json()["output"]
        assert (output["width"], output["height"]) == size


def test_the_first_frame_of_an_animation_is_used(server):
    frames = [Image.new("RGB", (96, 96), color) for color in ("white", "black")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    output = server.ask(image_base64=text(data), outputs=["depth_npz"]).json()["output"]
    first = server.ask(image_base64=text(encode(frames[0])), outputs=["depth_npz"]).json()["output"]
    assert output["depth_npz_base64"] == first["depth_npz_base64"]


def test_a_too_large_body_is_rejected_while_it_arrives(engine):
    small = Server("serve", ENGINE_DIR=str(engine.engine_dir), MAX_IMAGE_BYTES="1000")
    try:
        small.wait()
        response = small.ask(image_base64="A" * 200_000)
        assert response.status_code == 413
        assert "MAX_IMAGE_BYTES" in response.json()["error"]
    finally:
        small.stop()


def test_run_and_status(server):
    queued = server.ask("/run", image_base64=PHOTO)
    assert queued.status_code == 200
    job = queued.json()["id"]
    assert queued.json()["status"] in ("IN_QUEUE", "IN_PROGRESS", "COMPLETED")
    for _ in range(600):
        envelope = server.client.get(f"/status/{job}").json()
        if envelope["status"] == "COMPLETED":
            break
        assert envelope["status"] in ("IN_QUEUE", "IN_PROGRESS")
        time.sleep(0.05)
    assert image_of(envelope["output"])
    failed = server.ask("/run").json()["id"]
    for _ in range(600):
        envelope = server.client.get(f"/status/{failed}").json()
        if envelope["status"] == "FAILED":
            break
        time.sleep(0.05)
    assert envelope["output"] == {"status": 400}
    assert "No image" in envelope["error"]
    assert server.client.get("/status/nothing").status_code == 404


def test_runpods_client_works_with_this_server(server, monkeypatch):
    import runpod

    monkeypatch.setattr(runpod, "endpoint_url_base", f"http://127.0.0.1:{server.port}/v2")
    endpoint = runpod.Endpoint("any-id", api_key="unused")
    output = endpoint.run_sync({"input": {"image_base64": PHOTO}}, timeout=60)
    assert image_of(output)
    job = endpoint.run({"input": {"image_base64": PHOTO}})
    assert image_of(job.output(timeout=60))
    assert job.status() == "COMPLETED"


def test_concurrent_requests_get_unchanged_results(server):
    def ask(name):
        data = text((PHOTOS / name).read_bytes())
        return server.ask(image_base64=data, outputs=["depth_npz"]).json()["output"]["depth_npz_base64"]

    names = ["cat.jpg", "coffee.jpg", "temple.jpg"] * 3
    alone = {name: ask(name) for name in set(names)}
    with ThreadPoolExecutor(len(names)) as threads:
        for name, response in zip(names, threads.map(ask, names), strict=True):
            assert response == alone[name]


def test_requests_beyond_the_queue_get_503(engine):
    busy = Server("serve", ENGINE_DIR=str(engine.engine_dir), MAX_CONCURRENCY="1", MAX_QUEUED_JOBS="0")
    try:
        busy.wait()
        with ThreadPoolExecutor(6) as threads:
            responses = list(threads.map(lambda _: busy.ask(image_base64=PHOTO), range(6)))
        statuses = {response.status_code for response in responses}
        assert statuses == {200, 503}
        turned_away = next(response for response in responses if response.status_code == 503)
        assert turned_away.headers["retry-after"] == "1"
        assert busy.ask(image_base64=PHOTO).status_code == 200
    finally:
        busy.stop()


def test_metrics_count_finished_requests(server):
    server.ask(image_base64=PHOTO)
    server.ask()
    metrics = server.client.get("/metrics").text
    assert f'da3_requests_total{{backend="onnxruntime-cpu",model="{NANO}",status="200"}}' in metrics
    assert 'status="400"' in metrics
    assert 'da3_stage_seconds_count{stage="inference"}' in metrics
    assert "da3_loaded_models 1.0" in metrics


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


PATHS = [
    "/metrics",
    "/schema",
    "/status/x",
    "/nothing",
    "/docs/run",
    "/v2/a/b/run",
]


@pytest.mark.parametrize("path", PATHS)
def test_every_path_but_ping_requires_the_key(locked, path):
    assert locked.client.post(path).status_code == 401
    assert locked.client.get(path).status_code == 401
    assert locked.client.get(path, headers={"da3-api-key": "wrong"}).status_code == 401
    assert locked.client.get(path, headers={"da3-api-key": KEY}).status_code != 401
    assert locked.client.get("/ping").status_code == 200


@pytest.mark.parametrize("path", ["/runsync", "/run", "/v2/id/runsync", "/v2/id/run"])
@pytest.mark.parametrize("name", ["da3-api-key", "DA3-API-KEY"])
def test_the_key_may_be_in_a_header_of_any_case_or_in_the_input(locked, path, name):
    fields = {"image_base64": text(encode(Image.new("L", (84, 84))))}
    for wrong in ({}, {"api_key": "wrong"}, {"api_key": None}):
        response = locked.ask(path, **fields, **wrong)
        assert response.status_code == 401
        assert KEY not in response.text
    assert locked.ask(path, headers={name: "wrong"}, **fields).status_code == 401
    assert locked.ask(path, headers={name: KEY}, **fields).status_code == 200
    assert locked.ask(path, **fields, api_key=KEY).status_code == 200
    assert locked.client.post(path, content=b"{").status_code == 401
    assert locked.client.post(path, content=b"{", headers={name: KEY}).status_code == 400


def test_a_public_address_needs_a_key_or_explicit_permission(engine, tmp_path):
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


def test_a_load_balancing_worker_serves_ping_on_its_health_port(engine):
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


def test_a_server_without_weights_is_unhealthy_and_logs_the_reason(tmp_path):
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
        response = broken.ask(image_base64=PHOTO)
        assert response.status_code == 503
        assert "cannot be loaded" in response.json()["error"]
        assert str(tmp_path) not in response.text
        assert "WEIGHTS" in "".join(broken.log)
    finally:
        broken.stop()


def test_falls_back_to_eager_with_a_warning_without_an_engine(tmp_path):
    eager = Server("serve", ENGINE_DIR=str(tmp_path), PROCESSING_RES="140")
    try:
        statuses = eager.wait()
        assert 204 in statuses, "loading takes a while"
        output = eager.ask(image_base64=PHOTO).json()["output"]
        assert output["backend"] == "eager"
        assert any("eager" in warning for warning in output["warnings"])
    finally:
        eager.stop()


def test_alternating_models_are_loaded_again_each_time(server, engine, sdt_engine):
    for use_sdt_head, head in ((True, "SDTHeadAdapter"), (False, "DualDPT"), (True, "SDTHeadAdapter")):
        output = server.ask(image_base64=PHOTO, use_sdt_head=use_sdt_head).json()["output"]
        assert output["head_type"] == head
        assert "load" in output["timings_ms"], "one model stays loaded"
    assert "load" not in server.ask(image_base64=PHOTO, use_sdt_head=True).json()["output"]["timings_ms"]


def test_sigterm_lets_the_running_request_finish(engine):
    server = Server("serve", ENGINE_DIR=str(engine.engine_dir))
    server.wait()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(server.ask, image_base64=text(encode(Image.new("1", (4096, 4096)))))
        time.sleep(0.3)
        os.kill(server.process.pid, signal.SIGTERM)
        assert asked.result(60).status_code == 200
    assert server.process.wait(60) == 0


def test_a_model_that_cannot_be_loaded_leaves_a_worker_healthy(server):
    response = server.ask(image_base64=PHOTO, model_id="da3-giant", use_ray_pose=True)
    assert response.status_code == 503
    assert server.client.get("/ping").status_code == 200


def test_no_log_line_contains_a_key_or_an_image(locked):
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
    response = client.post("/runsync", json={"input": {"image_base64": PHOTO}})
    assert (response.status_code, response.json()["status"]) == (500, "FAILED")
    assert "must be restarted" in response.json()["error"]
    assert response.json()["output"] == {"status": 500}
