"""``python -m tests.support.build_engines FOLDER NAME...`` builds the engines of the fixtures, one after another.

Each build is one call of ``da3-export engines``. All run in one process, because that imports PyTorch and the exporter
once. What a build prints is in FOLDER; its exit code comes last, so that every worker of the tests can wait for it.
"""

import os
import sys
import traceback
from pathlib import Path

from da3_export.__main__ import main
from da3_export.parity import cases
from da3_runtime.util.extras import is_installed
from da3_runtime.util.files import write_atomically
from tests.support.paths import NANO, RANDOM, SMALL, TEST_ENGINES

# Where no plan can be built, as on a GPU machine without TensorRT-RTX, the engine has none.
NO_PLAN = () if is_installed("tensorrt_rtx") else ("--targets", "onnx-fp32,onnx-fp16,onnx-fp16-ort")
# Model, head and other arguments of each engine; those that most tests need first.
ENGINES = {
    "engine": (NANO, "dpt", *NO_PLAN),
    "small_engine": (SMALL, "dpt", "--weights", RANDOM, "--targets", "onnx-fp32"),
    "sdt_engine": (NANO, "sdt", "--targets", "onnx-fp32"),
}


def few_cases():
    """Batches of one, without the largest photo: the others take most of the time of parity.

    ``make test-long`` measures the others on da3-nano.
    """
    every = cases.all_cases(False, True)
    return [case for case in every if case.batch == 1 and case.height * case.width < 504 * 504]


def build(name: str, folder: Path) -> None:
    """Build an engine; its output and exit code go to files in ``folder``."""
    for stream, kind in ((sys.stdout, "stdout"), (sys.stderr, "stderr")):
        with (folder / f"{name}.{kind}").open("w") as file:
            os.dup2(file.fileno(), stream.fileno())  # libraries print too
    model, head, *others = ENGINES[name]
    line = ["engines", "--model", model, "--head", head, *others, "--engine-dir", str(TEST_ENGINES)]
    try:
        code = main(line)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    write_atomically(folder / f"{name}.code", str(code).encode())


if __name__ == "__main__":
    place, *names = sys.argv[1:]
    few = few_cases()
    cases.all_cases = lambda *_: few
    for each in names:
        build(each, Path(place))
