"""Lists the GPU time of a backend by kernel.

    python -m benchmarks.kernels --model da3-large --backend onnxruntime-cuda --size 504x504

PyTorch's profiler records one run of a shape that has run before: the kernels and copies of every
library.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import BEFORE_PREFIX, CUDA, ENGINE_BACKENDS, extra_names, make_contender
from benchmarks.record import RESULTS, installed, provenance, write_result
from benchmarks.report import PACKAGES, gpu_facts
from benchmarks.shapes import positive, size_of
from da3_export.parity.cases import Case, case_images
from da3_export.util.progress import aligned
from da3_runtime.backends.eager import Eager
from da3_runtime.commands.options import run_verb
from da3_runtime.errors import SettingError
from da3_runtime.inference.loaded_model import Loaded
from da3_runtime.settings import Settings
from da3_runtime.variants import find_head, find_variant

WARM_UP = 4  # runs; the second run of a shape captures its CUDA graph
LISTED, WIDTH = 25, 100


class Kernel(NamedTuple):
    """A kernel or kind of copy: how often it ran, and its total milliseconds."""

    name: str
    times: int
    ms: float


def kernels_of(loaded: Loaded, case: Case) -> list[Kernel]:
    """Kernels and copies of one run of a case, longest first."""
    images = case_images(case)
    for _ in range(WARM_UP):
        loaded.run(images)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        loaded.run(images)
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiler.events() or ():
        if event.device_type.name == "CUDA":
            found.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    return sorted(
        (Kernel(name, len(ms), sum(ms)) for name, ms in found.items()), key=lambda each: -each.ms
    )


def measure(args: argparse.Namespace) -> int:
    """Profile a run, print the longest kernels, and write all of them to the result file."""
    if not torch.cuda.is_available():
        raise SettingError(
            "This benchmark needs an NVIDIA GPU and a PyTorch built for CUDA (make setup DEVICE=cuda)."
        )
    variant, head = find_variant(args.model, "--model"), find_head(args.head)
    case = Case(*size_of(args.size), positive("--batch", args.batch))
    engine_dir = Settings.from_env().engine.engine_dir
    if args.before is None and args.backend.startswith(BEFORE_PREFIX):
        raise SettingError(f"--backend {args.backend} runs an engine of --before: set --before.")
    contender = make_contender(args.backend, variant, head, engine_dir, engine_dir, args.before)
    loaded = contender.load()
    try:
        kernels = kernels_of(loaded, case)
    finally:
        loaded.close()
    total_ms = sum(each.ms for each in kernels)
    title = f"{variant.model_id}/{head}, {args.backend}, {case.batch} x {case.height} x {case.width}"
    print(f"{title}: {sum(each.times for each in kernels)} kernels and copies in {total_ms:.2f} ms")
    rows = [(f"{each.ms:.3f}", str(each.times), each.name[:WIDTH]) for each in kernels[:LISTED]]
    print(aligned([("ms", "times", "kernel"), *rows]))
    content = {
        **provenance(installed(PACKAGES)),
        "gpu": gpu_facts(),
        "model": variant.model_id,
        "head": head,
        "backend": args.backend,
        **case._asdict(),
        "ms": total_ms,
        "kernels": [each._asdict() for each in kernels],
    }
    write_result(args.out, content)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    add = root.add_argument
    choices = (Eager.name, *ENGINE_BACKENDS[CUDA], *extra_names(CUDA))
    add("--model", default=os.environ.get("MODEL") or "da3-large", help="MODEL: %(default)s")
    add("--head", default=os.environ.get("HEAD") or "dpt", help="HEAD: %(default)s")
    add("--backend", choices=choices, required=True)
    add("--size", default="504x504", help="height x width; %(default)s")
    add("--before", type=Path, help="folder of the engines that before-NAME runs")
    add("--batch", default="1", help="%(default)s")
    add("--out", type=Path, default=RESULTS / "kernels.json", help="benchmarks/results/kernels.json")
    return root


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and measure."""
    return run_verb(measure, parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
