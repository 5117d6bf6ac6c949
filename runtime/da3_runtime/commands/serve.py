"""``da3-runtime serve`` and ``da3-runtime`` without a verb: HTTP server or RunPod worker."""

from __future__ import annotations

import argparse
import os
import signal

from da3_runtime.commands.options import RUN_OPTIONS, Verbs, add_options, log_to_stderr, settings_of
from da3_runtime.util.garbage import no_garbage_collection


def add_parser(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = verbs.add_parser("serve", help="serve HTTP requests on port PORT, default 8080")
    add_options(parser, RUN_OPTIONS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the HTTP server until it is stopped."""
    log_to_stderr()
    with no_garbage_collection(freeze=True):
        settings = settings_of(args)
        _exit_at_sigterm()
        from da3_runtime.serve.http_server import serve

    return serve(settings)


def run_by_environment(args: argparse.Namespace) -> int:
    """Start what ``DA3_MODE`` selects: RunPod queue worker, load-balancing worker or HTTP server."""
    log_to_stderr()
    with no_garbage_collection(freeze=True):
        settings = settings_of(args)
        _exit_at_sigterm()
        from da3_runtime.serve.mode import PLATFORM_BYTES, PLATFORM_PORT, Mode, find_mode

        mode = find_mode(settings.server.mode)
        if mode is Mode.QUEUE:
            from da3_runtime.serve.runpod_worker import start_worker
        else:
            from da3_runtime.serve.http_server import EVERY_ADDRESS, serve

    if mode is Mode.QUEUE:
        return start_worker(settings)
    if mode is Mode.LOAD_BALANCER:
        return serve(settings, EVERY_ADDRESS, PLATFORM_PORT, PLATFORM_BYTES)
    return serve(settings)


def _exit_at_sigterm() -> None:
    """Exit with 0 at SIGTERM, before and after the server's own handlers.

    The first process of a container ignores signals without a handler, and the servers install theirs
    later. Until then no request is in progress. The HTTP server repeats the signal when it has finished.
    An orderly exit would unload libraries that the loading thread still uses.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
