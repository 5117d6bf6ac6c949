"""The hashed lists are those of the hand-written ones, and nothing is installed without them."""

import json
import re
import runpy

import onnxruntime
import pytest

from da3_export import build
from da3_export import onnx_to_plan as plan
from da3_export.parity import report as parity
from da3_runtime.store.manifest import Kind
from tests.conftest import ROOT
from tools.nano import evaluate

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


def names_in(name):
    included, pins = SCRIPT["lines_of"](ROOT / "requirements" / name)
    own = {package for package, _ in pinned(pins)}
    return own.union(*(names_in(other) for other in included))


@pytest.mark.parametrize("stack", ["da3_export.in", "cuda.in"])
def test_a_build_asks_for_the_version_of_no_package_that_its_stack_lacks(stack, monkeypatch):
    """ONNX Runtime is another package where it is built for CUDA."""
    torch = {"torch"} if stack == "da3_export.in" else set()  # installed by itself, from torch-cpu.in
    there = names_in(stack) | names_in("upstream.in") | torch

    def version(package):
        assert package in there
        return "1.0"

    for module in (build, evaluate, parity, plan):
        monkeypatch.setattr(module, "version", version)
    report = parity.Report("da3-nano", "dpt", "", {}, [], {}, "", 0.0)
    assert json.loads(report.to_json())["versions"]["onnxruntime"] == onnxruntime.__version__
    assert json.loads(evaluate.to_json([], "da3-nano"))["versions"].keys() <= there | {"onnxruntime"}
    assert build._exporter().keys() <= there
    for kind, library in plan.LIBRARIES.items():
        # Only the CUDA stack has TensorRT itself.
        if stack == "cuda.in" or kind is Kind.TENSORRT_RTX:
            assert library.package in there
