"""The RunPod queue worker, which ``python -m da3_runtime.handler`` starts.

All other options go to the RunPod SDK: ``--rp_serve_api``, ``--test_input``, ``--rp_log_level``, ...
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from da3_runtime.api.response import JSON
from da3_runtime.commands.options import log_to_stderr, run_verb, settings_of
from da3_runtime.serve.service import KEY_HEADER, Service
from da3_runtime.serve.startup import check_exposure, load_in_background, warm_up
from da3_runtime.settings import Settings
from da3_runtime.util.runpod_sdk import import_sdk
from da3_runtime.variants import SERVED_MODEL

# Largest response of a queue worker that RunPod passes on, in bytes. On /run it passes on half of that.
MAX_RESPONSE_BYTES = 20_000_000


def parser() -> argparse.ArgumentParser:
    """The command line; the SDK parses the options that this parser does not know."""
    options = argparse.ArgumentParser(prog="python -m da3_runtime.handler", description=__doc__)
    options.add_argument(
        "--warmup", action="store_true", help="load the model and run it once, then exit"
    )
    options.add_argument("--model-id", dest="MODEL", help="model to serve or warm up (or MODEL_ID)")
    options.add_argument(
        "--use-sdt-head", dest="HEAD", action="store_const", const="sdt", help="use the SDT head"
    )
    return options


def make_handler(service: Service) -> Callable[[Mapping[str, Any]], Awaitable[JSON]]:
    """The function that the SDK calls with every job."""

    async def handler(job: Mapping[str, Any]) -> JSON:
        return await asyncio.to_thread(
            service.answer,
            job.get("input"),
            str(job.get("id", "")),
            is_authorized=service.is_key(_header_key(job)),
            max_bytes=service.settings.capacity.max_response_bytes or MAX_RESPONSE_BYTES,
        )

    return handler


def _header_key(job: Mapping[str, Any]) -> str | None:
    """The API key in a job's HTTP headers. RunPod's queue passes no headers on; a proxy may."""
    http = job.get("http")
    headers = http.get("headers") if isinstance(http, Mapping) else None
    if not isinstance(headers, Mapping):
        return None
    keys = [value for name, value in headers.items() if str(name).lower() == KEY_HEADER]
    return keys[0] if keys and isinstance(keys[0], str) else None


def start_worker(settings: Settings) -> int:
    """Run the SDK's worker until the process gets a signal to stop.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    SettingError
        If a setting is invalid, or the worker would listen on an address that other machines reach while
        no API key is set.
    """
    if os.environ.get("RUNPOD_REALTIME_PORT", "0") != "0":
        check_exposure("0.0.0.0", settings.server)  # noqa: S104  (the SDK listens there then)
    service = Service(settings)
    # By default the SDK logs every response.
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")
    # Importing the SDK takes seconds; the model loads meanwhile.
    load_in_background(service)
    runpod = import_sdk()
    concurrency = settings.capacity.max_concurrency
    handler = make_handler(service)
    runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda _: concurrency})
    return 0


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
        settings = settings_of(args, SERVED_MODEL)
        if args.warmup:
            warm_up(Service(settings))
            return 0
        _check_local_api(settings, rest)
        return start_worker(settings)

    return run_verb(run, args)


if __name__ == "__main__":
    sys.exit(main())
