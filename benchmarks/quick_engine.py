"""Builds an engine for a benchmark: parity is measured on one small case only.

    python -m benchmarks.quick_engine --model da3-large --weights random:0 --engine-dir engines

The options are those of ``da3-export engines``. ``--copy-of DIR`` starts from a copy of another engine
folder, whose artefacts are kept. Parity on all cases takes minutes of CPU time, and the benchmarks
compare depth on the GPU themselves.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from da3_export.__main__ import main as export
from da3_export.parity import cases
from da3_export.parity.cases import Case

ONE_CASE = [Case(84, 126, 1)]


def main(argv: list[str]) -> int:
    """Build the engine; returns the exit code of ``da3-export``."""
    if argv[0] == "--copy-of":
        source, argv = Path(argv[1]), argv[2:]
        engine_dir = Path(argv[argv.index("--engine-dir") + 1])
        model = argv[argv.index("--model") + 1]
        # Hard links: a build replaces files and never writes into them.
        if not (engine_dir / model).exists():
            shutil.copytree(source / model, engine_dir / model, copy_function=os.link)
    cases.all_cases = lambda large, known: ONE_CASE
    return export(["engines", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
