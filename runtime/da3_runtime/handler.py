"""Entry point of the RunPod worker: ``python -m da3_runtime.handler``.

Options that this command does not define go to the RunPod SDK: ``--rp_serve_api``, ``--test_input``,
``--rp_log_level``, ...
"""

from __future__ import annotations

import argparse
import sys

from da3_runtime.commands.options import log_to_stderr, run_verb, settings_of
from da3_runtime.util.garbage import no_garbage_collection

with no_garbage_collection(freeze=True):
    from da3_runtime.serve.runpod_worker import start_worker
    from da3_runtime.serve.service import Service
    from da3_runtime.serve.startup import check_exposure, warm_up
    from da3_runtime.settings import Settings


def parser() -> argparse.ArgumentParser:
    """The command line; the SDK parses the options that this parser does not know."""
    options = argparse.ArgumentParser(prog="python -m da3_runtime.handler", description=__doc__)
    options.add_argument(
        "--warmup", action="store_true", help="load the model and run it once, then exit"
    )
    options.add_argument(
        "--model-id", dest="MODEL", help="model to serve or warm up (variable MODEL_ID)"
    )
    options.add_argument(
        "--use-sdt-head", dest="HEAD", action="store_const", const="sdt", help="use the SDT head"
    )
    return options


def _check_local_api(settings: Settings, arguments: list[str]) -> None:
    """Apply the rule of :func:`check_exposure` to the SDK's local server."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--rp_serve_api", action="store_true")
    options.add_argument("--rp_api_host", default="localhost")
    args, _ = options.parse_known_args(arguments)
    if args.rp_serve_api:
        check_exposure(args.rp_api_host, settings.server)


def main() -> int:
    """Parse the command line, run the worker and return the exit code."""
    args, rest = parser().parse_known_args()
    log_to_stderr()

    def run(args: argparse.Namespace) -> int:
        settings = settings_of(args)
        if args.warmup:
            warm_up(Service(settings))
            return 0
        _check_local_api(settings, rest)
        return start_worker(settings)

    return run_verb(run, args)


if __name__ == "__main__":
    sys.exit(main())
