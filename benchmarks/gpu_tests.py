"""A pytest plugin for machines without TensorRT-RTX: ``pytest -p benchmarks.gpu_tests -m gpu``.

The tests' engine has a plan of TensorRT-RTX, which a machine builds only with that library. Without it
this plugin builds the engine without the plan.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from da3_export.onnx_to_plan import LIBRARIES
from da3_runtime.store.manifest import Kind
from da3_runtime.util.extras import is_installed
from tests.support import build_engines
from tests.support.processes import clean_env

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """Replace the function that starts to build engines, if the library is not installed."""
    if not is_installed("tensorrt_rtx"):
        import tests.conftest

        tests.conftest.start_builds = _start_builds  # type: ignore[attr-defined]


def _start_builds(names: Iterable[str], results: Path) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", __name__, str(results), *names]
    return subprocess.Popen(line, cwd=ROOT, env=clean_env())


def main(folder: Path, names: Iterable[str]) -> None:
    """Build engines by name; the results are in ``folder``."""
    targets = ",".join(kind for kind in Kind if kind not in LIBRARIES)
    build_engines.ENGINES["engine"] += ("--targets", targets)
    for name in names:
        build_engines.build(name, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
