"""What the HTTP server takes and answers beside JSON jobs: raw images, forms, RunPod's other paths, browsers."""

import asyncio
import re

import pytest

from tests.support.images import PHOTO
from tests.support.paths import PHOTOS
from tests.support.stand_in import client_of, until

RAW = (PHOTOS / "cat.jpg").read_bytes()
JPEG = {"content-type": "image/jpeg"}
JOB = {"input": {"image_base64": PHOTO, "outputs": ["camera"]}}


def ask(service, method, path, **given):
    async def run():
        async with client_of(service) as client:
            return await client.request(method, path, **given)

    return asyncio.run(run())


QUERY = "/runsync?outputs=camera,%20confidence&processing_res=140&histogram_equalization=false"
BODIES = {
    "an image": {"content": RAW, "headers": JPEG},
    "bytes": {"content": RAW, "headers": {"content-type": "application/octet-stream"}},
    "a form": {"files": {"photo": ("cat.jpg", RAW)}, "data": {"gamma": "0.5"}},
}


@pytest.mark.parametrize("kind", BODIES)
def test_an_image_may_be_the_body_with_the_fields_in_the_query(serve, kind):
    answer = ask(serve(), "POST", QUERY, **BODIES[kind])
    assert answer.status_code == 200, answer.text
    output = answer.json()["output"]
    assert output["camera"] is not None
    assert output["confidence_base64"]
    assert "image_base64" not in output
    assert output["warnings"] == []


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        ({"content": RAW, "headers": JPEG, "params": {"gamma": "x"}}, 400, "gamma must be a number"),
        ({"content": RAW, "headers": JPEG, "params": {"outputs": "x"}}, 400, "outputs must be a list"),
        ({"content": RAW, "headers": JPEG, "params": {"intrinsics": "[1"}}, 400, "intrinsics must be"),
        ({"content": b"no image", "headers": JPEG}, 415, "image"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "valid form"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=a"}}, 400, "form"),
        ({"files": {"a": RAW, "b": b"no image"}}, 415, "images[1]"),
        ({"data": {"gamma": "1"}, "files": {"gamma": (None, b"1")}}, 400, "No image"),
    ],
)
def test_a_wrong_image_or_form_gets_its_status_and_one_sentence(serve, given, status, message):
    answer = ask(serve(), "POST", "/runsync", **given)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]


def test_an_image_as_the_body_needs_the_key(serve):
    service = serve(api_key="a key")
    assert ask(service, "POST", "/runsync", content=RAW, headers=JPEG).status_code == 401
    headers = JPEG | {"da3-api-key": "a key"}
    assert ask(service, "POST", "/runsync", content=RAW, headers=headers).status_code == 200


def test_runpods_health_cancel_stream_and_purge(serve, network):
    service = serve(max_concurrency=1)

    async def check():
        async with client_of(service) as client:
            post, get = client.post, client.get
            done = (await post("/v2/x/run", json=JOB)).json()["id"]
            await until(lambda: not service.stages["network"].in_hand and network.batches)
            network.may_run.clear()
            ids = [(await post("/v2/x/run", json=JOB)).json()["id"] for _ in range(3)]
            await until(lambda: service.stages["queue"].in_hand == 2)
            health = (await get("/v2/x/health")).json()
            assert health["jobs"] | {"retried": 0} == {
                "completed": 1, "failed": 0, "inProgress": 1, "inQueue": 2, "retried": 0,
            }  # fmt: skip
            assert health["workers"]["ready"] == 1
            assert (await post(f"/v2/x/cancel/{ids[2]}")).json() == {"id": ids[2], "status": "CANCELLED"}
            assert (await post("/v2/x/purge-queue")).json() == {"removed": 1, "status": "completed"}
            assert (await get(f"/status/{ids[1]}")).json()["status"] == "CANCELLED"
            network.may_run.set()
            await until(lambda: not service.stages["network"].in_hand)
            parts = (await get(f"/v2/x/stream/{done}")).json()
            assert parts["status"] == "COMPLETED"
            assert parts["stream"][0]["output"]["camera"]
            for path in ("/status/x", "/stream/x"):
                assert (await get(path)).status_code == 404
            assert (await post("/cancel/x")).json()["status"] == 404
            assert (await post("/runsync", json=JOB)).status_code == 200

    asyncio.run(check())
    assert len(network.batches) == 3, "cancelled jobs do not run"


def test_the_documentation_needs_no_key_no_other_host_and_no_fixed_path(serve):
    service = serve(api_key="a key")
    page = ask(service, "GET", "/docs").text
    addresses = re.findall(r"""(?:src|href|url)["']?\s*[=:]\s*["']([^"']+)""", page)
    assert len(addresses) == 4
    for address in addresses:
        assert not address.startswith(("/", "http")), address
        assert ask(service, "GET", "/" + address.removeprefix("./")).status_code == 200
    assert ask(service, "GET", "/openapi.json").json()["servers"][0]["url"] == "./"


PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "da3-api-key"}


@pytest.mark.parametrize(
    ("allowed", "origin", "answered"),
    [
        ("https://a.example", "https://a.example", "https://a.example"),
        ("https://a.example", "https://b.example", None),
        ("*", "https://b.example", "*"),
        ("", "https://a.example", None),
    ],
)
def test_pages_of_allowed_origins_may_use_the_server(serve, allowed, origin, answered):
    service = serve(cors_origins=allowed, api_key="a key")
    head = {"origin": origin}
    before = ask(service, "OPTIONS", "/runsync", headers=head | PREFLIGHT)
    assert before.headers.get("access-control-allow-origin") == answered
    for status, key in ((200, "a key"), (401, "wrong")):
        answer = ask(service, "POST", "/runsync", json=JOB, headers=head | {"da3-api-key": key})
        assert answer.status_code == status
        assert answer.headers.get("access-control-allow-origin") == answered
