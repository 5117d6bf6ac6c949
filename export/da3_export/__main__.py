"""The command ``da3-export``, also ``python -m da3_export``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from da3_export.accuracy import VIEWS
from da3_export.util import interruption
from da3_runtime import __version__
from da3_runtime.commands.options import (
    ENGINE_OPTIONS,
    RUN_OPTIONS,
    Verbs,
    add_completion,
    add_options,
    environment_of,
    run_command,
)
from da3_runtime.errors import SettingError
from da3_runtime.variants import DEFAULT_MODEL

if TYPE_CHECKING:
    from da3_export.settings import BuildSettings

DISTILL_STEPS = 1500
HELD_OUT_PERCENT = 5.0
WORKERS = max(1, (os.cpu_count() or 2) // 2)
BUILD_OPTIONS = {
    "hardware_compatible": "1 for a TensorRT plan for all GPUs of compute capability 8.0 and later; "
    "default 0",
    "version_compatible": "1 for a TensorRT plan that tensorrt-lean runs too; default 0",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="da3-export", description="Build and check depth engines.")
    root.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add_completion(root)
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (_add_engines, _add_parity, _add_list, _add_publish, _add_distill, _add_evaluate):
        add(verbs)
    return root


def settings_of(args: argparse.Namespace) -> BuildSettings:
    """The environment's settings with the given options on top; raises as ``BuildSettings.from_env``."""
    from da3_export.settings import BuildSettings

    return BuildSettings.from_env(environment_of(args))


def _add_engines(verbs: Verbs[argparse.ArgumentParser]) -> None:
    engines = verbs.add_parser("engines", help="build the missing and outdated artefacts of an engine")
    model = f"model id, hub repository, or all; default {DEFAULT_MODEL}"
    add_options(engines, (*ENGINE_OPTIONS, *BUILD_OPTIONS), **BUILD_OPTIONS, model=model)
    engines.add_argument(
        "--targets",
        help="comma-separated artefacts: onnx-fp32, onnx-fp16, onnx-fp16-ort, tensorrt-rtx, tensorrt; "
        "default all but tensorrt, which is built on the GPU it is for",
    )
    engines.set_defaults(run=run_engines)


def run_engines(args: argparse.Namespace) -> int:
    """``engines``: build, then list the engine's files."""
    settings = settings_of(args)
    from da3_export.build_all import ALL

    if settings.model_id.lower() == ALL:
        return _build_every(settings, args.targets)
    from da3_export.build import build
    from da3_export.request import request_of

    request = request_of(settings, args.targets)
    manifest = build(request)
    for graph in manifest.graphs.values():
        for name, entry in sorted(graph.artefacts.items()):
            path = request.folder / entry.files[0].name
            print(f"{path}  {name}  {entry.size / 1e6:.1f} MB  parity {entry.parity}")
    if not manifest.trained:
        what = "SDT head" if manifest.source.trained else "model"
        print(f"The {what} has random weights: the engine is for tests only.")
    return 0


def _build_every(settings: BuildSettings, targets: str | None) -> int:
    """Build every model: a table at the end, and exit code 1 if one failed."""
    from da3_export.build_all import build_every, table
    from da3_export.parity.subjects import FP16, FP32

    outcomes = build_every(settings, targets)
    print(table(outcomes, (FP32.arithmetic, FP16.arithmetic)))
    return 0 if all(outcome.code == 0 for outcome in outcomes) else 1


def _add_parity(verbs: Verbs[argparse.ArgumentParser]) -> None:
    parity = verbs.add_parser("parity", help="measure and write the parity report of an engine")
    add_options(parity, ENGINE_OPTIONS)
    parity.set_defaults(run=run_parity)


def run_parity(args: argparse.Namespace) -> int:
    """``parity``: measure, print and write; exit code 1 if the engine is out of tolerance."""
    settings = settings_of(args)
    from da3_export.parity.measure import measure_engine

    report = measure_engine(settings)
    print(report.table())
    return 0 if report.ok else 1


def _add_list(verbs: Verbs[argparse.ArgumentParser]) -> None:
    listing = verbs.add_parser("list", help="list the engines of ENGINE_DIR, artefact by artefact")
    add_options(listing, ("engine_dir",))
    listing.add_argument("--json", action="store_true", help="print JSON instead of a table")
    listing.set_defaults(run=run_list)


def run_list(args: argparse.Namespace) -> int:
    """``list``: one row for each artefact."""
    engine_dir = settings_of(args).engine_dir
    from da3_export.list_engines import engine_rows, list_engines, to_json

    print(to_json(engine_rows(engine_dir)) if args.json else list_engines(engine_dir))
    return 0


def _add_publish(verbs: Verbs[argparse.ArgumentParser]) -> None:
    publish = verbs.add_parser("publish", help="upload the engines of ENGINE_DIR to a hub repository")
    texts = {
        "model": "model id, hub repository, or all; default all",
        "head": "head of the network, dpt or sdt; default both",
    }
    add_options(publish, ("model", "head", "engine_dir"), **texts)
    publish.add_argument(
        "--repo", required=True, metavar="OWNER/NAME", help="created if it does not exist"
    )
    publish.add_argument("--public", action="store_true", help="create the repository as a public one")
    publish.add_argument("--dry-run", action="store_true", help="list the files, upload nothing")
    publish.set_defaults(run=run_publish)


def run_publish(args: argparse.Namespace) -> int:
    """``publish``: upload, print the commit's address; or list the files, if it is a dry run."""
    settings = settings_of(args)
    given = settings.resolved(environment_of(args))
    from da3_export.build_all import ALL
    from da3_export.hub_upload import find_publishable, publish, to_publish
    from da3_runtime.variants import find_head, find_variant

    model, head = given["MODEL"], given.get("HEAD")
    variant = find_variant(model) if model and model.lower() != ALL else None
    engines, left_out = find_publishable(settings.engine_dir, variant, find_head(head) if head else None)
    for sentence in left_out:
        print(sentence, file=sys.stderr)
    if args.dry_run:
        print(to_publish(settings.engine_dir, engines))
    else:
        print(publish(settings.engine_dir, engines, args.repo, private=not args.public))
    return 0


def _add_distill(verbs: Verbs[argparse.ArgumentParser]) -> None:
    distill = verbs.add_parser(
        "distill-sdt", help="train an SDT head to predict what the DPT head predicts"
    )
    add_options(distill, ("model", "weights", "revision"))
    distill.add_argument(
        "--images", required=True, type=Path, help="folder of photos; folders below it count too"
    )
    distill.add_argument(
        "--out",
        type=Path,
        required=True,
        help=".safetensors file for SDT_WEIGHTS; the curve is written beside it",
    )
    distill.add_argument("--seed", type=int, default=0, help="seed of weights and crops; default 0")
    distill.add_argument(
        "--steps", type=int, default=DISTILL_STEPS, help=f"training steps; default {DISTILL_STEPS}"
    )
    distill.add_argument(
        "--batch",
        type=int,
        default=16,
        help="images of a step, about 2 GB of memory each at 504 pixels; default 16",
    )
    distill.add_argument(
        "--longest", type=int, help="longest side of a crop in pixels; default the model's own"
    )
    distill.add_argument(
        "--held-out",
        type=float,
        default=HELD_OUT_PERCENT,
        metavar="PERCENT",
        help="photos to measure on and not to learn from, one at least and 64 at most; "
        f"default {HELD_OUT_PERCENT:g} percent",
    )
    distill.add_argument(
        "--workers", type=int, default=WORKERS, help="processes that read; default half of the cores"
    )
    distill.set_defaults(run=run_distill)


def run_distill(args: argparse.Namespace) -> int:
    """``distill-sdt``: write a head for ``SDT_WEIGHTS``, or go on with an unfinished one."""
    settings = settings_of(args)
    from da3_export.crops import PhotoFolder
    from da3_export.distill import Distillation, distill
    from da3_runtime.store.checkpoint import HUB, find_checkpoint
    from da3_runtime.variants import find_variant

    variant = find_variant(settings.model_id)
    if args.out.suffix != ".safetensors":
        raise SettingError(f"--out {args.out}: give a name that ends in .safetensors.")
    if args.workers < 0:
        raise SettingError(f"--workers {args.workers}: give a whole number from 0.")
    task = Distillation(
        variant=variant,
        photos=PhotoFolder.find(args.images),
        fused=settings.sdt_fusion_channels or variant.sdt_fusion_channels,
        steps=args.steps,
        batch=args.batch,
        longest=variant.processing_res if args.longest is None else args.longest,
        seed=args.seed,
        held_out=args.held_out,
    )
    checkpoint = find_checkpoint(
        variant, settings.weights or HUB, settings.revision, settings.cached_models_dir
    )
    error = distill(task, checkpoint.path, args.out, args.workers)
    print(f"{args.out}  {args.out.stat().st_size / 1e6:.1f} MB  AbsRel against the DPT head {error:.4f}")
    return 0


def _add_evaluate(verbs: Verbs[argparse.ArgumentParser]) -> None:
    evaluate = verbs.add_parser(
        "evaluate",
        help="accuracy on photos with known depth, for both heads and every backend that can run here",
    )
    measures_all = ("head", "backend", "precision", "ray_pose")
    add_options(evaluate, tuple(name for name in RUN_OPTIONS if name not in measures_all))
    where = evaluate.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--dataset",
        metavar="NAME:DIR",
        help="data set and its folder: nyu, nyu-raw, kitti, kitti-garg, kitti-eigen, eth3d, diode, tum, "
        "folder",
    )
    where.add_argument("--data", type=Path, metavar="DIR", help="the same as --dataset folder:DIR")
    evaluate.add_argument(
        "--out", type=Path, help="folder for results; a run that was stopped goes on from there"
    )
    evaluate.add_argument("--json", type=Path, help="file for the figures, beside those in --out")
    evaluate.add_argument(
        "--align",
        choices=("median", "least-squares", "none"),
        help="fit depth to the known depth of each photo: one factor; scale and shift of depth; or not; "
        "default none for depth in meters, else median",
    )
    evaluate.add_argument(
        "--depth-scale", type=float, help="depth of one step of a 16-bit image, folder only"
    )
    evaluate.add_argument("--split", type=Path, help="file with the list of photos, KITTI only")
    evaluate.add_argument(
        "--focal-length-px", type=float, help="focal length in pixels of the photos, for depth in meters"
    )
    evaluate.add_argument(
        "--photos", type=int, help="at most so many photos, spread evenly; default all"
    )
    evaluate.add_argument(
        "--views",
        type=int,
        default=VIEWS,
        help=f"photos of a scene that are run together for its cameras, 0 for none; default {VIEWS}",
    )
    evaluate.set_defaults(run=run_evaluate)


def run_evaluate(args: argparse.Namespace) -> int:
    """``evaluate``: print the table, and write figures and images where ``--out`` and ``--json`` say."""
    name, _, folder = ("folder", "", args.data) if args.data else args.dataset.partition(":")
    if not folder:
        raise SettingError(f"--dataset {name!r}: give NAME:DIR, such as kitti:/data/kitti.")
    for option in ("photos", "focal_length_px"):
        value = getattr(args, option)
        if value is not None and not value > 0:
            raise SettingError(f"--{option.replace('_', '-')} must be above 0.")
    settings = settings_of(args)
    from da3_export.accuracy.evaluate import Request, evaluate
    from da3_export.accuracy.metrics import Alignment
    from da3_export.accuracy.report import table, to_json, write_report
    from da3_export.accuracy.samples import Source
    from da3_runtime.util.files import write_atomically

    request = Request(
        name,
        Source(Path(folder), args.depth_scale, args.split),
        args.align and Alignment(args.align),
        args.focal_length_px,
        args.photos,
        args.views,
        args.out,
    )
    evaluation = evaluate(settings, request)
    print(table(evaluation))
    if args.out is not None:
        write_report(evaluation, request, args.out)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.json, to_json(evaluation, request).encode())
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run its verb and return the exit code."""
    interruption.listen()
    return run_command(parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
