"""Fixtures: real photographs, a real checkpoint, a real engine."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from da3_runtime.util.runpod_sdk import import_sdk
from tests.support.build_engines import ENGINES
from tests.support.engines import Engine, copy_engine, finished, start_builds
from tests.support.paths import ROOT
from tests.support.processes import ProcessRun, clean_env

if TYPE_CHECKING:
    import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers whose threads spin for each other's cores would be slower than one. Before torch.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Import what most tests need; the process that only hands out files to workers needs none of it."""
    if session.config.getoption("numprocesses", None):
        return
    import torch  # noqa: F401

    # Tests import parts of the SDK themselves.
    import_sdk()
    # The garbage collector need not look through PyTorch's objects again and again.
    gc.freeze()


# Files of few tests that need an engine and take long.
LONG = {
    "test_images.py",
    "test_rays.py",
    "test_bench.py",
    "test_nano.py",
    "test_evaluate.py",
    "test_soak.py",
    "test_page.py",
    "test_freshness.py",
    "test_video.py",
}


def engines_of(item: pytest.Item) -> set[str]:
    """Names of the engines that a test needs, as fixtures or as parameters that name fixtures."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return ENGINES.keys() & {*getattr(item, "fixturenames", ()), *map(str, parameters)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files that need an engine last, so that the others run while the engines are built."""
    count = Counter(item.path for item in items)
    late = {item.path for item in items if engines_of(item)}
    # Long files first: at the end, short ones keep both workers busy.
    items.sort(
        key=lambda item: (item.path in late, item.path.name not in LONG, -count[item.path], item.path)
    )


@pytest.fixture(scope="session", autouse=True)
def builds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the results of building engines are. The first worker begins at once with those that are needed."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    folder = tmp_path_factory.getbasetemp()
    results = (folder.parent if worker else folder) / "builds"
    results.mkdir(exist_ok=True)
    used = set().union(*map(engines_of, request.session.items))
    needed = [name for name in ENGINES if name in used]
    process = start_builds(needed, results) if needed and worker in (None, "gw0") else None
    yield results
    if process is not None:
        if worker is None:
            process.kill()
        process.wait()  # another worker may still need it


@pytest.fixture(scope="session")
def engine(builds: Path) -> Engine:
    """The engine of the trained da3-nano, with every artefact that this machine builds."""
    return finished("engine", builds)


@pytest.fixture(scope="session")
def sdt_engine(builds: Path) -> Engine:
    """The FP32 engine of the trained da3-nano with its trained SDT head."""
    return finished("sdt_engine", builds)


@pytest.fixture(scope="session")
def small_engine(builds: Path) -> Engine:
    """da3-small's FP32 engine of random weights: the architecture at full size."""
    return finished("small_engine", builds)


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., ProcessRun]:
    """Runs a command as ``run_module`` does, without the seconds that a process takes to import it."""

    def run(module: str, *args: str, **env: str) -> ProcessRun:
        main = importlib.import_module(f"{module}.__main__").main
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(ROOT)
            kept = clean_env(**env)
            for name in os.environ.keys() - kept.keys():
                patch.delenv(name)
            for name, value in kept.items():
                patch.setenv(name, value)
            try:
                code = main([*args])
            except SystemExit as end:
                code = end.code
        return ProcessRun(code, *capsys.readouterr())

    return run


@pytest.fixture
def engine_copy(engine: Engine, tmp_path: Path) -> Engine:
    """A copy of the engine that a test may damage."""
    return copy_engine(engine, tmp_path)


@pytest.fixture
def small_copy(small_engine: Engine, tmp_path: Path) -> Engine:
    """A copy of the engine of random weights that a test may damage."""
    return copy_engine(small_engine, tmp_path)


@pytest.fixture(scope="session")
def small_monocular() -> torch.nn.Module:
    """Upstream's monocular network (depth and sky), four blocks of da3-small's width, random weights."""
    import torch
    from depth_anything_3.model.da3 import DepthAnything3Net
    from depth_anything_3.model.dinov2.dinov2 import DinoV2
    from depth_anything_3.model.dpt import DPT

    from da3_export.random_weights import randomize

    backbone = DinoV2(
        "vits", [0, 1, 2, 3], alt_start=-1, qknorm_start=-1, rope_start=-1, cat_token=False
    )
    del backbone.pretrained.blocks[4:]
    head = DPT(384, output_dim=1, features=64, out_channels=[48, 96, 192, 384])
    network: torch.nn.Module = DepthAnything3Net(backbone, head).eval().requires_grad_(False)
    randomize(network, torch.Generator().manual_seed(11))
    return network


@pytest.fixture(scope="session")
def upstream_preprocessing() -> type:
    """Upstream's InputProcessor.

    It imports torchvision only to normalize, and torchvision has no build that loads beside a CPU
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
