"""The hashed lists are those of the hand-written ones, and nothing is installed without them."""

import re
import runpy

import pytest

from tests.conftest import ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "lock.py"))
LISTS = sorted((ROOT / "requirements").glob("*.in"))
HASHED = [path for path in LISTS if path.stem != SCRIPT["UNHASHED"]]
PIN = re.compile(r"^([\w.-]+)==([^\s;]+)", re.MULTILINE)


def pinned(text):
    return {
        (name.lower().replace("_", "-").replace(".", "-"), version)
        for name, version in PIN.findall(text)
    }


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_a_list_and_its_hashed_one_pin_the_same(path):
    """Otherwise: make lock."""
    included, pins = SCRIPT["lines_of"](path)
    text = path.with_suffix(".txt").read_text()
    assert re.findall(r"^-r (.*)\.txt$", text, re.MULTILINE) == [
        name.removesuffix(".in") for name in included
    ]
    more = pinned(text) - pinned(pins)
    assert not pinned(pins) - pinned(text)
    assert all(name.startswith("nvidia-") for name, _ in more)
    assert bool(more) == (path.stem == SCRIPT["TORCH"])


@pytest.mark.parametrize("path", HASHED, ids=lambda path: path.stem)
def test_every_pin_has_a_hash(path):
    text = path.with_suffix(".txt").read_text()
    for entry in re.split(r"\n(?=\S)", text):
        if PIN.match(entry):
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry


def test_every_installation_asks_for_hashes():
    files = [ROOT / "scripts" / "setup", ROOT / "Makefile", *sorted(ROOT.glob("Dockerfile.*"))]
    files += sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    text = "\n".join(path.read_text().replace("\\\n", " ") for path in files)
    commands = re.findall(r"(?:pip .*|pip\[@\].*)-r ?(?:\"?requirements|\$<).*?(?=&&|\n)", text)
    assert len(commands) == 9
    without = [command for command in commands if "--require-hashes" not in command]
    assert len(without) == 1
    assert "unhashed" in without[0]
