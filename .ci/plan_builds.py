"""The builds of a run of engines.yml: checks the models, says what each build takes.

``PYTHONPATH=. python .ci/plan_builds.py --models da3-small,da3-base --head dpt`` writes ``models``, a
JSON list, to ``GITHUB_OUTPUT``, a table to ``GITHUB_STEP_SUMMARY`` and warnings to the log. Needs no
packages.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from da3_runtime.errors import DA3Error, SettingError
from da3_runtime.variants import VARIANTS, Head, find_head, find_variant

README = Path(__file__).resolve().parent.parent / "README.md"
ALL = "all"
# What a standard Linux runner has, in GB: memory in a private repository, and the disk that is promised.
RUNNER_MEMORY, RUNNER_DISK = 8.0, 14.0
# What `make setup` installs, in GB, with PyTorch's CPU build and pip's cache.
INSTALLED = 3.0


class Need(NamedTuple):
    """What a build takes, in GB."""

    memory: float
    disk: float


def read_needs(head: Head, readme: str) -> dict[str, Need]:
    """What the README's table "What a build takes" says of each model with a head.

    The disk is for the checkpoint (as large as the FP32 ONNX), both ONNX and the plan, and for what is
    installed.
    """
    row = re.compile(
        rf"^\| (\S+) \| {head} \| (\d+) \+ (\d+), (\d+) \| \d+ \| ([\d.]+) \|", re.MULTILINE
    )
    return {
        model: Need(float(peak), round((2 * int(fp32) + int(fp16) + int(plan)) / 1000 + INSTALLED, 1))
        for model, fp32, fp16, plan, peak in row.findall(readme)
    }


def chosen(models: str) -> list[str]:
    """The ids of the models in a list with commas or spaces between, or of all.

    Raises
    ------
    SettingError
        If there is none, or one is no model.
    """
    names = models.replace(",", " ").split()
    if not names:
        raise SettingError(f"models is empty; name some of: {', '.join(VARIANTS)}; or {ALL}.")
    if [name.lower() for name in names] == [ALL]:
        return list(VARIANTS)
    return list(dict.fromkeys(find_variant(name, "models").model_id for name in names))


def warnings_of(models: list[str], needs: dict[str, Need]) -> list[str]:
    """A sentence for each build that a standard runner may be too small for."""
    return [
        f"{model} takes {memory:.1f} GB of memory and {disk:.1f} GB of disk: a standard runner has "
        f"16 GB of memory ({RUNNER_MEMORY:.0f} GB in a private repository), and {RUNNER_DISK:.0f} GB "
        "of disk are promised."
        for model, (memory, disk) in ((model, needs[model]) for model in models)
        if memory > RUNNER_MEMORY or disk > RUNNER_DISK
    ]


def main() -> int:
    """Write what the workflow reads; 2 and a sentence where the inputs are wrong."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--models", required=True)
    options.add_argument("--head", default="dpt")
    args = options.parse_args()
    try:
        models, head = chosen(args.models), find_head(args.head)
    except DA3Error as error:
        print(f"::error::{error}")
        return error.exit_code
    needs = read_needs(head, README.read_text())
    for warning in warnings_of(models, needs):
        print(f"::warning::{warning}")
    rows = [f"| {model} | {needs[model].memory:.1f} | {needs[model].disk:.1f} |" for model in models]
    table = ["| model | peak memory (GB) | disk (GB) |", "| --- | --- | --- |", *rows]
    append("GITHUB_STEP_SUMMARY", "\n".join(table))
    append("GITHUB_OUTPUT", f"models={json.dumps(models)}")
    return 0


def append(variable: str, text: str) -> None:
    """Add a line to the file that GitHub reads, and to the log where there is none."""
    path = os.environ.get(variable)
    if path is None:
        print(text)
        return
    with Path(path).open("a") as stream:
        stream.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
