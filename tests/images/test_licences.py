"""LICENSE, NOTICE and CHANGELOG say what is there."""

import re
import runpy

import pytest

import da3_runtime
from da3_runtime.variants import VARIANTS
from tests.conftest import PHOTOS, ROOT

NOTICE = (ROOT / "NOTICE").read_text()
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "notice.py"))


def packages():
    _, _, rest = NOTICE.partition(SCRIPT["START"])
    return [row.split(" | ") for row in rest.partition(SCRIPT["END"])[0].splitlines()]


def test_every_pinned_package_has_its_version_and_a_licence():
    """Otherwise: python scripts/notice.py."""
    rows = packages()
    assert [(name, version) for name, version, _ in rows] == list(SCRIPT["pins"]().items())
    assert {"numpy", "onnxruntime", "runpod", "torch", "depth-anything-3"} <= {row[0] for row in rows}
    assert not [row for row in rows if row[2].strip() in ("", SCRIPT["UNKNOWN"])]


@pytest.mark.parametrize(
    ("name", "licence"),
    [("numpy", "BSD-3-Clause"), ("depth-anything-3", "Apache-2.0"), ("einops", "MIT")],
)
def test_a_licence_is_what_the_installed_package_says(name, licence):
    assert licence in SCRIPT["licence_of"](name)
    assert licence in {row[0]: row[2] for row in packages()}[name]
    assert SCRIPT["licence_of"]("no-such-package") is None


def test_every_checkpoint_has_its_licence():
    for model, variant in VARIANTS.items():
        where = re.escape(variant.repo) if variant.repo else "trained here.*"
        row = re.compile(rf"^{model} \| {where} \| {re.escape(variant.license)}$", re.MULTILINE)
        assert row.search(NOTICE), model


def test_every_picture_is_named():
    for path in PHOTOS.iterdir():
        if path.suffix in (".jpg", ".webp"):
            assert f"{path.name}: " in NOTICE


def test_the_source_is_mit():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License\n")
    assert "DA3 Engines contributors" in text


def test_the_changelog_knows_the_version():
    assert da3_runtime.__version__ in (ROOT / "CHANGELOG.md").read_text()
