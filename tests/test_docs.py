"""The pages of docs/ say what the code does, and its pictures are those of their sources."""

import html
import re

import pytest

from da3_runtime.inference.backend_choice import UNTRAINED, UNTRAINED_HEAD
from da3_runtime.postprocess.depth import NO_FOCAL
from da3_runtime.serve.metrics import Metrics
from tests.conftest import ROOT

DOCS = ROOT / "docs"
OPERATIONS = (DOCS / "operations.md").read_text()
WARNINGS = re.findall(r"^\| `([A-Z][^`]*\.)` \|", OPERATIONS, re.MULTILINE)


@pytest.mark.parametrize("name", ["architecture", "request"])
def test_a_picture_is_its_source_s_and_names_files_that_are_there(name):
    """Otherwise: make pictures."""
    source = (DOCS / f"{name}.dot").read_text()
    drawn = html.unescape((DOCS / f"{name}.svg").read_text()).replace("\xa0", " ")
    labels = re.findall(r'\blabel="([^"]*)"', source)
    assert len(labels) > 15
    for label in labels:
        for line in label.split("\\n"):
            assert f">{line}</text>" in drawn, line
    for file in re.findall(r"[\w/]+\.py", " ".join(labels)):
        assert any((ROOT / folder / file).is_file() for folder in ("runtime", "export")), file


def test_every_metric_is_explained():
    text = Metrics().text(0, 0).decode()
    names = re.findall(r"^# HELP (\w+)", text, re.MULTILINE)
    assert len(names) == 4
    for name in names:
        assert f"| `{name}` |" in OPERATIONS, name


def test_every_warning_is_explained_as_the_code_says_it():
    assert {NO_FOCAL, UNTRAINED, UNTRAINED_HEAD} < set(WARNINGS)
    code = " ".join(path.read_text() for path in sorted((ROOT / "runtime").glob("*.py")))
    code = re.sub(r'"\s*f?"', "", code)
    for warning in WARNINGS:
        for words in re.split(r"\b[A-Z]{4,}(?:_[A-Z]+)?\b", warning):
            assert words.strip(" :.") in code, words


def test_every_link_leads_somewhere():
    for path in [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "SECURITY.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if not target.startswith(("http", "#")):
                file, _, anchor = target.partition("#")
                assert (path.parent / file).exists(), (path.name, target)
                if anchor:
                    titles = re.findall(r"^#+ (.*)$", (path.parent / file).read_text(), re.MULTILINE)
                    assert anchor in {
                        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles
                    }
