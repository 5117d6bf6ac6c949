"""Engines for the tests: built once, copied for tests that damage them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import onnx

from tests.support.build_engines import ENGINES
from tests.support.paths import ROOT, TEST_ENGINES
from tests.support.processes import ProcessRun, clean_env, command


class Engine(NamedTuple):
    """An engine, and the build that made it."""

    engine_dir: Path
    folder: Path
    build: ProcessRun


def start_builds(names: Iterable[str], results: Path) -> subprocess.Popen[bytes]:
    """Start to build engines by name, in a process that writes its results to a folder."""
    line = command("tests.support.build_engines", str(results), *names)
    return subprocess.Popen(line, cwd=ROOT, env=clean_env())


def finished(name: str, results: Path) -> Engine:
    """An engine by name, once a process that any worker started has built it."""
    code = results / f"{name}.code"
    deadline = time.monotonic() + 580
    while not code.exists():
        assert time.monotonic() < deadline, f"{name} is not built"
        time.sleep(0.1)
    texts = [(results / f"{name}.{kind}").read_text() for kind in ("stdout", "stderr")]
    build = ProcessRun(int(code.read_text()), *texts)
    assert build.code == 0, build
    model, head, *_ = ENGINES[name]
    return Engine(TEST_ENGINES, TEST_ENGINES / model / head, build)


def copy_engine(engine: Engine, root: Path) -> Engine:
    """A copy of an engine under ``root``; unchanged files are hard links."""
    folder = root / "engines" / engine.folder.relative_to(engine.engine_dir)
    for source in sorted(engine.folder.rglob("*")):
        target = folder / source.relative_to(engine.folder)
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, target)
    return Engine(root / "engines", folder, engine.build)


def damage(path: Path, data: bytes | None) -> None:
    """Replace a (possibly hard-linked) file, or remove it."""
    path.unlink()
    if data is not None:
        path.write_bytes(data)


def link_onnx(source: Path, path: Path) -> None:
    """Link an ONNX file and its weights to another folder; both refer to the weights by one name."""
    os.link(source, path)
    os.link(weights_of(source), weights_of(path))


def weights_of(path: Path) -> Path:
    """The file that holds the weights of an ONNX file."""
    return path.with_name(f"{path.name}.data")


def graph_of(path: Path) -> onnx.ModelProto:
    """An ONNX file without its weights. onnx reads no weights from files with several hard links."""
    return onnx.load(str(path), load_external_data=False)
