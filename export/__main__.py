"""Command line of the exporter: ``python -m export VERB``."""

from __future__ import annotations

import argparse
import sys

from runtime.cli import add_engine_options, run_verb, settings_of
from runtime.settings import Settings


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="python -m export", description="Build depth engines.")
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    engines = verbs.add_parser("engines", help="build what is missing or out of date of an engine")
    add_engine_options(engines)
    engines.add_argument(
        "--targets",
        help="comma-separated artefacts: onnx-fp32, onnx-fp16, tensorrt-rtx, tensorrt "
        "(all but tensorrt, which is built on the GPU it is for)",
    )
    parity = verbs.add_parser("parity", help="measure and write the parity report of an engine")
    add_engine_options(parity)
    return root


def run_engines(args: argparse.Namespace) -> int:
    """``engines``: build, then list what is there."""
    settings = settings_of(args)
    from export.every import ALL

    if settings.model_id.lower() == ALL:
        return run_every(settings, args.targets)
    from export.build import build, request_of

    request = request_of(settings, args.targets)
    manifest = build(request)
    for graph in manifest.graphs.values():
        for kind, entry in sorted(graph.artefacts.items()):
            print(f"{request.folder / entry.files[0].name}  {kind}  {entry.size / 1e6:.1f} MB")
    if not manifest.trained:
        what = "The SDT head is" if manifest.source.trained else "These weights are"
        print(f"{what} untrained: the engine is for tests only.")
    return 0


def run_every(settings: Settings, targets: str | None) -> int:
    """``engines`` for every variant: a table at the end, and exit code 1 if one failed."""
    from export.every import build_every, table
    from export.parity import FP16, FP32

    outcomes = build_every(settings, targets)
    print(table(outcomes, (FP32.arithmetic, FP16.arithmetic)))
    return 0 if all(outcome.code == 0 for outcome in outcomes) else 1


def run_parity(args: argparse.Namespace) -> int:
    """``parity``: measure, print and write; exit code 1 when out of tolerance."""
    settings = settings_of(args)
    from export.build import parity

    report = parity(settings)
    print(report.table())
    return 0 if report.ok else 1


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run its verb."""
    args = parser().parse_args(argv)
    verbs = {"engines": run_engines, "parity": run_parity}
    return run_verb(verbs[args.verb], args)


if __name__ == "__main__":
    sys.exit(main())
