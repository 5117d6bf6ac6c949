"""``MODEL=all``: every variant, one after another, each in a process of its own.

A process that ends frees all of its memory, so the largest model bounds the memory of the whole run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass

from da3_export.settings import BuildSettings
from da3_export.util.memory import PeakMemory
from da3_export.util.progress import aligned
from da3_runtime.errors import SettingError
from da3_runtime.store.checkpoint import HUB, RANDOM_PREFIX
from da3_runtime.store.manifest import PARITY_NAME, read_manifest
from da3_runtime.variants import VARIANTS, Variant, check_head_has_rays, find_head

ALL = "all"


@dataclass(frozen=True)
class Outcome:
    """How one variant's build ended.

    Attributes
    ----------
    seconds : float
        Wall clock.
    peak_gb : float | None
        Largest anonymous memory in GB (1e9 bytes); None on a system without /proc.
    megabytes : float | None
        Size of its artefacts, 1e6 bytes; None if the build failed.
    worst : dict[str, float]
        Largest mean relative error over all outputs and shapes, by arithmetic.
    """

    model: str
    code: int
    seconds: float
    peak_gb: float | None
    megabytes: float | None
    worst: dict[str, float]


def build_every(settings: BuildSettings, targets: str | None) -> list[Outcome]:
    """Build every variant with the settings' head; a failure does not stop the others.

    Raises
    ------
    SettingError
        If ``WEIGHTS`` or ``SDT_WEIGHTS`` is a file, which fits one variant only, or rays are requested
        with the SDT head, which has none.
    """
    weights = settings.weights or HUB
    if weights != HUB and not weights.startswith(RANDOM_PREFIX):
        raise SettingError("MODEL=all takes WEIGHTS=hub or random:SEED: a checkpoint fits one model.")
    if settings.sdt_weights is not None:
        raise SettingError("MODEL=all takes no SDT_WEIGHTS: a head fits one model.")
    if settings.ray_pose:
        check_head_has_rays(find_head(settings.head))
    return [_build(variant, settings, targets) for variant in VARIANTS.values()]


def _build(variant: Variant, settings: BuildSettings, targets: str | None) -> Outcome:
    model = variant.model_id
    command = [
        sys.executable,
        "-m",
        "da3_export",
        "engines",
        "--model",
        model,
        "--targets",
        targets or "",
    ]
    command += ["--head", settings.head, "--engine-dir", str(settings.engine_dir)]
    command += ["--ray-pose", str(int(settings.ray_pose and bool(variant.ray_graphs)))]
    command += ["--hardware-compatible", str(int(settings.hardware_compatible))]
    command += ["--version-compatible", str(int(settings.version_compatible))]
    if settings.weights is not None:
        command += ["--weights", settings.weights]
    start = time.perf_counter()
    process = subprocess.Popen(command)  # noqa: S603 (our own interpreter and module)
    with PeakMemory(str(process.pid)) as memory:
        code = process.wait()
    seconds = time.perf_counter() - start
    if code != 0:
        return Outcome(model, code, seconds, memory.gb, None, {})
    folder = settings.engine_dir / model / find_head(settings.head)
    manifest = read_manifest(folder)
    assert manifest is not None
    entries = [entry for graph in manifest.graphs.values() for entry in graph.artefacts.values()]
    report = json.loads((folder / PARITY_NAME).read_text(encoding="utf-8"))
    worst: dict[str, float] = {}
    for row in report["rows"]:
        worst[row["arithmetic"]] = max(worst.get(row["arithmetic"], 0.0), row["mean"])
    # Two artefacts may share a file.
    size = sum({file.name: file.size for entry in entries for file in entry.files}.values()) / 1e6
    return Outcome(model, code, seconds, memory.gb, size, worst)


def table(outcomes: list[Outcome], arithmetics: tuple[str, ...]) -> str:
    """The outcomes as aligned text, parity as the largest mean relative error."""
    lines = [("model", "seconds", "peak GB", "MB", *(f"parity {name}" for name in arithmetics))]
    for outcome in outcomes:
        measured = [outcome.worst.get(name) for name in arithmetics]
        errors = ("-" if value is None else f"{value:.1e}" for value in measured)
        failed = outcome.megabytes is None
        megabytes = f"failed ({outcome.code})" if failed else f"{outcome.megabytes:.0f}"
        peak = "-" if outcome.peak_gb is None else f"{outcome.peak_gb:.1f}"
        times = (f"{outcome.seconds:.0f}", peak, megabytes)
        lines.append((outcome.model, *times, *errors))
    return aligned(lines)
