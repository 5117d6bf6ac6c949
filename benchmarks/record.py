"""Writes result files, and collects their provenance: machine, versions, commit and date."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from da3_runtime.util.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BUSY_SHARE = 0.1  # of the processors' time; a host with more of it used by others is busy


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


def host_load(seconds: float = 1.0) -> dict[str, object]:
    """How busy the host is; call it while this process has nothing to do.

    Returns
    -------
    dict[str, object]
        ``load_average`` of 1, 5 and 15 minutes; ``used``, the share of all processors' time that was
        used within ``seconds``, time stolen by other virtual machines included (None without
        ``/proc/stat``); and ``busy``, whether it exceeds :data:`BUSY_SHARE`.
    """
    before = _processor_time()
    used = None
    if before is not None:
        time.sleep(seconds)
        after = _processor_time() or before
        idle, total = (late - early for early, late in zip(before, after, strict=True))
        used = round(1 - idle / total, 3) if total else 0.0
    average = [round(each, 2) for each in os.getloadavg()]
    return {"load_average": average, "used": used, "busy": used is not None and used > BUSY_SHARE}


def _processor_time() -> tuple[int, int] | None:
    """Idle and total time of all processors, in ticks of ``/proc/stat``."""
    try:
        line = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; guests are part of user.
    ticks = [int(number) for number in line.split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


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
    return without_folders(text)


def without_folders(text: str) -> str:
    """Shorten every absolute path in a text to its last part."""
    return re.sub(r"(?<![\w.])(?:/[\w.@+-]+)+/([\w.@+-]+)", r"\1", text)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
