"""Fixtures: real photographs, a real checkpoint, a real engine."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import httpx
import numpy as np
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers whose threads spin for each other's cores would be slower than one. Before torch.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

import da3_export.settings
import da3_runtime.settings
from da3_runtime.util.runpod_sdk import import_sdk

# Tests import parts of the SDK themselves.
import_sdk()

OPTIONS = {
    variable
    for each in (*da3_runtime.settings.table(), *da3_export.settings.table())
    for variable in each.variables
}
PREFIXES = ("HF_", "DA3_", "RUNPOD_", "BUCKET_", "MAX_", "OUTPUT_")
ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "examples"
# Kept between runs: a build makes only what is missing or out of date.
TEST_ENGINES = ROOT / ".cache" / "test-engines"
NANO, SMALL = "da3-nano", "da3-small"
DRAWN = "random:0"


class BuildRun(NamedTuple):
    """How one build process ended."""

    code: int
    stdout: str
    stderr: str


class Engine(NamedTuple):
    """An engine, and the processes that built it at once."""

    engine_dir: Path
    folder: Path
    builds: list[BuildRun]


def command(module: str, *args: str, **env: str) -> list[str]:
    """Command line of one of the project's modules, in this interpreter."""
    return [sys.executable, "-m", module, *args]


def clean_env(**extra: str) -> dict[str, str]:
    """The environment without the project's own settings, with ``extra`` on top."""
    ours = {"TARGETS", "IMAGE", "OUT", *OPTIONS}
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith(PREFIXES)}
    return kept | extra


def run_module(
    module: str, *args: str, timeout: float = 300, largest_file: int | None = None, **env: str
) -> BuildRun:
    """Run one of the project's modules to its end, from the repository root.

    Where ``largest_file`` is given, the system writes no file beyond that many bytes.
    """

    def limit() -> None:
        assert largest_file is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    done = subprocess.run(
        command(module, *args),
        cwd=ROOT,
        env=clean_env(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        preexec_fn=None if largest_file is None else limit,
    )
    return BuildRun(done.returncode, done.stdout, done.stderr)


def depth_of(output):
    """Depth of an answer with the output ``depth_npz``."""
    with np.load(io.BytesIO(base64.b64decode(output["depth_npz_base64"]))) as arrays:
        return arrays["depth"]


def resident_mb(process="self"):
    """Memory of a process, 2^20 bytes, on Linux."""
    with Path(f"/proc/{process}/statm").open() as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Server:
    """A server process of its own, and a client of it."""

    def __init__(self, *args, **env):
        self.port = int(env.setdefault("PORT", str(free_port())))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "da3_runtime", *args], cwd=ROOT, env=clean_env(MODEL=NANO, **env),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.log = []
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def wait(self):
        """Until it is ready; the health statuses that were seen."""
        seen = []
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                seen.append(self.client.get("/ping").status_code)
            if seen and seen[-1] == 200:
                return seen
            assert self.process.poll() is None, "".join(self.log)
            time.sleep(0.05)
        raise AssertionError("".join(self.log))

    def ask(self, path="/runsync", headers=None, **fields):
        return self.client.post(path, json={"input": fields}, headers=headers)

    def stop(self):
        self.process.terminate()
        assert self.process.wait(60) in (0, -signal.SIGTERM), "".join(self.log)


class Building(NamedTuple):
    """An engine in :data:`TEST_ENGINES` and the processes that are building it."""

    folder: Path
    processes: list[subprocess.Popen[str]]

    def finish(self) -> Engine:
        """Wait for them."""
        builds = []
        for process in self.processes:
            stdout, stderr = process.communicate(timeout=580)
            builds.append(BuildRun(process.returncode, stdout, stderr))
        assert not any(build.code for build in builds), builds
        return Engine(TEST_ENGINES, self.folder, builds)


def start_build(model: str, head: str, *args: str, processes: int = 1) -> Building:
    """Start to build an engine, by that many processes at once."""
    line = command("da3_export", "engines", "--model", model, "--head", head, *args)
    started = [
        subprocess.Popen(
            [*line, "--engine-dir", str(TEST_ENGINES)],
            cwd=ROOT,
            # The other cores have tests to run.
            env=clean_env(THREADS="1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(processes)
    ]
    return Building(TEST_ENGINES / model / head, started)


BUILDS: dict[str, Callable[[], Building]] = {
    "engine": lambda: start_build(NANO, "dpt", processes=2),
    "sdt_engine": lambda: start_build(NANO, "sdt", "--targets", "onnx-fp32,onnx-fp16"),
    "small_engine": lambda: start_build(
        SMALL, "dpt", "--weights", DRAWN, "--targets", "onnx-fp32,onnx-fp16"
    ),
}


@pytest.fixture(scope="session")
def buildings(request: pytest.FixtureRequest) -> Iterator[dict[str, Building]]:
    """Every engine that this session needs, begun at once: much of a build keeps only one core busy."""
    needed = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    begun = {name: start() for name, start in BUILDS.items() if name in needed}
    yield begun
    for building in begun.values():
        for process in building.processes:
            process.kill()


@pytest.fixture(scope="session")
def engine(buildings: dict[str, Building]) -> Engine:
    """The engine of the trained da3-nano, built by two processes at once."""
    return buildings["engine"].finish()


@pytest.fixture(scope="session")
def sdt_engine(buildings: dict[str, Building]) -> Engine:
    """The engine of the trained da3-nano with its trained SDT head, without a plan."""
    return buildings["sdt_engine"].finish()


@pytest.fixture(scope="session")
def small_engine(buildings: dict[str, Building]) -> Engine:
    """da3-small's engine of drawn weights, without a plan: the architecture at full size."""
    return buildings["small_engine"].finish()


@pytest.fixture
def engine_copy(engine: Engine, tmp_path: Path) -> Engine:
    """A copy of the engine that a test may damage."""
    return copy_engine(engine, tmp_path)


@pytest.fixture
def drawn_copy(small_engine: Engine, tmp_path: Path) -> Engine:
    """A copy of the engine of drawn weights that a test may damage."""
    return copy_engine(small_engine, tmp_path)


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


@pytest.fixture(scope="session")
def small_monocular() -> torch.nn.Module:
    """Upstream's monocular network (depth and sky) at da3-small's width, drawn."""
    from depth_anything_3.model.da3 import DepthAnything3Net
    from depth_anything_3.model.dinov2.dinov2 import DinoV2
    from depth_anything_3.model.dpt import DPT

    from da3_export.random_weights import randomize

    backbone = DinoV2(
        "vits", [2, 5, 8, 11], alt_start=-1, qknorm_start=-1, rope_start=-1, cat_token=False
    )
    head = DPT(384, output_dim=1, features=64, out_channels=[48, 96, 192, 384])
    network: torch.nn.Module = DepthAnything3Net(backbone, head).eval().requires_grad_(False)
    randomize(network, torch.Generator().manual_seed(0))
    return network


def damage(path: Path, data: bytes | None) -> None:
    """Replace a (possibly hard-linked) file, or remove it."""
    path.unlink()
    if data is not None:
        path.write_bytes(data)


@pytest.fixture(scope="session")
def upstream_preprocessing() -> type:
    """Upstream's InputProcessor.

    It imports torchvision only to normalise, and torchvision has no build that loads beside a CPU
    PyTorch from the package index; its resizing, which the tests compare, does not touch it.
    """
    try:
        import torchvision.transforms  # noqa: F401
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        transforms = SimpleNamespace(Normalize=lambda **_: None)
        sys.modules["torchvision"] = SimpleNamespace(transforms=transforms)  # type: ignore[assignment]
        sys.modules["torchvision.transforms"] = transforms  # type: ignore[assignment]
    from depth_anything_3.utils.io.input_processor import InputProcessor

    processor: type = InputProcessor
    return processor
