"""The files of the page, its headers and its list of models; test_page.py opens it in a browser."""

import asyncio
import json
import re
from functools import partial

import pytest

from da3_runtime.api.request import DepthRequest
from da3_runtime.output.encode import Output
from da3_runtime.output.preview import COLOR_MAPS
from tests.support.paths import ROOT
from tests.support.stand_in import StandIn, client_of, service_of

FILES = ROOT / "runtime" / "da3_runtime" / "serve" / "page" / "files"
KEY = "page-key"


def test_the_page_knows_every_output():
    script = (FILES / "page.js").read_text()
    table = script[script.index("const OUTPUTS") : script.index("};", script.index("const OUTPUTS"))]
    rows = re.findall(r'^  (\w+): \["[^"]+", "([^"]+)"\],$', table, re.MULTILINE)
    assert dict(rows) == {each.value: each.row.ending or ".camera.json" for each in Output}


def test_the_page_names_existing_fields():
    scripts = "".join((FILES / name).read_text() for name in ("page.js", "photos.js"))
    for field in ("processing_res", "focal_length_px", "model_id", "use_sdt_head", "points_confidence",
                  "image_url", "image_base64", "images", "outputs", "output_size"):  # fmt: skip
        assert field in scripts
        assert field in DepthRequest.model_fields


def get(service, path, **given):
    async def run():
        async with client_of(service) as client:
            return await client.get(path, **given)

    return asyncio.run(run())


@pytest.fixture
def serve(monkeypatch, tmp_path):
    return partial(service_of, monkeypatch, lambda graph: StandIn(), tmp_path)


def test_the_page_and_its_files_need_no_key_and_allow_nothing_from_elsewhere(serve):
    service = serve(api_key=KEY)
    for path in ("/", "/color-maps", *(f"/page/{file.name}" for file in FILES.iterdir())):
        answer = get(service, path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
    assert get(service, "/models").status_code == 401
    assert set(get(service, "/color-maps").json()) == set(COLOR_MAPS)
    for file in FILES.iterdir():
        # The libraries in three.js name addresses in comments and namespaces.
        if file.name != "three.js":
            text = (
                file.read_text()
                .replace("http://www.w3.org/2000/svg", "")
                .replace("https://example.com", "")
            )
            assert "http" not in text, file.name


def test_the_page_can_be_turned_off(serve):
    for path in ("/", "/page/page.js", "/color-maps"):
        assert get(serve(page=False), path).status_code == 404


def test_models_are_listed_with_what_is_at_hand(serve):
    rows = get(serve(), "/models").json()["models"]
    assert [row["model_id"] for row in rows if row["is_default"]] == ["da3-nano"]
    states = {(row["model_id"], row["head"]): row["state"] for row in rows}
    assert states["da3-large", "dpt"] == "other"
    assert ("da3-large", "sdt") not in states  # its head would be random
    assert ("da3-nano", "sdt") in states
    assert {row["unit"] for row in rows} == {"relative", "m", "m with a focal length"}


def test_three_is_the_pinned_release():
    package = json.loads((ROOT / "tools" / "page" / "package.json").read_text())["devDependencies"]
    lock = json.loads((ROOT / "tools" / "page" / "package-lock.json").read_text())["packages"]
    for name, version in package.items():
        assert lock[f"node_modules/{name}"]["version"] == version
        assert lock[f"node_modules/{name}"]["integrity"].startswith("sha512-")
    assert f'revision:"{package["three"].split(".")[1]}"' in (FILES / "three.js").read_text()
