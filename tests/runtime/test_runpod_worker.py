"""The RunPod queue worker in the SDK's local modes, and the choice of the serving mode."""

import asyncio
import base64
import http.server
import json
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from runpod.serverless.modules.rp_job import run_job

from da3_runtime.errors import SettingError
from da3_runtime.serve import runpod_worker
from da3_runtime.serve.mode import AUTO, Mode, find_mode
from da3_runtime.serve.runpod_worker import make_handler
from da3_runtime.serve.service import Service
from da3_runtime.settings import Settings
from tests.support.paths import NANO, PHOTOS, ROOT
from tests.support.processes import clean_env, run_module
from tests.support.stand_in import until

PHOTO = base64.b64encode((PHOTOS / "coffee.jpg").read_bytes()).decode()


def handler(engine, *args, **env):
    return run_module(
        "da3_runtime.handler", *args, MODEL_ID=NANO, ENGINE_DIR=str(engine.engine_dir), **env
    )


@pytest.fixture(scope="module")
def local_api(engine):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    env = clean_env(MODEL_ID=NANO, ENGINE_DIR=str(engine.engine_dir), DA3_API_KEY="a key")
    process = subprocess.Popen(
        [sys.executable, "-m", "da3_runtime.handler", "--rp_serve_api", "--rp_api_port", str(port)],
        cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with httpx.Client(base_url=f"http://localhost:{port}", timeout=60) as client:
        for _ in range(600):
            try:
                client.get("/")
                break
            except httpx.TransportError:
                assert process.poll() is None
                time.sleep(0.05)
        yield client
    process.terminate()
    process.wait(30)


def test_the_sdk_gives_as_many_jobs_as_batches_need(monkeypatch, serve, network):
    service, given = serve(), {}
    sdk = SimpleNamespace(serverless=SimpleNamespace(start=given.update))
    monkeypatch.setattr(runpod_worker, "Service", lambda settings: service)
    monkeypatch.setattr(runpod_worker, "import_sdk", lambda: sdk)
    assert runpod_worker.start_worker(service.settings) == 0
    network.may_run.clear()

    async def work():
        jobs = range(given["concurrency_modifier"](1))
        fields = {"image_base64": PHOTO, "outputs": ["camera"]}
        answers = [given["handler"]({"id": str(number), "input": fields}) for number in jobs]
        running = asyncio.gather(*answers)
        await until(lambda: service.stages["network"].in_hand == len(jobs))
        network.may_run.set()
        return await running

    assert not any("error" in answer for answer in asyncio.run(work()))
    assert max(network.batches) == 8


def test_the_sdks_local_server_runs_a_job(local_api):
    data = {"input": {"image_base64": PHOTO, "api_key": "a key"}}
    response = local_api.post("/runsync", json=data).json()
    assert response["status"] == "COMPLETED"
    assert {"image_base64", "min_depth", "max_depth", "head_type"} <= set(response["output"])
    assert response["output"]["model_id"] == NANO


def test_a_failed_job_is_marked_failed_with_one_sentence(local_api):
    for data, message in (
        ({}, "The API key is missing"),
        ({"api_key": "a key"}, "No image"),
        ({"api_key": "a key", "image_base64": PHOTO, "gamma": "x"}, "gamma must be"),
    ):
        response = local_api.post("/runsync", json={"input": data}).json()
        assert response["status"] == "FAILED"
        assert message in response["error"]
        assert "Traceback" not in response["error"]


def test_test_input_runs_one_job(engine):
    job = json.dumps({"input": {"image_base64": PHOTO, "outputs": ["camera"]}})
    done = handler(engine, "--test_input", job)
    assert done.code == 0, done.stdout + done.stderr
    assert "completed successfully" in done.stdout
    assert "intrinsics" in done.stdout
    failed = handler(engine, "--test_input", '{"input": {"image_base64": ""}}')
    assert failed.code == 1
    assert "The image is empty" in failed.stdout


class Platform(http.server.BaseHTTPRequestHandler):
    """A stand-in for RunPod's queue, as far as a worker uses it."""

    def do_GET(self):
        job = self.server.jobs.pop(0) if "/job-take" in self.path and self.server.jobs else None
        if job is None:
            time.sleep(0.1)
        content = [job] if "/job-take-batch/" in self.path else job
        self.respond(200 if job else 204, json.dumps(content).encode() if job else b"")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        _, _, job = self.path.partition("/job-done/")
        self.server.done[job.partition("?")[0]] = json.loads(body)
        self.respond(200, b"{}")

    def respond(self, status, body):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_queue_worker_takes_jobs_and_returns_results(engine):
    """Without a verb, the environment selects the queue worker; the queue is on loopback."""
    platform = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Platform)
    large = {"image_base64": PHOTO, "outputs": ["preview", "depth_npz"]}
    jobs = {
        "good": {"image_base64": PHOTO},
        "wrong": {"gamma": 0, "image_base64": PHOTO},
        "large": large,
    }
    platform.jobs = [{"id": name, "input": data} for name, data in jobs.items()]
    platform.done = {}
    threading.Thread(target=platform.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{platform.server_port}"
    env = clean_env(
        MODEL_ID=NANO, ENGINE_DIR=str(engine.engine_dir), RUNPOD_ENDPOINT_ID="x",
        RUNPOD_WEBHOOK_GET_JOB=f"{address}/job-take/$ID?a=b",
        RUNPOD_WEBHOOK_POST_OUTPUT=f"{address}/job-done/$ID?a=b", RUNPOD_SKIP_GPU_CHECK="true",
        RUNPOD_SKIP_AUTO_SYSTEM_CHECKS="true", MAX_RESPONSE_BYTES="300000",
    )  # fmt: skip
    worker = subprocess.Popen(
        [sys.executable, "-m", "da3_runtime"], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while len(platform.done) < 3 and time.monotonic() < deadline and worker.poll() is None:
            time.sleep(0.05)
    finally:
        worker.terminate()
        log, _ = worker.communicate(timeout=60)
        platform.shutdown()
    assert set(platform.done) == set(jobs), log
    assert platform.done["good"]["output"]["model_id"] == NANO
    assert platform.done["wrong"]["output"] == {"status": 400}
    assert "gamma must be" in platform.done["wrong"]["error"]
    assert platform.done["large"]["output"] == {"status": 413}
    assert "depth_npz (" in platform.done["large"]["error"]
    assert PHOTO[:40] not in log
    assert platform.done["good"]["output"]["image_base64"][:40] not in log
    assert worker.returncode == 0, log


def test_warmup_exits_with_0_only_if_the_model_ran(engine, sdt_engine, tmp_path):
    assert handler(engine, "--warmup").code == 0
    assert handler(engine, "--warmup", "--model-id", NANO.upper(), "--use-sdt-head").code == 0
    unknown = handler(engine, "--warmup", "--model-id", "da3-tiny")
    assert unknown.code == 2
    assert "da3-tiny" in unknown.stderr
    nothing = run_module(
        "da3_runtime.handler",
        "--warmup",
        MODEL_ID=NANO,
        ENGINE_DIR=str(tmp_path),
        BACKEND="onnxruntime-cpu",
    )
    assert nothing.code == 2
    assert "no engine has been built" in nothing.stderr
    assert "Traceback" not in unknown.stderr + nothing.stderr


def test_the_sdks_local_server_needs_a_key_on_a_public_address(engine):
    refused = handler(engine, "--rp_serve_api", "--rp_api_host", "0.0.0.0")
    assert refused.code == 2
    assert "DA3_API_KEY" in refused.stderr


@pytest.mark.parametrize(
    ("variable", "value"),
    [("MODEL_ID", "da3-tiny"), ("PORT", "many"), ("USE_SDT_HEAD", "perhaps"), ("MAX_LOADED_MODELS", "0"),
     ("DA3_MODE", "swarm"), ("OUTPUT_RETENTION_DAYS", "-1"), ("BACKEND", "abacus")],
)  # fmt: skip
def test_a_wrong_setting_is_named_at_the_start(variable, value):
    done = run_module("da3_runtime", **({"MODEL_ID": NANO} | {variable: value}))
    assert done.code == 2
    name = "MODEL" if variable == "MODEL_ID" else variable
    assert f"error: {name} " in done.stderr
    assert value in done.stderr


QUEUE = {"RUNPOD_WEBHOOK_GET_JOB": "https://x/job-take/$ID", "RUNPOD_ENDPOINT_ID": "x"}


@pytest.mark.parametrize(
    ("wanted", "env", "mode"),
    [
        (AUTO, {}, Mode.HTTP),
        (AUTO, {"PORT": "80"}, Mode.HTTP),
        (AUTO, QUEUE, Mode.QUEUE),
        (AUTO, {"RUNPOD_ENDPOINT_ID": "x"}, Mode.LOAD_BALANCER),
        (AUTO, QUEUE | {"PORT_HEALTH": "80"}, Mode.LOAD_BALANCER),
        ("http", QUEUE, Mode.HTTP),
        ("queue", {}, Mode.QUEUE),
        ("load-balancer", {}, Mode.LOAD_BALANCER),
    ],
)
def test_the_mode_is_derived_from_the_environment(wanted, env, mode):
    assert find_mode(wanted, env) is mode


def test_an_unknown_mode_lists_the_known_ones():
    with pytest.raises(SettingError, match="auto, queue, load-balancer, http"):
        find_mode("swarm", {})


def test_a_lost_gpu_has_the_platform_stop_the_worker():
    service = Service(Settings.of(model_id=NANO))
    service.is_lost = True
    job = {"id": "a job", "input": {"image_base64": PHOTO}}
    result = asyncio.run(run_job(make_handler(service), job))
    assert result["stopPod"] is True
    assert "must be restarted" in result["error"]
    assert result["output"] == {"status": 500}
