"""The way of a request into the service: bodies, queue, downloads and batches, each bounded by itself."""

import asyncio
import contextlib
import gzip
import json
import socket
import time

import pytest
from starlette.requests import ClientDisconnect, Request

import da3_runtime.serve.service
from da3_runtime.errors import BusyError, ImageTooLargeError, RequestError
from da3_runtime.serve import bodies
from da3_runtime.serve.bodies import Bodies
from tests.support.images import PHOTO
from tests.support.paths import NANO
from tests.support.processes import Server
from tests.support.stand_in import client_of, until

KEY = "a key"
JOB = {"image_base64": PHOTO, "outputs": ["camera"]}


def test_with_default_settings_waiting_requests_run_as_batches_of_eight(serve, network):
    service = serve()
    network.may_run.clear()

    async def ask():
        jobs = [asyncio.ensure_future(service.respond(JOB, str(number))) for number in range(17)]
        await until(lambda: service.stages["network"].in_hand == 16)
        network.may_run.set()
        return await asyncio.gather(*jobs)

    assert not any("error" in answer for answer in asyncio.run(ask()))
    assert max(network.batches) == 8
    assert sum(network.batches) == 17


def test_a_lone_request_waits_for_nobody(serve, network):
    answer = asyncio.run(serve().respond(JOB, "1"))
    assert "error" not in answer
    assert network.batches == [1]


class Downloads:
    """A stand-in for the download, which ends when ``may_end`` is set."""

    def __init__(self, monkeypatch):
        self.may_end = asyncio.Event()
        monkeypatch.setattr(da3_runtime.serve.service, "download", self)

    async def __call__(self, *_):
        await self.may_end.wait()
        return b"no image"


def test_slow_downloads_delay_no_other_request_and_have_a_bound_of_their_own(serve, monkeypatch):
    service = serve(max_concurrency=1, max_queued_jobs=0, max_downloads=3)
    downloads = Downloads(monkeypatch)

    async def check():
        async with client_of(service) as client:
            url = {"input": {"image_url": "http://slow.example/a.jpg"}}
            slow = []
            for _ in range(3):
                slow.append(asyncio.ensure_future(client.post("/runsync", json=url)))
                await until(lambda: service.stages["download"].in_hand == len(slow))
            assert (await client.post("/runsync", json={"input": JOB})).status_code == 200
            refused = await client.post("/runsync", json=url)
            assert refused.status_code == 503
            assert "MAX_DOWNLOADS" in refused.json()["error"]
            text = (await client.get("/metrics")).text
            assert 'da3_stage_in_hand{stage="download"} 3.0' in text
            downloads.may_end.set()
            assert {answer.status_code for answer in await asyncio.gather(*slow)} == {415}

    asyncio.run(check())


def test_the_server_answers_while_a_model_closes(serve, network):
    service = serve()
    network.may_close.clear()

    async def check():
        async with client_of(service) as client:
            assert (await client.post("/runsync", json={"input": JOB})).status_code == 200
            other = {"input": JOB | {"use_sdt_head": True}}
            asked = asyncio.ensure_future(client.post("/runsync", json=other))
            await until(network.is_closing.is_set)
            for path in ("/ping", "/metrics", "/health"):
                assert (await client.get(path)).status_code == 200
            assert (await client.post("/run", json={"input": {}})).status_code == 200
            network.may_close.set()
            assert (await asked).status_code == 200

    asyncio.run(check())


def test_large_bodies_and_answers_do_not_block_the_event_loop(serve, monkeypatch):
    """In CPU time of the loop's thread, so that other processes do not count."""
    longest = 0.0
    run = asyncio.events.Handle._run

    def timed(handle):
        nonlocal longest
        start = time.thread_time()
        run(handle)
        longest = max(longest, time.thread_time() - start)

    service = serve()
    text = "A" * 15_000_000

    async def respond(data, *_, **__):
        assert len(data["image_base64"]) == len(text)
        return {"image_base64": text, "model_id": NANO}

    monkeypatch.setattr(service, "respond", respond)
    body = json.dumps({"input": {"image_base64": text}}).encode()

    async def check():
        async with client_of(service) as client:
            monkeypatch.setattr(asyncio.events.Handle, "_run", timed)
            asked = [client.post("/runsync", content=body) for _ in range(4)]
            answers = await asyncio.gather(*asked, *(client.get("/ping") for _ in range(4)))
            return {answer.status_code for answer in answers}

    assert asyncio.run(check()) <= {200, 204, 503}
    assert longest < 0.05


def test_every_response_is_counted(serve):
    async def check():
        async with client_of(serve(api_key=KEY, max_image_bytes=1000)) as client:
            head = {"da3-api-key": KEY}
            await client.get("/metrics")
            await client.post("/run", content=b"{}")
            await client.post("/run", content=b"{", headers=head)
            await client.post("/runsync", content=bytes(10**6), headers=head)
            await client.get("/nothing", headers=head)
            return (await client.get("/metrics", headers=head)).text

    counted = asyncio.run(check())
    for path, status in (("", 401), ("/run", 401), ("/run", 400), ("/runsync", 413), ("", 404)):
        assert f'da3_http_responses_total{{path="{path}",status="{status}"}} 1.0' in counted


@pytest.mark.parametrize("path", ["/ping", "/health"])
def test_health_answers_get_and_head_without_a_key(serve, path):
    async def check():
        service = serve(api_key=KEY)
        service.load_default()
        async with client_of(service) as client:
            assert (await client.get(path)).json() == {"status": "healthy"}
            return await client.head(path)

    answer = asyncio.run(check())
    assert (answer.status_code, answer.content) == (200, b"")


def request(*chunks, client="1.2.3.4", encoding=None, forever=False):
    """A request whose body arrives in chunks; ``forever``: it never ends."""
    left = list(chunks)

    async def receive():
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or forever}
        return await asyncio.Event().wait()

    headers = [(b"content-encoding", encoding.encode())] if encoding else []
    scope = {"type": "http", "method": "POST", "headers": headers, "client": (client, 1)}
    return Request(scope, receive)


def read(reader, *args, **kwargs):
    return asyncio.run(reader.read(request(*args, **kwargs)))


def test_a_body_is_read_and_unzipped():
    reader = Bodies(1000)
    assert read(reader, b"ab", b"c") == b"abc"
    assert read(reader, gzip.compress(b"abc"), encoding="gzip") == b"abc"
    assert reader.reading == 0


@pytest.mark.parametrize(
    ("body", "encoding", "error", "message"),
    [
        (bytes(1001), None, ImageTooLargeError, "more than 1000 bytes"),
        (gzip.compress(bytes(10**6), mtime=0), "gzip", ImageTooLargeError, "more than 1000 bytes"),
        (gzip.compress(b"abc", mtime=0)[:-3], "gzip", RequestError, "not valid gzip"),
        (b"abc", "GZip", RequestError, "not valid gzip"),
        (b"abc", "br", RequestError, "Content-Encoding must be gzip"),
    ],
)
def test_a_body_outside_the_limits_is_refused(body, encoding, error, message):
    with pytest.raises(error, match=message):
        read(Bodies(1000), body, encoding=encoding)


def test_a_body_that_arrives_too_slowly_is_refused(monkeypatch):
    monkeypatch.setattr(bodies, "GRACE_SECONDS", 0.05)
    with pytest.raises(RequestError, match="arrived too slowly: send at least 32 KiB a second"):
        read(Bodies(1000), b"a", forever=True)


def test_a_client_can_take_neither_all_the_memory_nor_all_the_places(monkeypatch):
    monkeypatch.setattr(bodies, "PER_CLIENT", 6)

    async def check():
        reader = Bodies(1000)
        half = [asyncio.ensure_future(reader.read(request(bytes(900), forever=True))) for _ in range(4)]
        await until(lambda: reader._bytes["1.2.3.4"] == 3600)
        with pytest.raises(BusyError, match="Too many large requests"):
            await reader.read(request(bytes(900)))
        assert await reader.read(request(bytes(900), client="5.6.7.8")) == bytes(900)
        small = [asyncio.ensure_future(reader.read(request(b"", forever=True))) for _ in range(2)]
        await until(lambda: reader.reading == 6)
        with pytest.raises(BusyError, match="6 requests of this address"):
            await reader.read(request(b"a"))
        assert await reader.read(request(b"a", client="5.6.7.8")) == b"a"
        reader.close()
        ended = await asyncio.gather(*half, *small, return_exceptions=True)
        assert {type(each) for each in ended} == {BusyError}
        assert (reader.reading, reader._bytes.total()) == (0, 0)

    asyncio.run(check())


def test_a_client_that_leaves_gives_its_place_back():
    async def check():
        reader = Bodies(1000)
        gone = request()
        gone._receive = lambda: asyncio.sleep(0, {"type": "http.disconnect"})
        with pytest.raises(ClientDisconnect):
            await reader.read(gone)
        assert reader.reading == 0

    asyncio.run(check())


@pytest.mark.parametrize("key", [None, KEY])
def test_half_sent_bodies_block_nobody_and_do_not_hold_the_stop(engine, key):
    server = Server(
        "serve",
        ENGINE_DIR=str(engine.engine_dir),
        MAX_QUEUED_JOBS="0",
        MAX_CONCURRENCY="1",
        **({"DA3_API_KEY": key} if key else {}),
    )
    try:
        server.wait()
        head = b"POST /runsync HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{"
        with contextlib.ExitStack() as open_sockets:
            for _ in range(40):
                made = socket.create_connection(("127.0.0.1", server.port))
                open_sockets.enter_context(made).sendall(head)
            fields = JOB | ({"api_key": key} if key else {})
            body = json.dumps({"input": fields}).encode()
            answer = server.client.post("/runsync", content=body, timeout=9)
            assert answer.status_code == 200, answer.text
            server.process.terminate()
            assert server.process.wait(9) == 0
    finally:
        server.process.kill()
