"""Command line of the exporter: ``python -m da3_export VERB``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from da3_export.util import interruption
from da3_runtime.commands.options import ENGINE_OPTIONS, add_engine_options, run_verb, settings_of
from da3_runtime.errors import SettingError
from da3_runtime.settings import Settings
from da3_runtime.variants import find_variant

DISTILL_STEPS = 1500
WORKERS = max(1, (os.cpu_count() or 2) // 2)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="python -m da3_export", description="Build depth engines.")
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    engines = verbs.add_parser("engines", help="build what is missing or out of date of an engine")
    add_engine_options(engines, (*ENGINE_OPTIONS, "hardware_compatible", "version_compatible"))
    engines.add_argument(
        "--targets",
        help="comma-separated artefacts: onnx-fp32, onnx-fp16, tensorrt-rtx, tensorrt "
        "(all but tensorrt, which is built on the GPU it is for)",
    )
    distill = verbs.add_parser("distill-sdt", help="train an SDT head to give the DPT head's depth")
    add_engine_options(distill, ("model", "weights", "revision"))
    distill.add_argument("--images", type=Path, required=True, help="folder of photos")
    distill.add_argument("--out", type=Path, required=True, help=".safetensors file for SDT_WEIGHTS")
    distill.add_argument("--seed", type=int, default=0, help="seed of weights and crops; 0")
    distill.add_argument("--steps", type=int, default=DISTILL_STEPS, help=f"{DISTILL_STEPS}")
    distill.add_argument("--batch", type=int, default=16, help="images per step; 16")
    distill.add_argument("--longest", type=int, help="longest side of a crop; the model's own")
    distill.add_argument("--workers", type=int, default=WORKERS, help=f"reading processes; {WORKERS}")
    evaluate = verbs.add_parser("evaluate", help="accuracy on photos whose depth is known")
    add_engine_options(evaluate, ("model", "weights", "engine_dir", "processing_res", "threads"))
    evaluate.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder of photos with NAME.depth.npz, NAME.npy or NAME.depth.png beside NAME.jpg",
    )
    evaluate.add_argument("--depth-scale", type=float, help="depth of one step of a PNG")
    evaluate.add_argument("--json", type=Path, help="file for the figures")
    listing = verbs.add_parser("list", help="list the engines of ENGINE_DIR")
    add_engine_options(listing, ("engine_dir",))
    listing.add_argument("--json", action="store_true", help="print JSON instead of a table")
    publish = verbs.add_parser("publish", help="upload the engines of ENGINE_DIR to a hub repository")
    add_engine_options(publish, ("engine_dir",))
    publish.add_argument("--repo", required=True, metavar="OWNER/NAME", help="made if it is not there")
    publish.add_argument("--public", action="store_true", help="of a repository that is made; private")
    parity = verbs.add_parser("parity", help="measure and write the parity report of an engine")
    add_engine_options(parity)
    return root


def run_engines(args: argparse.Namespace) -> int:
    """``engines``: build, then list what is there."""
    settings = settings_of(args)
    from da3_export.build_all import ALL

    if settings.model_id.lower() == ALL:
        return run_every(settings, args.targets)
    from da3_export.build import build
    from da3_export.request import request_of

    request = request_of(settings, args.targets)
    manifest = build(request)
    for graph in manifest.graphs.values():
        for name, entry in sorted(graph.artefacts.items()):
            print(f"{request.folder / entry.files[0].name}  {name}  {entry.size / 1e6:.1f} MB")
    if not manifest.trained:
        what = "The SDT head is" if manifest.source.trained else "These weights are"
        print(f"{what} untrained: the engine is for tests only.")
    return 0


def run_every(settings: Settings, targets: str | None) -> int:
    """``engines`` for every variant: a table at the end, and exit code 1 if one failed."""
    from da3_export.build_all import build_every, table
    from da3_export.parity.subjects import FP16, FP32

    outcomes = build_every(settings, targets)
    print(table(outcomes, (FP32.arithmetic, FP16.arithmetic)))
    return 0 if all(outcome.code == 0 for outcome in outcomes) else 1


def run_parity(args: argparse.Namespace) -> int:
    """``parity``: measure, print and write; exit code 1 when out of tolerance."""
    settings = settings_of(args)
    from da3_export.parity.measure import measure_engine

    report = measure_engine(settings)
    print(report.table())
    return 0 if report.ok else 1


def run_publish(args: argparse.Namespace) -> int:
    """``publish``: upload, print the commit's address."""
    settings = settings_of(args)
    from da3_export.hub_upload import publish

    print(publish(settings.engine_dir, args.repo, private=not args.public))
    return 0


def run_distill(args: argparse.Namespace) -> int:
    """``distill-sdt``: write a head for ``SDT_WEIGHTS``."""
    settings = settings_of(args)
    from da3_export.distill import Photos, distill
    from da3_runtime.store.checkpoint import HUB, find_checkpoint

    variant = find_variant(settings.model_id)
    if args.out.suffix != ".safetensors":
        raise SettingError(f"--out {args.out}: give a name that ends in .safetensors.")
    longest = args.longest or variant.processing_res
    photos = Photos(args.images, args.steps, args.batch, longest, args.seed)
    checkpoint = find_checkpoint(
        variant, settings.weights or HUB, settings.revision, settings.cached_models_dir
    )
    channels = settings.sdt_fusion_channels or variant.sdt_fusion_channels
    distill(variant, checkpoint.path, photos, channels, args.workers, args.out)
    print(f"{args.out}  {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    """``evaluate``: print the figures, and write them where ``--json`` asks for it."""
    settings = settings_of(args)
    from da3_export.evaluate import evaluate, table, to_json
    from da3_runtime.util.files import write_atomically

    figures = evaluate(settings, args.data, depth_scale=args.depth_scale)
    print(table(figures))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.json, to_json(figures, settings.model_id, args.data).encode())
    return 0


def run_list(args: argparse.Namespace) -> int:
    """``list``: print a table or JSON."""
    settings = settings_of(args)
    from da3_export.list_engines import engine_rows, list_engines, to_json

    if args.json:
        print(to_json(engine_rows(settings.engine_dir)))
    else:
        print(list_engines(settings.engine_dir))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run its verb."""
    args = parser().parse_args(argv)
    interruption.listen()
    verbs = {
        "engines": run_engines,
        "parity": run_parity,
        "list": run_list,
        "distill-sdt": run_distill,
        "evaluate": run_evaluate,
        "publish": run_publish,
    }
    return run_verb(verbs[args.verb], args)


if __name__ == "__main__":
    sys.exit(main())
