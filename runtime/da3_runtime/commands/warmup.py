"""``da3-runtime warmup``: load a model and run it once."""

from __future__ import annotations

import argparse

from da3_runtime.commands.options import RUN_OPTIONS, Verbs, add_options, log_to_stderr, settings_of


def add_parser(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser("warmup", help="load a model and run it once, then exit")
    add_options(parser, RUN_OPTIONS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load the model of ``da3-runtime serve`` and run it once; exit code 0 on success."""
    log_to_stderr()
    settings = settings_of(args)
    from da3_runtime.serve.service import Service
    from da3_runtime.serve.startup import warm_up

    warm_up(Service(settings))
    return 0
