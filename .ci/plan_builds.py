"""Plan a run of engines.yml: check the models, warn of builds that are too large for a standard runner.

``PYTHONPATH=runtime python .ci/plan_builds.py --models da3-small,da3-base --head dpt`` writes
``models``, a JSON list, to ``GITHUB_OUTPUT``, a table to ``GITHUB_STEP_SUMMARY``, and warnings to the
log. It needs no packages.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from da3_runtime.errors import DA3Error, SettingError
from da3_runtime.variants import VARIANTS, find_head, find_variant

BUILDS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "builds.json"
ALL = "all"
# A standard Linux runner, in GB: 16 of memory (8 in a private repository), and the promised disk.
RUNNER_MEMORY, RUNNER_DISK = 8.0, 14.0
# `make setup`, with PyTorch's CPU build and pip's cache, in GB.
INSTALLED = 3.0


def chosen(models: str) -> list[str]:
    """The ids of the models in a list with commas or spaces between them, or of all.

    Raises
    ------
    SettingError
        If the list is empty or names no model.
    """
    names = models.replace(",", " ").split()
    if not names:
        raise SettingError(f"models is empty: name some of {', '.join(VARIANTS)}, or {ALL}.")
    if [name.lower() for name in names] == [ALL]:
        return list(VARIANTS)
    return list(dict.fromkeys(find_variant(name, "models").model_id for name in names))


def needs(head: str, builds: Path = BUILDS) -> dict[str, tuple[float, float]]:
    """Peak memory and disk of each model's build with a head, in GB.

    The disk holds the checkpoint (as large as the FP32 ONNX), both ONNX, the plan, and the packages.
    """
    return {
        row["model"]: (
            row["peak_gb"],
            round((2 * row["fp32_mb"] + row["fp16_mb"] + row["plan_mb"]) / 1000 + INSTALLED, 1),
        )
        for row in json.loads(builds.read_text(encoding="utf-8"))["rows"]
        if row["head"] == head
    }


def append(variable: str, text: str) -> None:
    """Add a line to the file that a variable of GitHub's names, or print it."""
    if path := os.environ.get(variable):
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(text + "\n")
    else:
        print(text)


def main() -> int:
    """Write the plan; 2 and a sentence if the inputs are wrong."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--models", required=True)
    options.add_argument("--head", default="dpt")
    args = options.parse_args()
    try:
        models, head = chosen(args.models), find_head(args.head)
    except DA3Error as error:
        print(f"::error::{error}")
        return error.exit_code
    measured = needs(head)
    rows = ["| model | peak memory (GB) | disk (GB) |", "| --- | --- | --- |"]
    for model in models:
        if model not in measured:
            print(f"::warning::{BUILDS.name} has no row for {model}, {head}; its build may not fit.")
            continue
        memory, disk = measured[model]
        rows.append(f"| {model} | {memory:.1f} | {disk:.1f} |")
        if memory > RUNNER_MEMORY or disk > RUNNER_DISK:
            print(
                f"::warning::{model} takes {memory:.1f} GB of memory and {disk:.1f} GB of disk. A "
                f"standard runner has 16 GB of memory ({RUNNER_MEMORY:.0f} in a private repository) and "
                f"{RUNNER_DISK:.0f} GB of disk."
            )
    append("GITHUB_STEP_SUMMARY", "\n".join(rows))
    append("GITHUB_OUTPUT", f"models={json.dumps(models)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
