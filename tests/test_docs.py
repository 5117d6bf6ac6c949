"""The pages of docs/ agree with the code and with their sources."""

import ast
import html
import re

import numpy as np
import pytest

from da3_runtime.serve.metrics import Metrics
from scripts import docs
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
OPERATIONS = (DOCS / "operations.md").read_text()
PACKAGES = (ROOT / "runtime" / "da3_runtime", ROOT / "export" / "da3_export")


@pytest.mark.parametrize("name", docs.PAGES)
def test_a_generated_page_is_current(name):
    assert (DOCS / f"{name}.md").read_text() == docs.page(name), "run make docs"


def test_the_claims_of_the_readme_are_current():
    text = docs.README.read_text()
    assert docs.LIST_BEGINS + docs.readme_claims() + docs.LIST_ENDS in text, "run make docs"
    assert len(text.splitlines()) <= 150


@pytest.mark.parametrize("name", ["architecture", "request"])
def test_a_drawing_matches_its_source_and_names_existing_files(name):
    source = (DOCS / f"{name}.dot").read_text()
    drawn = html.unescape((DOCS / f"{name}.svg").read_text()).replace("\xa0", " ")
    labels = re.findall(r'\blabel="([^"]*)"', source)
    assert len(labels) > 15
    for label in labels:
        for line in label.split("\\n"):
            assert f">{line}</text>" in drawn, f"run make pictures: {line}"
    files = set(re.findall(r"[\w/]+\.py", " ".join(labels).replace("\\n", " ")))
    missing = [file for file in files if not any(list(each.rglob(file)) for each in PACKAGES)]
    assert missing == []


def test_every_curl_example_sends_its_body_from_a_file():
    pages = [
        ROOT / "README.md",
        ROOT / "SECURITY.md",
        *DOCS.glob("*.md"),
        *(ROOT / "examples").rglob("*"),
    ]
    text = "\n".join(page.read_text() for page in pages if page.suffix in (".md", ".sh"))
    bodies = re.findall(r"""(?:curl|ask)\b[^\n|]*\s(?:-d|--json|--data[a-z-]*)[ =]["']?(\S)""", text)
    assert len(bodies) >= 3
    assert set(bodies) == {"@"}, "a photo is longer than a command line may be"


def test_every_metric_is_explained():
    text = Metrics().text([], 0, 0, 0).decode()
    names = re.findall(r"^# HELP (\w+)", text, re.MULTILINE)
    assert len(names) == 7
    for name in names:
        assert re.search(rf"^\| [^|]*`{name}`", OPERATIONS, re.MULTILINE), name


def sentence(node, constants):
    """Text of a string, with ``*`` for what is filled in; None for anything else."""
    if isinstance(node, ast.Name | ast.Attribute):
        return constants.get(node.id if isinstance(node, ast.Name) else node.attr)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "*" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def warnings_of_the_code():
    """Every sentence in a list, or appended to one: in the runtime those are the warnings."""
    trees = [ast.parse(path.read_text()) for path in sorted(PACKAGES[0].rglob("*.py"))]
    constants = {
        each.targets[0].id: sentence(each.value, {})
        for tree in trees
        for each in tree.body
        if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name)
    }
    nodes = []
    for node in (each for tree in trees for each in ast.walk(tree)):
        if isinstance(node, ast.List):
            nodes += node.elts
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "append":
            nodes += node.args
    branches = [(each.body, each.orelse) if isinstance(each, ast.IfExp) else (each,) for each in nodes]
    found = {sentence(each, constants) for branch in branches for each in branch}
    return {text for text in found if text and re.match(r"[A-Z*].* .*\.$", text, re.DOTALL)}


def test_every_warning_is_explained_and_every_explained_one_exists():
    explained = re.findall(r"^\| `([A-Z{][^`]* [^`]*\.)` \|", OPERATIONS, re.MULTILINE)
    assert {re.sub(r"\{\w+\}", "*", each) for each in explained} == warnings_of_the_code()


def test_the_points_of_the_documentation_are_those_of_the_camera(tmp_path, monkeypatch):
    (code,) = re.findall(
        r"```python\n(import json\n.*?)```", (DOCS / "numbers.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    np.savez("photo.depth.npz", depth=np.full((4, 6), 2.0, np.float32))
    (tmp_path / "photo.json").write_text('{"camera": {"intrinsics": [[3, 0, 3], [0, 4, 2], [0, 0, 1]]}}')
    names = {}
    exec(code, names)
    assert names["points"].shape == (4, 6, 3)
    np.testing.assert_allclose(names["points"][0, 5], [2.5 / 3 * 2, -1.5 / 4 * 2, 2])


def anchors(path):
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md")])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        page = path.parent / file if file else path
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page), target
