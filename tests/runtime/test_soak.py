"""Good, bad and rude clients, many at once, at one server: right answers, and as little held after as before.

A short while; ``make soak`` goes on for SOAK seconds and writes what came of it to SOAK_OUT.
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
from tests.conftest import PHOTOS, Server, depth_of, resident_mb
from tests.runtime.test_http_server import WRONG, encode, picture, text

SECONDS = float(os.environ.get("SOAK") or 5)
CLIENTS = 12
# Less than the clients, so that some are turned away.
LIMITS = {"MAX_CONCURRENCY": "4", "MAX_QUEUED_JOBS": "4", "MAX_BATCH": "4"}
# A batch's last bits are not those of an image alone.
NEAR = 1e-4
ROOM_MB = 32  # for what libraries and the allocator's arenas keep
ODDS = {"good": 0.55, "bad": 0.25, "later": 0.02, "rude": 0.1, "look": 0.08}
BAD = [(fields, status) for fields, status, _ in WRONG.values() if len(str(fields)) < 100_000]


class Good(NamedTuple):
    """A request, and its answer when nothing else is asked."""

    fields: dict[str, object]
    size: tuple[int, int]
    depth: np.ndarray


def requests():
    """Requests whose images, formats, sizes and options differ, so that no answer is another's."""
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
            "image_base64": text(encode(image.resize(size), ("JPEG", "PNG", "WEBP")[number % 3])),
            "processing_res": (140, 168, 196)[number % 3],
            "outputs": ["depth_npz", "preview"] if number % 2 else ["depth_npz"],
            "output_size": "model" if number % 5 == 0 else "original",
        }
        made.append(fields)
    return made


def check(good, output):
    """An answer is that of its own request."""
    assert (output["width"], output["height"]) == good.size
    depth = depth_of(output)
    assert depth.shape == good.depth.shape
    assert np.abs(depth / good.depth - 1).max() < NEAR
    if "preview" in good.fields["outputs"]:
        assert picture(output).size == depth.shape[::-1]


class Clients:
    """What clients do to a server, and what came of it."""

    def __init__(self, server, goods):
        self.server = server
        self.goods = goods
        self.outcomes = Counter()
        self.seconds = []
        self.kept_bytes = 0  # of answers of /run, which the server keeps for half an hour
        self._lock = threading.Lock()

    def run(self, seconds, seed):
        """All of them, until that many seconds have passed; raises what any of them found wrong."""
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
                    if (kind, outcome) == ("good", "answered"):
                        self.seconds.append(time.monotonic() - start)

    def _turned_away(self, answer, rng):
        """Whether the queue was full; then the client waits, some longer than others."""
        if answer.status_code != 503:
            return False
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"] == "8 requests are waiting or worked on already; try again later."
        time.sleep(rng.uniform(0, 0.2))
        return True

    def _good(self, client, rng):
        good = rng.choice(self.goods)
        answer = client.post("/runsync", json={"input": good.fields})
        if self._turned_away(answer, rng):
            return "turned away"
        assert answer.status_code == 200, answer.text[:400]
        check(good, answer.json()["output"])
        return "answered"

    def _bad(self, client, rng):
        fields, status = rng.choice(BAD)
        answer = client.post("/runsync", json={"input": fields})
        if self._turned_away(answer, rng):
            return "turned away"
        assert answer.status_code == status, answer.text[:400]
        return "refused"

    def _later(self, client, rng):
        good = self.goods[0]
        answer = client.post("/run", json={"input": good.fields})
        if self._turned_away(answer, rng):
            return "turned away"
        path = f"/status/{answer.json()['id']}"
        while (told := client.get(path)).json()["status"] != "COMPLETED":
            assert told.json()["status"] in ("IN_QUEUE", "IN_PROGRESS"), told.text
            time.sleep(0.05)
        check(good, told.json()["output"])
        with self._lock:
            self.kept_bytes += len(told.content)
        return "answered"

    def _rude(self, client, rng):
        """Half a request, or a whole one, from a client that does not wait for the answer."""
        body = json.dumps({"input": rng.choice(self.goods).fields}).encode()
        head = f"POST /runsync HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        sent = rng.choice([body, body[: len(body) // 2], b"", b"\x00" * 100])
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=10) as connection:
            connection.sendall(head + sent)
            if rng.random() < 0.5:
                # Reset, not an orderly end.
                connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
                )
        return "gone"

    def _look(self, client, rng):
        path = rng.choice(["/ping", "/metrics", "/schema", "/status/nothing"])
        assert client.get(path).status_code == (404 if "status" in path else 200)
        return "answered"


def held(server):
    """What a server that nothing is asked of holds: megabytes, files, threads."""
    while waiting(server):
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


def waiting(server):
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
def goods(server):
    found = []
    for fields in requests():
        output = server.ask(**fields).json()["output"]
        found.append(Good(fields, (output["width"], output["height"]), depth_of(output)))
    return found


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc of Linux")
@pytest.mark.timeout(SECONDS * 3 + 240)
def test_many_clients_leave_nothing_behind_and_every_answer_is_right(server, goods):
    clients = Clients(server, goods)
    clients.run(SECONDS / 2, "warm-up")
    before, kept_before = held(server), clients.kept_bytes
    start = time.monotonic()
    clients.run(SECONDS, "soak")
    lasted = time.monotonic() - start
    after, kept_mb = held(server), (clients.kept_bytes - kept_before) / 2**20
    outcomes = clients.outcomes
    if out := os.environ.get("SOAK_OUT"):
        told = {
            "clients": CLIENTS, "seconds": round(lasted), "outcomes": dict(outcomes.most_common()),
            "median_ms": round(float(np.median(clients.seconds)) * 1000),
            "p99_ms": round(float(np.percentile(clients.seconds, 99)) * 1000),
            "before": before, "after": after, "of_it_answers_kept_mb": round(kept_mb, 1),
        }  # fmt: skip
        versions = installed(("fastapi", "numpy", "onnxruntime", "uvicorn"))
        Path(out).write_text(json.dumps(told | provenance(versions), indent=1) + "\n", encoding="utf-8")
    assert {"good: answered", "good: turned away", "bad: refused", "rude: gone"} <= set(outcomes)
    assert after["mb"] < before["mb"] + kept_mb + ROOM_MB
    assert after["files"] == before["files"]
    # Pools of threads fill one by one as they are needed, asyncio's to this many.
    assert after["threads"] <= before["threads"] + (os.cpu_count() or 1) + 4
    assert not [line for line in server.log if "Traceback" in line]


def test_told_to_stop_it_answers_what_it_has_and_takes_no_more(engine, goods):
    stopped = Server("serve", ENGINE_DIR=str(engine.engine_dir), MAX_CONCURRENCY="1")
    stopped.wait()
    long = [good.fields | {"processing_res": 504, "outputs": ["depth_npz"]} for good in goods[:8]]
    expected = [depth_of(stopped.ask(**fields).json()["output"]) for fields in long]
    with ThreadPoolExecutor(len(long)) as threads:
        asked = [threads.submit(stopped.ask, **fields) for fields in long]
        while sum(each.done() for each in asked) + waiting(stopped) < len(long):
            time.sleep(0.005)
        os.kill(stopped.process.pid, signal.SIGTERM)
        answers = [each.result(60) for each in asked]
    assert [answer.status_code for answer in answers] == [200] * len(long)
    for depth, answer in zip(expected, answers, strict=True):
        np.testing.assert_allclose(depth_of(answer.json()["output"]), depth, rtol=NEAR)
    with pytest.raises(httpx.TransportError):
        stopped.ask(**goods[0].fields)
    assert stopped.process.wait(60) in (0, -signal.SIGTERM)
