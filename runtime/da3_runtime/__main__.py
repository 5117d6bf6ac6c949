"""The command ``da3-runtime``, also ``python -m da3_runtime``."""

from __future__ import annotations

import argparse
import sys

from da3_runtime import __version__
from da3_runtime.commands import batch, depth, prefetch, scene, serve, video, warmup
from da3_runtime.commands.options import add_completion, run_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog="da3-runtime",
        description="Run depth engines. Without a verb, DA3_MODE selects: RunPod worker or HTTP server.",
    )
    root.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add_completion(root)
    root.set_defaults(run=serve.run_by_environment)
    verbs = root.add_subparsers(dest="verb", metavar="VERB")
    for verb in (depth, batch, scene, video, serve, prefetch, warmup):
        verb.add_parser(verbs)
    return root


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run its verb and return the exit code."""
    return run_command(parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
