"""The example clients, run against a server on loopback and against a stand-in for RunPod's queue."""

import base64
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading

import pytest
from PIL import Image

from tests.support.paths import NANO, PHOTOS, ROOT
from tests.support.processes import Server, clean_env

CLIENTS = PHOTOS / "clients"
COMMANDS = {
    "client.py": [sys.executable],
    "client.mjs": ["node"],
    "client.sh": ["bash"],
}
TOOLS = {"client.py": (), "client.mjs": ("node",), "client.sh": ("bash", "curl", "jq")}
KINDS = ("runsync", "run", "load-balancing")
# Characters that are special in JSON or in a shell.
KEY = """a "key" with \\ and 'quotes' $HOME"""


@pytest.fixture(params=COMMANDS)
def client(request):
    """Runs a client to its end."""
    missing = [tool for tool in TOOLS[request.param] if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{request.param} needs {', '.join(missing)}")

    def run(*args, **env):
        line = [*COMMANDS[request.param], str(CLIENTS / request.param), *map(str, args)]
        return subprocess.run(line, env=clean_env(**env), capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """A server with a key. It runs eager, so that these tests, which mostly wait, need not wait for an engine."""
    engines = tmp_path_factory.mktemp("engines")
    made = Server("serve", ENGINE_DIR=str(engines), BACKEND="eager", DA3_API_KEY=KEY)
    made.wait()
    yield made
    made.stop()


class Endpoint(http.server.BaseHTTPRequestHandler):
    """A stand-in for RunPod: it records requests and returns prepared responses."""

    def do_GET(self):
        self.respond()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.respond(json.loads(body))

    def respond(self, body=None):
        self.server.asked.append((self.command, self.path, dict(self.headers.items()), body))
        status, content = self.server.responses.pop(0)
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    made.asked, made.address = [], f"http://127.0.0.1:{made.server_port}/v2/id"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


PREVIEW = b"a preview"
OUTPUT = {
    "image_base64": base64.b64encode(PREVIEW).decode(),
    "unit": "m",
    "min_depth": 0.5,
    "max_depth": 12.25,
}
DONE = (200, {"id": "a-job", "status": "COMPLETED", "output": OUTPUT})


def unfinished(status):
    return 200, {"id": "a-job", "status": status}


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_saves_the_preview_and_prints_unit_and_range(client, locked, kind, tmp_path):
    out, photo = tmp_path / "a depth.png", PHOTOS / "cat.jpg"
    done = client(kind, f"http://127.0.0.1:{locked.port}/", photo, out, DA3_API_KEY=KEY, MODEL_ID=NANO)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as preview, Image.open(photo) as original:
        assert preview.size == original.size
        assert preview.mode == "L"
    data = base64.b64encode(photo.read_bytes()).decode()
    output = locked.ask(image_base64=data, api_key=KEY).json()["output"]
    printed = re.fullmatch(rf"{re.escape(str(out))}: unit relative, min (\S+), max (\S+)\n", done.stdout)
    assert printed, done.stdout
    assert float(printed[1]) == pytest.approx(output["min_depth"])
    assert float(printed[2]) == pytest.approx(output["max_depth"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_key_or_model_gives_one_sentence(client, locked, kind, tmp_path):
    address, out = f"http://127.0.0.1:{locked.port}", tmp_path / "depth.png"
    done = client(kind, address, PHOTOS / "cat.jpg", out, DA3_API_KEY="wrong")
    assert done.returncode == 1
    assert done.stderr.startswith("error: HTTP 401: The API key is missing or wrong")
    done = client(kind, address, PHOTOS / "cat.jpg", out, DA3_API_KEY=KEY, MODEL_ID="da3-tiny")
    assert done.returncode == 1
    assert "model_id 'da3-tiny' is not a known model" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_a_wrong_command_line_photo_or_address_gives_no_traceback(client, tmp_path):
    photo = PHOTOS / "cat.jpg"
    for args in ((), ("swim", "http://127.0.0.1:9", photo), ("run", "http://127.0.0.1:9", tmp_path / "no.jpg"),
                 ("run", "http://127.0.0.1:9", photo)):  # fmt: skip
        done = client(*args)
        assert done.returncode == 1
        assert done.stderr
        assert "Traceback" not in done.stderr
        assert "    at " not in done.stderr


@pytest.mark.parametrize("kind", ["runsync", "run"])
def test_a_client_polls_the_status_until_the_job_is_done(client, endpoint, kind, tmp_path):
    """RunPod's /runsync returns after a while even if the job is still running."""
    endpoint.responses = [unfinished("IN_QUEUE"), unfinished("IN_PROGRESS"), unfinished("RUNNING"), DONE]
    out = tmp_path / "depth.png"
    done = client(
        kind, endpoint.address, PHOTOS / "cat.jpg", out, RUNPOD_API_KEY="account", DA3_API_KEY=KEY
    )
    assert done.stdout == f"{out}: unit m, min 0.5, max 12.25\n", done.stderr
    assert out.read_bytes() == PREVIEW
    (method, path, headers, body), *later = endpoint.asked
    assert (method, path) == ("POST", f"/v2/id/{kind}")
    assert headers["Authorization"] == "Bearer account"
    assert body["input"]["api_key"] == KEY
    assert base64.b64decode(body["input"]["image_base64"]) == (PHOTOS / "cat.jpg").read_bytes()
    assert [(method, path) for method, path, *_ in later] == [("GET", "/v2/id/status/a-job")] * 3


def test_a_load_balancing_endpoint_gets_the_request_once_it_is_ready(client, endpoint, tmp_path):
    endpoint.responses = [(400, {"error": "no workers available"}), (204, None), (200, {}), DONE]
    out = tmp_path / "depth.png"
    done = client("load-balancing", endpoint.address, PHOTOS / "cat.jpg", out, DA3_API_KEY=KEY)
    assert out.read_bytes() == PREVIEW, done.stderr
    paths = [path.removeprefix("/v2/id") for _, path, *_ in endpoint.asked]
    assert paths == ["/ping", "/ping", "/ping", "/runsync"]
    _, _, headers, body = endpoint.asked[-1]
    assert {name.lower(): value for name, value in headers.items()}["da3-api-key"] == KEY
    assert set(body["input"]) == {"image_base64"}


def test_a_failed_job_ends_with_its_error(client, endpoint, tmp_path):
    failed = {"id": "a-job", "status": "FAILED", "error": "No image.", "output": {"status": 400}}
    endpoint.responses = [unfinished("IN_QUEUE"), (200, failed)]
    done = client("run", endpoint.address, PHOTOS / "cat.jpg", tmp_path / "depth.png")
    assert (done.returncode, done.stderr) == (1, "error: HTTP 200: No image.\n")


def test_a_preview_in_a_bucket_is_downloaded_without_the_keys(client, endpoint, tmp_path):
    place = f"{endpoint.address}/bucket/preview.png"
    output = {name: value for name, value in OUTPUT.items() if name != "image_base64"}
    endpoint.responses = [(200, {"id": "a", "status": "COMPLETED", "output": output | {"image_url": place}}),
                        (200, {})]  # fmt: skip
    out = tmp_path / "depth.png"
    done = client(
        "runsync", endpoint.address, PHOTOS / "cat.jpg", out, RUNPOD_API_KEY="account", DA3_API_KEY=KEY
    )
    assert out.read_bytes() == b"{}", done.stderr
    _, path, headers, _ = endpoint.asked[-1]
    assert path == "/v2/id/bucket/preview.png"
    assert "account" not in str(headers)
    assert "key" not in str(headers)


def test_the_documentation_links_every_client_and_copies_none():
    text = (ROOT / "docs" / "clients.md").read_text()
    for name in COMMANDS:
        assert f"(../examples/clients/{name})" in text
        lines = (CLIENTS / name).read_text().splitlines()
        assert not [line for line in lines if len(line.strip()) > 40 and line.strip() in text]
    for kind in KINDS:
        assert re.search(rf"client\.\w+ {kind} ", text)
