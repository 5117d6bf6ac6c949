"""The RunPod queue worker; :mod:`da3_runtime.handler` is its command line."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from da3_runtime.api.response import JSON
from da3_runtime.serve.service import KEY_HEADER, Service
from da3_runtime.serve.startup import check_exposure, load_in_background
from da3_runtime.settings import Settings
from da3_runtime.util.garbage import no_garbage_collection
from da3_runtime.util.runpod_sdk import import_sdk

# Largest response of a queue worker that RunPod passes on, in bytes. On /run it passes on half of that.
MAX_RESPONSE_BYTES = 20_000_000


def make_handler(service: Service) -> Callable[[Mapping[str, Any]], Awaitable[JSON]]:
    """The function that the SDK calls with every job."""

    async def handler(job: Mapping[str, Any]) -> JSON:
        return await service.respond(
            job.get("input"),
            str(job.get("id", "")),
            is_authorized=service.is_key(_header_key(job)),
            max_bytes=service.settings.capacity.max_response_bytes or MAX_RESPONSE_BYTES,
            on_progress=lambda progress: send_progress(job, progress),
        )

    return handler


def send_progress(job: Mapping[str, Any], progress: JSON) -> None:
    """Show a running job's progress in RunPod's /status; a thread of the SDK sends it."""
    import_sdk()
    from runpod.serverless import progress_update

    progress_update(dict(job), progress)


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
    with no_garbage_collection():
        runpod = import_sdk()
    handler = make_handler(service)
    concurrency = {"concurrency_modifier": lambda _: service.max_concurrency}
    runpod.serverless.start({"handler": handler, **concurrency})
    return 0
