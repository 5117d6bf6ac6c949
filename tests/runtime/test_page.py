"""The page in a real browser: Debian's Chromium, without a window."""

import base64
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import trimesh
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from da3_runtime.output.encode import Output
from tests.support.paths import PHOTOS
from tests.support.processes import Server

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, BROWSERS) if path), None)
PHOTO = PHOTOS / "temple.jpg"
WALK = sorted((PHOTOS / "walk").glob("*.webp"))
KEY = "page-key"
# WebGL without a GPU.
ARGUMENTS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]

in_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(engine):
    server = Server("serve", ENGINE_DIR=str(engine.engine_dir))
    server.wait()
    yield server
    server.stop()


class Page:
    """The page in a tab of its own, which fails if the browser's console has an error."""

    def __init__(self, browser, address, **context):
        self.context = browser.new_context(accept_downloads=True, **context)
        self.tab, self.faults, self.hosts = self.context.new_page(), [], set()
        self.tab.on("pageerror", lambda error: self.faults.append(str(error)))
        self.tab.on("console", lambda said: said.type == "error" and self.faults.append(said.text))
        self.tab.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.tab.goto(address)

    def choose(self, *files):
        self.tab.set_input_files("#files", [str(file) for file in files])

    def compute(self):
        self.tab.click("#run")
        self.says("#status", "Done in")

    def says(self, place, text):
        self.tab.locator(place).filter(has_text=text).wait_for()

    def refused(self):
        self.tab.click("#run")
        self.tab.wait_for_selector("#error:not([hidden])")
        return self.tab.text_content("#error")

    def reading(self, across, down):
        box = self.tab.locator("#compare").bounding_box()
        self.tab.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])
        return self.tab.text_content("#reading")

    def show_points(self):
        self.tab.click("#show-points")
        self.says("#points-status", "Drag to turn")

    def download(self, title):
        with self.tab.expect_download() as caught:
            self.tab.get_by_role("button", name=title, exact=True).click()
        return caught.value.suggested_filename, caught.value.path().read_bytes()


@pytest.fixture
def open_page(browser, server):
    pages = []

    def open_page(address=f"http://127.0.0.1:{server.port}/", **context):
        pages.append(Page(browser, address, **context))
        return pages[-1]

    yield open_page
    for page in pages:
        page.context.close()


def depth_of_the_api(server, photo):
    answer = server.client.post(
        "/runsync?outputs=scene_npz,camera&output_size=model",
        content=photo.read_bytes(),
        headers={"content-type": "image/jpeg"},
    ).json()["output"]
    with np.load(io.BytesIO(base64.b64decode(answer["scene_npz_base64"]))) as arrays:
        return arrays["depth"][0]


@in_chromium
def test_a_photo_is_dropped_and_its_depth_is_that_of_the_api(open_page, server):
    page = open_page()
    drop = """([name, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(bytes)], name, { type: "image/jpeg" }));
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }"""
    page.tab.evaluate(drop, [PHOTO.name, list(PHOTO.read_bytes())])
    assert PHOTO.name in page.tab.text_content("#photos")
    page.compute()
    depth = depth_of_the_api(server, PHOTO)
    height, width = depth.shape
    for across, down in ((0.1, 0.2), (0.5, 0.5), (0.83, 0.91)):
        said = page.reading(across, down)
        column, row = int(across * width), int(down * height)
        assert f"column {column}, row {row} of {width} x {height}" in said
        assert float(said.split()[1]) == pytest.approx(depth[row, column], rel=1e-4)
        assert "(relative), confidence" in said
    page.tab.focus("#compare")
    page.tab.keyboard.press("ArrowLeft")
    assert f"column {column - 1}, row {row}" in page.tab.text_content("#reading")
    facts = page.tab.text_content("#facts")
    assert "da3-nano" in facts
    assert "verified: the engine file was measured against the original network" in facts
    assert "inference" in page.tab.text_content("#timings")
    assert page.faults == []
    assert page.hosts == {f"127.0.0.1:{server.port}"}


@in_chromium
def test_layers_colors_and_ranges_change_the_picture(open_page):
    page = open_page()
    page.choose(PHOTO)
    page.compute()
    picture = "document.getElementById('depth').toDataURL()"
    seen = {page.tab.evaluate(picture)}
    for change in (
        lambda: page.tab.select_option("#colors", "viridis"),
        lambda: page.tab.locator("#near").fill("30"),
        lambda: page.tab.locator("#far").fill("60"),
        lambda: page.tab.select_option("#layer", "confidence"),
    ):
        change()
        assert page.tab.evaluate(picture) not in seen
        seen.add(page.tab.evaluate(picture))
    page.tab.locator("#divide").fill("20")
    assert "20%" in page.tab.evaluate("document.getElementById('depth').style.clipPath")
    assert page.faults == []


@in_chromium
def test_points_turn_and_the_glb_is_the_scene(open_page):
    page = open_page()
    page.choose(*WALK)
    page.compute()
    assert page.tab.locator("#views button").count() == len(WALK)
    page.tab.locator("#views button").nth(2).click()
    assert page.tab.locator("#views button").nth(2).get_attribute("aria-pressed") == "true"
    assert "too small to find the cameras" in page.tab.text_content("#warnings")
    page.show_points()
    canvas = page.tab.locator("#points")
    canvas.scroll_into_view_if_needed()
    before, box = canvas.screenshot(), canvas.bounding_box()
    page.tab.mouse.move(box["x"] + 100, box["y"] + 100)
    page.tab.mouse.down()
    page.tab.mouse.move(box["x"] + 220, box["y"] + 130, steps=4)
    page.tab.mouse.up()
    page.tab.wait_for_timeout(200)
    assert canvas.screenshot() != before
    name, data = page.download("Points, GLB")
    assert name == "scene.glb"
    scene = trimesh.load(io.BytesIO(data), file_type="glb")
    assert len(scene.geometry["points"].vertices) > 1000
    assert {"camera 0000.jpg", "camera 0001.jpg"} <= set(scene.geometry)
    assert page.faults == []


@in_chromium
def test_a_slider_that_moves_twice_shows_its_last_value(open_page):
    page, asked = open_page(), []
    page.tab.on(
        "request", lambda each: each.method == "POST" and asked.append(each.post_data_json["input"])
    )
    page.choose(PHOTO)
    page.compute()
    page.show_points()
    page.tab.focus("#unsure")
    page.tab.keyboard.press("ArrowRight")
    page.tab.keyboard.press("ArrowRight")
    page.choose(PHOTOS / "cat.jpg")  # while the points are computed
    page.says("#points-status", "Drag to turn")
    page.tab.locator("#run:not([disabled])").wait_for()
    assert page.tab.text_content("#unsure-share") == "30 %"
    assert asked[-1]["points_confidence"] == 30
    page.tab.select_option("#colors", "viridis")
    page.download("Points, PLY")
    assert (asked[-1]["points_confidence"], asked[-1]["color_map"]) == (30, "viridis")
    assert page.faults == []


@in_chromium
def test_a_request_can_be_cancelled(open_page):
    page = open_page()
    page.tab.route("**/runsync", lambda route: None)  # never answered
    page.choose(PHOTO)
    page.tab.click("#run")
    page.tab.click("#cancel")
    page.says("#error", "Cancelled.")
    page.tab.locator("#run:not([disabled])").wait_for()


@in_chromium
def test_every_output_can_be_downloaded(open_page):
    page = open_page()
    page.choose(PHOTO)
    page.compute()
    assert page.tab.locator("#downloads button").count() == len(Output)
    for button in page.tab.locator("#downloads button").all():
        title = button.text_content()
        if title == "Sky":  # da3-nano does not find it
            button.click()
            page.tab.wait_for_selector("#download-error:not([hidden])")
            assert page.tab.text_content("#download-error") == "The model does not have this output."
            continue
        name, data = page.download(title)
        assert name.startswith("temple.")
        assert len(data) > 100
        if title == "Camera":
            assert set(json.loads(data)) == {"intrinsics", "extrinsics"}
    assert page.faults == []


@in_chromium
def test_a_broken_photo_and_a_refused_address_are_the_servers_sentences(open_page, tmp_path):
    page = open_page()
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(PHOTO.read_bytes()[:3000])
    page.choose(broken)
    assert "damaged" in page.refused()
    page.tab.get_by_role("button", name="Remove broken.jpg").click()
    assert page.tab.locator("#run").is_disabled()
    page.tab.fill("#url", "http://127.0.0.1:1/photo.jpg")
    page.tab.press("#url", "Enter")
    assert "image_url" in page.refused()
    # The browser itself logs a response that is an error.
    assert all("the server responded with a status of 4" in fault for fault in page.faults)


@in_chromium
def test_the_key_is_asked_for_and_kept_in_the_tab(browser, engine):
    server = Server("serve", ENGINE_DIR=str(engine.engine_dir), DA3_API_KEY=KEY)
    server.wait()
    page = Page(browser, f"http://127.0.0.1:{server.port}/")
    page.tab.wait_for_selector("#key-row:not([hidden])")
    page.choose(PHOTO)
    page.tab.fill("#key", "wrong")
    assert "The API key is missing or wrong" in page.refused()
    page.tab.fill("#key", KEY)
    page.compute()
    assert page.tab.evaluate("Object.keys(localStorage).length") == 0
    assert page.context.cookies() == []
    assert "$DA3_API_KEY" in page.tab.text_content("#curl")
    assert KEY not in page.tab.text_content("#curl") + page.tab.text_content("#python")
    page.tab.reload()
    page.choose(PHOTO)
    page.compute()
    assert all("status of 401" in fault for fault in page.faults)
    page.context.close()
    server.stop()


@in_chromium
@pytest.mark.parametrize(
    ("size", "theme"), [((1280, 900), "light"), ((390, 800), "dark")], ids=["desktop", "phone"]
)
def test_axe_finds_nothing_serious(open_page, size, theme):
    width, height = size
    page = open_page(viewport={"width": width, "height": height}, color_scheme=theme)
    page.choose(PHOTO)
    page.compute()
    page.show_points()
    found = Axe().run(page.tab).response["violations"]
    assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= width
    assert page.faults == []


@in_chromium
def test_the_copied_requests_work(open_page, server, tmp_path):
    page = open_page()
    page.choose(PHOTO)
    page.compute()
    line = page.tab.text_content("#curl")
    done = subprocess.run(["bash", "-c", line], cwd=PHOTOS, capture_output=True, text=True, check=True)
    assert {"image_base64", "depth_png16_base64"} <= set(json.loads(done.stdout)["output"])
    program = tmp_path / "program.py"
    program.write_text(page.tab.text_content("#python"))
    done = subprocess.run(
        [sys.executable, str(program)], cwd=PHOTOS, capture_output=True, text=True, check=True
    )
    assert "depth_png16_base64" in done.stdout


@in_chromium
def test_the_documentation_opens_without_another_host(open_page, server):
    page = open_page(f"http://127.0.0.1:{server.port}/docs")
    page.tab.get_by_text("Run a job and wait for its result").first.wait_for()
    assert page.hosts == {f"127.0.0.1:{server.port}"}
    assert page.faults == []


@in_chromium
def test_the_page_works_behind_a_path(browser, server):
    """A proxy that removes the path /depth before it asks the server."""
    context = browser.new_context()
    tab = context.new_page()

    def forward(route):
        path = route.request.url.partition("proxy.test/depth")[2]
        route.fulfill(response=tab.request.fetch(
            f"http://127.0.0.1:{server.port}{path}", method=route.request.method,
            data=route.request.post_data_buffer, headers={"content-type": "application/json"},
        ))  # fmt: skip

    tab.route("http://proxy.test/depth/**", forward)
    tab.goto("http://proxy.test/depth/")
    tab.set_input_files("#files", str(PHOTO))
    tab.click("#run")
    tab.get_by_text("Done in").wait_for()
    assert "http://proxy.test/depth/runsync" in tab.text_content("#curl")
    tab.unroute_all(behavior="wait")
    context.close()
