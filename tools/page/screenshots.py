"""Take the pictures of the page in docs: ``python tools/page/screenshots.py ADDRESS``, of a server."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
WALK = sorted((ROOT / "examples" / "walk").glob("*.webp"))
ARGUMENTS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


def take(page: Page, address: str, photos: list[Path]) -> bytes:
    """A picture of the page with the depth and the points of these photos."""
    page.goto(address)
    page.set_input_files("#files", [str(photo) for photo in photos])
    page.click("#run")
    page.locator("#status").filter(has_text="Done").wait_for()
    page.click("#show-points")
    page.locator("#points-status").filter(has_text="Drag").wait_for()
    page.wait_for_timeout(500)
    box = page.locator("#compare").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.6 * box["height"])
    return page.screenshot(full_page=True)


def main(address: str) -> None:
    """Write docs/page.jpg and docs/page-phone.jpg."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        desktop = browser.new_page(viewport={"width": 1200, "height": 900})
        phone = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        for page, photos, name, height in (
            (desktop, WALK, "page", 1010),
            (phone, [ROOT / "examples" / "temple.jpg"], "page-phone", 1250),
        ):
            picture = Image.open(io.BytesIO(take(page, address, photos))).convert("RGB")
            picture = picture.crop((0, 0, picture.width, min(height, picture.height)))
            picture.save(ROOT / "docs" / f"{name}.jpg", quality=82, optimize=True)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
