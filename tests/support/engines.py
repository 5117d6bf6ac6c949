"""Engines for the tests: built once, copied for tests that damage them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.support.paths import NANO, RANDOM, ROOT, SMALL, TEST_ENGINES
from tests.support.processes import ProcessRun, clean_env, command


class Engine(NamedTuple):
    """An engine, and the processes that built it at once."""

    engine_dir: Path
    folder: Path
    builds: list[ProcessRun]


class Building(NamedTuple):
    """An engine in :data:`TEST_ENGINES` and the processes that are building it."""

    folder: Path
    processes: list[subprocess.Popen[str]]

    def finish(self) -> Engine:
        """Wait for them."""
        builds = []
        for process in self.processes:
            stdout, stderr = process.communicate(timeout=580)
            builds.append(ProcessRun(process.returncode, stdout, stderr))
        assert not any(build.code for build in builds), builds
        return Engine(TEST_ENGINES, self.folder, builds)


def start_build(
    model: str, head: str, *args: str, processes: int = 1, module: str = "da3_export"
) -> Building:
    """Start to build an engine, by that many processes at once."""
    line = command(module, "engines", "--model", model, "--head", head, *args)
    started = [
        subprocess.Popen(
            [*line, "--engine-dir", str(TEST_ENGINES)],
            cwd=ROOT,
            # The other cores have tests to run.
            env=clean_env(OMP_NUM_THREADS="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    return Building(TEST_ENGINES / model / head, started)


SINGLE_IMAGES = "tests.support.single_images"
BUILDS: dict[str, Callable[[], Building]] = {
    "engine": lambda: start_build(NANO, "dpt", processes=2),
    "sdt_engine": lambda: start_build(NANO, "sdt", "--targets", "onnx-fp32", module=SINGLE_IMAGES),
    "small_engine": lambda: start_build(
        SMALL, "dpt", "--weights", RANDOM, "--targets", "onnx-fp32", module=SINGLE_IMAGES
    ),
}


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
    return Engine(root / "engines", folder, engine.builds)


def damage(path: Path, data: bytes | None) -> None:
    """Replace a (possibly hard-linked) file, or remove it."""
    path.unlink()
    if data is not None:
        path.write_bytes(data)
