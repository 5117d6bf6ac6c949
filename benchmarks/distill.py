"""Distilling an SDT head: its cost with da3-small's random weights, and its quality with da3-nano.

``python -m benchmarks.distill``
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import RESULTS, ROOT, host_load, installed, provenance, write_result
from da3_export.crops import PhotoFolder, split
from da3_export.curve import Curve
from da3_export.distill import Distillation, abs_rel, distill
from da3_export.random_weights import write_random_checkpoint
from da3_export.util.memory import PeakMemory
from da3_runtime.network import precision
from da3_runtime.network.load import build_sdt, feature_width, load_network, load_sdt
from da3_runtime.network.sdt import LEVELS
from da3_runtime.network.vit import Features
from da3_runtime.store.checkpoint import HUB, bundled_sdt, find_checkpoint
from da3_runtime.variants import PATCH, find_variant
from tools.nano.render import render_folder

OUT = RESULTS / "distill.json"
QUALITY_MODEL, COST_MODEL = "da3-nano", "da3-small"
QUALITY_LONGEST = 154  # as da3-nano's own head was distilled
EXAMPLES = ("cat.jpg", "coffee.jpg", "temple.jpg", "scene.webp")


def quality(folder: Path, scenes: int, steps: int, batch: int) -> dict[str, object]:
    """Distill da3-nano's head from nothing, and measure it beside the bundled one."""
    images = folder / "images"
    render_folder(images, scenes)
    for name in EXAMPLES:
        shutil.copy(ROOT / "examples" / name, images)
    variant = find_variant(QUALITY_MODEL)
    (graph,) = variant.graphs
    checkpoint = find_checkpoint(variant, HUB).path
    photos = PhotoFolder.find(images)
    task = Distillation(variant, photos, variant.sdt_fusion_channels, steps, batch, QUALITY_LONGEST)
    out = folder / "sdt.safetensors"
    distilled = distill(task, checkpoint, out)
    teacher = load_network(variant, graph, checkpoint, precision.FP32)
    held_out = split(photos, task.held_out, task.longest).held_out
    bundled = bundled_sdt(variant)
    assert bundled is not None
    errors = {
        name: abs_rel(teacher, graph, load_sdt(feature_width(graph), path), list(held_out.values()))
        for name, path in (("distilled", out), ("bundled", bundled.path))
    }
    return {
        "model": QUALITY_MODEL,
        "photos": len(photos.names),
        "held_out": len(held_out),
        "steps": steps,
        "batch": batch,
        "longest": QUALITY_LONGEST,
        "abs_rel": round(errors["distilled"], 4),
        "abs_rel_of_fp32_head": round(distilled, 4),
        "abs_rel_of_bundled_head": round(errors["bundled"], 4),
        "curve": [
            {name: line[name] for name in ("step", "loss", "held_out_abs_rel")} for line in curve_of(out)
        ],
    }


def cost(folder: Path, batch: int, steps: int) -> dict[str, object]:
    """Seconds of a step and peak memory of distilling a head for the model with random weights."""
    variant = find_variant(COST_MODEL)
    photos = PhotoFolder(ROOT / "examples", EXAMPLES)
    longest = variant.processing_res
    task = Distillation(variant, photos, variant.sdt_fusion_channels, steps, batch, longest)
    out = folder / f"{batch}.safetensors"
    with PeakMemory() as memory:
        distill(task, folder / "random" / "model.safetensors", out)
    return {
        "batch": batch,
        "seconds_per_step": curve_of(out)[-1]["seconds_per_step"],
        "peak_gb": round(memory.gb or 0.0, 2),
    }


def tflop_per_image() -> float:
    """Products and convolutions of the head for one square image, forward and backward, counted.

    It costs the same for every model of this width and resolution. The backbone and the DPT head come on
    top, forward only.
    """
    variant = find_variant(COST_MODEL)
    grid = (variant.processing_res // PATCH,) * 2
    with torch.device("meta"):
        width = feature_width(variant.graphs[0])
        head = build_sdt(width, variant.sdt_fusion_channels).train().requires_grad_(True)
        levels = [torch.zeros(1, grid[0] * grid[1], width) for _ in range(LEVELS)]
        features = Features(levels, [torch.zeros(1, width)] * LEVELS, grid)
        with FlopCounterMode(display=False) as counter:
            head(features).mean().backward()
    return float(round(counter.get_total_flops() / 1e12, 2))


def curve_of(out: Path) -> list[dict[str, float]]:
    """The lines that a run wrote beside its output."""
    return [json.loads(line) for line in Curve.paths(out)[0].read_text(encoding="utf-8").splitlines()]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distill", description=__doc__)
    parser.add_argument("--scenes", type=int, default=400, help="rendered scenes; default 400")
    parser.add_argument("--steps", type=int, default=300, help="steps of da3-nano's head; default 300")
    parser.add_argument("--batch", type=int, default=8, help="images of its steps; default 8")
    parser.add_argument(
        "--cost-batches", type=int, nargs="*", default=[1, 2], help="of da3-small; default 1 2"
    )
    parser.add_argument("--cost-steps", type=int, default=2, help="steps of da3-small; default 2")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    load = host_load()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_checkpoint(find_variant(COST_MODEL), 0, folder / "random")
        # A process for each, as a process keeps memory that it no longer needs.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            costs = [
                pool.submit(cost, folder, batch, args.cost_steps).result() for batch in args.cost_batches
            ]
            measured = pool.submit(quality, folder, args.scenes, args.steps, args.batch).result()
    packages = installed(("torch", "numpy"))
    content = {
        "quality": measured,
        "cost": {
            "model": COST_MODEL,
            "tflop_per_image": tflop_per_image(),
            "weights": "random:0",
            "longest": find_variant(COST_MODEL).processing_res,
            "rows": costs,
        },
        "threads": torch.get_num_threads(),
        "host": load,
        **provenance(packages),
    }
    write_result(args.out, content)
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
