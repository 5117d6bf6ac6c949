"""Writes result files, and collects their provenance: machine, versions, commit and date."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from da3_runtime.util.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def output_of(*command: str) -> str | None:
    """Output of a command run in this checkout; None if it fails or is not installed."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of the installed ones among ``packages``."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def provenance(versions: Mapping[str, str]) -> dict[str, object]:
    """Processor, versions, commit and date, for a result file."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    status = output_of("git", "status", "--porcelain")
    return {
        "device": {"cpu": model, "cores": os.cpu_count()},
        "versions": dict(versions),
        "commit": output_of("git", "rev-parse", "--verify", "HEAD"),
        "dirty": None if status is None else bool(status),
        "date": datetime.now(UTC).date().isoformat(),
    }


def write_result(path: Path, content: Mapping[str, object]) -> None:
    """Write a result file atomically; its folder is created.

    Raises
    ------
    ValueError
        If a number is not finite.
    OSError
        If the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def reason(error: BaseException) -> str:
    """One line with an error and its cause; paths are shortened to their last part."""
    text = _first_line(error)
    if error.__cause__ is not None:
        text = f"{text} ({_first_line(error.__cause__)})"
    return re.sub(r"(?:/[\w.@+-]+)+/([\w.@+-]+)", r"\1", text)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
