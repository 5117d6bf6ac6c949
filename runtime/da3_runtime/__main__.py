"""Command line of the runtime: ``python -m da3_runtime [VERB]``."""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
from pathlib import Path

from da3_runtime import __version__
from da3_runtime.commands.options import (
    RUN_OPTIONS,
    add_engine_options,
    log_to_stderr,
    run_verb,
    settings_of,
)
from da3_runtime.errors import SettingError
from da3_runtime.serve.mode import PLATFORM_BYTES, PLATFORM_PORT, Mode, find_mode
from da3_runtime.variants import SERVED_MODEL


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="python -m da3_runtime", description="Run depth engines.")
    root.add_argument("--version", action="version", version=f"da3-engines {__version__}")
    verbs = root.add_subparsers(
        dest="verb", metavar="VERB", help="without one: RunPod worker or HTTP server, as DA3_MODE says"
    )
    depth = verbs.add_parser("depth", help="depth of photos, as pictures and as numbers")
    depth.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files and folders")
    depth.add_argument(
        "--out", default=Path("depth.png"), type=Path, help="folder, or the picture (.png) of one image"
    )
    depth.add_argument(
        "--outputs", default="preview,camera", help="comma-separated, see the README; preview,camera"
    )
    depth.add_argument("--color-map", default="inferno", help="of the output color; inferno")
    depth.add_argument("--focal-length-px", type=float, help="in pixels of the images; metres with it")
    depth.add_argument("--model-size", action="store_true", help="write maps at the model's size")
    depth.add_argument("--verbose", action="store_true", help="log why backends were passed over")
    add_engine_options(depth, RUN_OPTIONS)
    serve = verbs.add_parser("serve", help="answer HTTP requests on PORT, 8080")
    add_engine_options(serve, RUN_OPTIONS)
    prefetch = verbs.add_parser("prefetch", help="fetch a checkpoint and published engines")
    add_engine_options(prefetch, ("model", "head", "revision"))
    return root


def run_depth(args: argparse.Namespace) -> int:
    """``depth``: write the files, print what they mean; 1 if any image failed."""
    settings = settings_of(args)
    from da3_runtime.commands.depth import depth_of_files, find_wanted

    wanted = find_wanted(args.outputs, args.color_map)
    focal = args.focal_length_px
    if focal is not None and not 0 < focal < math.inf:
        raise SettingError(f"--focal-length-px must be over 0, not {focal}.")
    return depth_of_files(settings, args.images, args.out, wanted, focal, args.model_size)


def run_serve(args: argparse.Namespace) -> int:
    """``serve``: the HTTP server."""
    settings = settings_of(args, SERVED_MODEL)
    from da3_runtime.serve.http_server import serve

    return serve(settings)


def run_prefetch(args: argparse.Namespace) -> int:
    """``prefetch``: fill the hub's cache."""
    settings = settings_of(args, SERVED_MODEL)
    from da3_runtime.commands.prefetch import prefetch

    prefetch(settings)
    return 0


def run_by_environment(args: argparse.Namespace) -> int:
    """No verb: what this machine is there for."""
    settings = settings_of(args, SERVED_MODEL)
    # A container's first process ignores what it has no handler for, and the servers' own come later.
    # Nothing is in hand before; an orderly exit would end libraries under the thread that loads them.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    mode = find_mode(settings.mode)
    if mode is Mode.QUEUE:
        from da3_runtime.serve.runpod_worker import start_worker

        return start_worker(settings)
    from da3_runtime.serve.http_server import EVERY_ADDRESS, serve

    if mode is Mode.LOAD_BALANCER:
        return serve(settings, EVERY_ADDRESS, PLATFORM_PORT, PLATFORM_BYTES)
    return serve(settings)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and run its verb."""
    args = parser().parse_args(argv)
    if args.verb == "depth":
        level = logging.INFO if args.verbose else logging.WARNING
        logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
        return run_verb(run_depth, args)
    log_to_stderr()
    verbs = {"serve": run_serve, "prefetch": run_prefetch, None: run_by_environment}
    return run_verb(verbs[args.verb], args)


if __name__ == "__main__":
    sys.exit(main())
