"""Many clients at one server, valid, invalid and misbehaving: every response is right and nothing leaks.

It runs for a few seconds; ``make soak`` runs it for SOAK seconds and writes the result to SOAK_OUT.
"""

import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.record import installed, provenance
from tests.support.images import base64_text, encode, image_of
from tests.support.invalid_requests import INVALID_REQUESTS
from tests.support.paths import PHOTOS
from tests.support.processes import Server, depth_of, resident_mb

SECONDS = float(os.environ.get("SOAK") or 2)
CLIENTS = 12
# Less capacity than clients, so that some requests are refused.
LIMITS = {"MAX_CONCURRENCY": "4", "MAX_QUEUED_JOBS": "4", "MAX_BATCH": "4"}
# Largest relative error of depth: a batch rounds differently from a single image.
TOLERANCE = 1e-4
ALLOWANCE_MB = 32  # memory that libraries and the allocator's arenas may keep
WARM_UP_MB = 8  # the server is warm once a round of the warm-up adds less than this
WARM_UP_ROUNDS = 15
ODDS = {"valid": 0.55, "invalid": 0.25, "job": 0.02, "abort": 0.1, "monitor": 0.08}
INVALID = [
    (fields, status) for fields, status, _ in INVALID_REQUESTS.values() if len(str(fields)) < 100_000
]


class Valid(NamedTuple):
    """A request, and the size and depth of its response from an idle server."""

    fields: dict[str, object]
    size: tuple[int, int]
    depth: np.ndarray


def requests():
    """Requests with different images, formats, sizes and options, so that mixed-up responses are noticed."""
    rng = random.Random(0)
    made = []
    for number in range(16):
        with Image.open(PHOTOS / ("cat.jpg", "coffee.jpg", "temple.jpg")[number % 3]) as photo:
            left, top = rng.randrange(photo.width // 3), rng.randrange(photo.height // 3)
            image = photo.convert("RGB").crop(
                (left, top, left + photo.width // 2, top + photo.height // 2)
            )
        size = ((320, 240), (180, 240), (640, 360), (97, 111))[number % 4]
        fields = {
            "image_base64": base64_text(encode(image.resize(size), ("JPEG", "PNG", "WEBP")[number % 3])),
            "processing_res": (140, 168, 196)[number % 3],
            "outputs": ["depth_npz", "preview"] if number % 2 else ["depth_npz"],
            "output_size": "model" if number % 5 == 0 else "original",
        }
        made.append(fields)
    return made


def check(valid, output):
    """Check that a response belongs to its request."""
    assert (output["width"], output["height"]) == valid.size
    depth = depth_of(output)
    assert depth.shape == valid.depth.shape
    assert np.abs(depth / valid.depth - 1).max() < TOLERANCE
    if "preview" in valid.fields["outputs"]:
        assert image_of(output).size == depth.shape[::-1]


class Clients:
    """Clients of a server, and a count of the outcomes of their requests."""

    def __init__(self, server, valid_requests):
        self.server = server
        self.valid_requests = valid_requests
        self.outcomes = Counter()
        self.seconds = []
        self.kept_bytes = 0  # size of the results of /run, which the server keeps for half an hour
        self._lock = threading.Lock()

    def run(self, seconds, seed):
        """Run all clients for that many seconds; raise the first error of any of them."""
        until = time.monotonic() + seconds
        with ThreadPoolExecutor(CLIENTS) as threads:
            done = [threads.submit(self._client, f"{seed}/{number}", until) for number in range(CLIENTS)]
            for each in done:
                each.result()

    def _client(self, seed, until):
        rng = random.Random(seed)
        with httpx.Client(base_url=f"http://127.0.0.1:{self.server.port}", timeout=60) as client:
            while time.monotonic() < until:
                (kind,) = rng.choices(list(ODDS), list(ODDS.values()))
                start = time.monotonic()
                outcome = getattr(self, f"_{kind}")(client, rng)
                with self._lock:
                    self.outcomes[f"{kind}: {outcome}"] += 1
                    if (kind, outcome) == ("valid", "answered"):
                        self.seconds.append(time.monotonic() - start)

    def _is_refused(self, response, rng):
        """Whether the queue was full; the client then waits for a random time."""
        if response.status_code != 503:
            return False
        assert response.headers["retry-after"] == "1"
        assert "try again later" in response.json()["error"]
        time.sleep(rng.uniform(0, 0.2))
        return True

    def _valid(self, client, rng):
        valid = rng.choice(self.valid_requests)
        response = client.post("/runsync", json={"input": valid.fields})
        if self._is_refused(response, rng):
            return "queue full"
        assert response.status_code == 200, response.text[:400]
        check(valid, response.json()["output"])
        return "answered"

    def _invalid(self, client, rng):
        fields, status = rng.choice(INVALID)
        response = client.post("/runsync", json={"input": fields})
        if self._is_refused(response, rng):
            return "queue full"
        assert response.status_code == status, response.text[:400]
        return "rejected"

    def _job(self, client, rng):
        """An asynchronous request, polled until it is done."""
        valid = self.valid_requests[0]
        response = client.post("/run", json={"input": valid.fields})
        if self._is_refused(response, rng):
            return "queue full"
        path = f"/status/{response.json()['id']}"
        while (job := client.get(path)).json()["status"] != "COMPLETED":
            assert job.json()["status"] in ("IN_QUEUE", "IN_PROGRESS"), job.text
            time.sleep(0.05)
        check(valid, job.json()["output"])
        with self._lock:
            self.kept_bytes += len(job.content)
        return "answered"

    def _abort(self, client, rng):
        """Half a request, or a whole one, from a client that closes the connection without reading."""
        body = json.dumps({"input": rng.choice(self.valid_requests).fields}).encode()
        head = f"POST /runsync HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        sent = rng.choice([body, body[: len(body) // 2], b"", b"\x00" * 100])
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=10) as connection:
            connection.sendall(head + sent)
            if rng.random() < 0.5:
                # Close with a reset.
                connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
                )
        return "closed"

    def _monitor(self, client, rng):
        path = rng.choice(["/ping", "/metrics", "/schema", "/status/nothing"])
        assert client.get(path).status_code == (404 if "status" in path else 200)
        return "answered"


class BadClients:
    """Clients that are slow, silent, rude or gone, until the end of the ``with`` block."""

    def __init__(self, server, valid_requests):
        self.port = server.port
        self.fields = valid_requests[0].fields
        self.visits = Counter()
        self._over = threading.Event()

    def __enter__(self):
        self._threads = [
            threading.Thread(target=self._visit, args=(kind, number))
            for kind in ("slow", "silent", "rude", "gone")
            for number in range(8)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _visit(self, kind, seed):
        rng = random.Random(f"{kind}/{seed}")
        while True:
            self.visits[kind] += 1
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                    getattr(self, f"_{kind}")(connection, rng)
            except OSError:
                pass  # the server closes what it does not understand
            if self._over.wait(rng.uniform(0.5, 2)):
                return

    def _slow(self, connection, rng):
        connection.sendall(b"POST /runsync HTTP/1.1\r\nHost: a\r\nContent-Length: 9000\r\n\r\n")
        for _ in range(rng.randrange(30)):
            connection.sendall(b"{")
            if self._over.wait(0.5):
                return

    def _silent(self, connection, rng):
        connection.sendall(
            rng.choice([b"", b"GET /ping", b"POST /run HTTP/1.1\r\nContent-Length: 9\r\n\r\n"])
        )
        self._over.wait(rng.uniform(1, 10))

    def _rude(self, connection, rng):
        connection.sendall(rng.choice([rng.randbytes(3000), b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 9000]))

    def _gone(self, connection, rng):
        body = json.dumps({"input": self.fields}).encode()
        head = f"POST /runsync HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        connection.sendall(head + body)


def good_ones(server, valid_requests, seconds):
    """Response times in seconds of four clients that send a valid request every tenth of a second."""
    until, times = time.monotonic() + seconds, []

    def work(number):
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client:
            rng = random.Random(number)
            while time.monotonic() < until:
                valid = rng.choice(valid_requests)
                start = time.monotonic()
                response = client.post("/runsync", json={"input": valid.fields})
                times.append(time.monotonic() - start)
                assert response.status_code == 200, response.text[:400]
                check(valid, response.json()["output"])
                time.sleep(0.1)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    return times


def resources(server):
    """Memory in MB (2^20 bytes), open files and threads of a server, once it is idle."""
    while unfinished(server):
        time.sleep(0.05)
    server.client.close()
    server.client = httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60)
    time.sleep(1)
    proc = Path(f"/proc/{server.process.pid}")
    return {
        "mb": round(resident_mb(server.process.pid), 1),
        "files": len(list((proc / "fd").iterdir())),
        "threads": len(list((proc / "task").iterdir())),
    }


def warm_up(server, clients):
    """Run all clients until a round adds little memory: every thread first fills its own arena."""
    mb = []
    for number in range(WARM_UP_ROUNDS):
        clients.run(min(SECONDS / 2, 10), f"warm-up {number}")
        mb.append(resources(server)["mb"] - clients.kept_bytes / 2**20)
        if number and mb[-1] - mb[-2] < WARM_UP_MB:
            return
    pytest.fail(f"Memory still grows after {WARM_UP_ROUNDS} rounds of the warm-up, in MB: {mb}.")


def unfinished(server):
    """Number of requests that the server is working on or that wait."""
    (line,) = [
        each
        for each in server.client.get("/metrics").text.splitlines()
        if each.startswith("da3_unfinished_requests ")
    ]
    return float(line.split()[1])


@pytest.fixture(scope="module")
def server(engine):
    made = Server("serve", ENGINE_DIR=str(engine.engine_dir), **LIMITS)
    made.wait()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def valid_requests(server):
    found = []
    for fields in requests():
        output = server.ask(**fields).json()["output"]
        found.append(Valid(fields, (output["width"], output["height"]), depth_of(output)))
    return found


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.timeout(SECONDS * 3 + 240)
def test_every_response_is_right_and_nothing_leaks_under_load(server, valid_requests):
    clients = Clients(server, valid_requests)
    warm_up(server, clients)
    before, kept_before = resources(server), clients.kept_bytes
    start = time.monotonic()
    clients.run(SECONDS, "soak")
    lasted = time.monotonic() - start
    after, kept_mb = resources(server), (clients.kept_bytes - kept_before) / 2**20
    outcomes = clients.outcomes
    if out := os.environ.get("SOAK_OUT"):
        result = {
            "clients": CLIENTS, "seconds": round(lasted), "outcomes": dict(outcomes.most_common()),
            "median_ms": round(float(np.median(clients.seconds)) * 1000),
            "p99_ms": round(float(np.percentile(clients.seconds, 99)) * 1000),
            "before": before, "after": after, "of_it_answers_kept_mb": round(kept_mb, 1),
        }  # fmt: skip
        versions = installed(("fastapi", "numpy", "onnxruntime", "uvicorn"))
        Path(out).write_text(
            json.dumps(result | provenance(versions), indent=1) + "\n", encoding="utf-8"
        )
    assert {"valid: answered", "valid: queue full", "invalid: rejected", "abort: closed"} <= set(
        outcomes
    )
    assert after["mb"] < before["mb"] + kept_mb + ALLOWANCE_MB
    assert after["files"] == before["files"]
    # Thread pools start threads on demand; asyncio's default pool grows to this size.
    assert after["threads"] <= before["threads"] + (os.cpu_count() or 1) + 4
    assert not [line for line in server.log if "Traceback" in line]


@pytest.mark.timeout(SECONDS * 3 + 240)
def test_bad_clients_cost_the_good_ones_little(engine, valid_requests):
    """Parts with and without them in turn; only a long run compares the times."""
    server = Server("serve", ENGINE_DIR=str(engine.engine_dir))
    try:
        server.wait()
        alone, beside, visits = [], [], Counter()
        for _ in range(2):
            alone += good_ones(server, valid_requests, SECONDS / 4)
            with BadClients(server, valid_requests) as bad:
                beside += good_ones(server, valid_requests, SECONDS / 4)
            visits += bad.visits
    finally:
        server.stop()
    assert set(visits) == {"slow", "silent", "rude", "gone"}
    assert not [line for line in server.log if "Traceback" in line]
    one, other = (float(np.percentile(times, 99)) for times in (alone, beside))
    if out := os.environ.get("SOAK_OUT"):
        result = json.loads(Path(out).read_text())
        bad_clients = {
            "visits": dict(visits), "p99_ms_without": round(one * 1000),
            "p99_ms_beside": round(other * 1000), "times": round(other / one, 2),
        }  # fmt: skip
        Path(out).write_text(json.dumps(result | {"bad_clients": bad_clients}, indent=1) + "\n")
        assert other < 1.5 * one


def test_a_stopping_server_finishes_its_requests_and_accepts_no_more(engine, valid_requests):
    stopped = Server("serve", ENGINE_DIR=str(engine.engine_dir), MAX_CONCURRENCY="1")
    stopped.wait()
    slow = [
        each.fields | {"processing_res": 392, "outputs": ["depth_npz"]} for each in valid_requests[:6]
    ]
    expected = [depth_of(stopped.ask(**fields).json()["output"]) for fields in slow]
    with ThreadPoolExecutor(len(slow)) as threads:
        requests_sent = [threads.submit(stopped.ask, **fields) for fields in slow]
        while sum(each.done() for each in requests_sent) + unfinished(stopped) < len(slow):
            time.sleep(0.005)
        os.kill(stopped.process.pid, signal.SIGTERM)
        responses = [each.result(60) for each in requests_sent]
    assert [response.status_code for response in responses] == [200] * len(slow)
    for depth, response in zip(expected, responses, strict=True):
        np.testing.assert_allclose(depth_of(response.json()["output"]), depth, rtol=TOLERANCE)
    with pytest.raises(httpx.TransportError):
        stopped.ask(**valid_requests[0].fields)
    assert stopped.process.wait(60) == 0
