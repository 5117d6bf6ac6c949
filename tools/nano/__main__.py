"""Command line of the bundled model's training: ``python -m tools.nano VERB``."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from da3_export.util import interruption
from da3_runtime.commands.options import run_verb

MODEL = "da3-nano"
ROOT = Path(__file__).resolve().parents[2]
STEPS = 11000
SCENE_STEPS = 5000
WORKERS = max(1, (os.cpu_count() or 2) // 2)
HELD_OUT_SEED = 1_000_000
# The SDT head's distillation: scenes that it sees, steps, images per step, longest side of a crop.
SDT_SCENES, SDT_STEPS, SDT_BATCH, SDT_LONGEST = 3000, 1500, 16, 154
MORE_SDT_SCENES, MORE_SDT_STEPS = 1200, 600  # of its second distillation


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog="python -m tools.nano", description=f"Train {MODEL} on rendered scenes, and show it."
    )
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    train = verbs.add_parser("train", help="train the model, then distill its SDT head")
    train.add_argument("--out", type=Path, required=True, help="folder for checkpoint, head and state")
    train.add_argument("--seed", type=int, default=0, help="seed of weights and scenes; default 0")
    train.add_argument("--steps", type=int, default=STEPS, help=f"training steps; default {STEPS}")
    train.add_argument(
        "--scene-steps",
        type=int,
        default=SCENE_STEPS,
        help=f"training steps with scenes of several views; default {SCENE_STEPS}",
    )
    train.add_argument(
        "--sdt-steps", type=int, default=SDT_STEPS, help=f"distillation steps; default {SDT_STEPS}"
    )
    train.add_argument(
        "--workers", type=int, default=WORKERS, help=f"processes that render; default {WORKERS}"
    )
    render = verbs.add_parser("render", help="write scenes as photos with depth to a folder")
    render.add_argument("--out", type=Path, required=True, help="folder for the files")
    render.add_argument("--count", type=int, default=64, help="number of scenes; default 64")
    render.add_argument(
        "--seed",
        type=int,
        default=HELD_OUT_SEED,
        help=f"seed of the scenes; default {HELD_OUT_SEED}, which training never uses",
    )
    scenes = verbs.add_parser("scenes", help="measure cameras and depths of scenes of several views")
    scenes.add_argument("--count", type=int, default=100, help="number of scenes; default 100")
    scenes.add_argument("--json", type=Path, help="file for the figures")
    pictures = verbs.add_parser("pictures", help="draw the documentation's comparison images")
    pictures.add_argument("--photo", type=Path, default=ROOT / "examples" / "temple.jpg")
    pictures.add_argument("--out", type=Path, default=ROOT / "docs", help="folder; default docs")
    pictures.add_argument("--engine-dir", type=Path, default=Path("engines"), help="default engines")
    return root


def run_train(args: argparse.Namespace) -> int:
    """``train``: train or continue, then distill the SDT head."""
    from da3_export.crops import PhotoFolder
    from da3_export.distill import Distillation, distill
    from da3_runtime.store.checkpoint import SDT_FILE
    from da3_runtime.variants import find_variant
    from tools.nano.render import render_folder
    from tools.nano.train import SCENES, train

    variant, first = find_variant(MODEL), args.out / "photos"
    scenes, more = first / "scenes", args.out / "scenes"
    alone = train(variant, args.seed, args.steps, args.workers, first)
    render_folder(scenes, SDT_SCENES, args.seed)
    of_photos = Distillation(
        variant=variant,
        photos=PhotoFolder.find(scenes),
        fused=variant.sdt_fusion_channels,
        steps=args.sdt_steps,
        batch=SDT_BATCH,
        longest=SDT_LONGEST,
        seed=args.seed,
    )
    distill(of_photos, alone, first / SDT_FILE, args.workers)
    checkpoint = train(variant, args.seed, args.scene_steps, args.workers, args.out, SCENES, start=alone)
    # The head follows the features, which scenes of several views have changed.
    render_folder(more, MORE_SDT_SCENES, args.seed + SCENES.first_seed)
    of_scenes = replace(
        of_photos,
        photos=PhotoFolder.find(more),
        steps=MORE_SDT_STEPS,
        start=first / SDT_FILE,
    )
    head = args.out / SDT_FILE
    distill(of_scenes, checkpoint, head, args.workers)
    for path in (checkpoint, head):
        print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")
    return 0


def run_render(args: argparse.Namespace) -> int:
    """``render``: write scenes."""
    from tools.nano.render import render_folder

    render_folder(args.out, args.count, args.seed)
    print(args.out)
    return 0


def run_scenes(args: argparse.Namespace) -> int:
    """``scenes``: measure every way to run the model on scenes of several views."""
    from benchmarks.record import installed, provenance, write_result
    from da3_export.settings import BuildSettings
    from da3_runtime.settings import Settings
    from tools.nano.scene_report import held_out_scenes, report, table

    engine_dir = Settings.from_env().engine.engine_dir
    rows = report(BuildSettings(engine_dir=engine_dir, model_id=MODEL), held_out_scenes(args.count))
    print(table(rows))
    if args.json is not None:
        packages = installed(("torch", "onnxruntime", "numpy"))
        write_result(args.json, {"scenes": args.count, "rows": rows, **provenance(packages)})
    return 0


def run_pictures(args: argparse.Namespace) -> int:
    """``pictures``: draw the comparison images."""
    from da3_runtime.store.settings import EngineSettings
    from tools.nano.pictures import write_pictures

    settings = EngineSettings(engine_dir=args.engine_dir, model_id=MODEL)
    for path in write_pictures(settings, args.photo, args.out):
        print(path)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run its verb; returns the exit code."""
    args = parser().parse_args(argv)
    interruption.listen()
    verbs = {
        "train": run_train,
        "render": run_render,
        "scenes": run_scenes,
        "pictures": run_pictures,
    }
    return run_verb(verbs[args.verb], args)


if __name__ == "__main__":
    sys.exit(main())
