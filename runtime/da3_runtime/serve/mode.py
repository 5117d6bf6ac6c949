"""The serving mode: RunPod queue worker, RunPod load-balancing worker, or plain HTTP server."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum

from da3_runtime.errors import SettingError

AUTO = "auto"  # the value of DA3_MODE that derives the mode from the environment
# Default PORT of a load-balancing worker on RunPod.
PLATFORM_PORT = 80
# Largest response of a load-balancing worker that RunPod passes on, in bytes.
PLATFORM_BYTES = 30_000_000


class Mode(StrEnum):
    """Values of ``DA3_MODE``: what ``da3-runtime`` without a verb starts."""

    QUEUE = "queue"
    LOAD_BALANCER = "load-balancer"
    HTTP = "http"


def find_mode(wanted: str, env: Mapping[str, str] = os.environ) -> Mode:
    """The requested mode; for ``auto``, the mode that RunPod's own variables imply.

    RunPod sets ``RUNPOD_WEBHOOK_GET_JOB``, the address of the jobs, for a queue worker; its SDK relies
    on that too. RunPod sets ``PORT_HEALTH`` for a load-balancing worker, and ``RUNPOD_ENDPOINT_ID`` for
    both.

    Raises
    ------
    SettingError
        If ``wanted`` is not a mode.
    """
    if wanted != AUTO:
        try:
            return Mode(wanted)
        except ValueError:
            known = ", ".join([AUTO, *Mode])
            raise SettingError(f"DA3_MODE {wanted!r} is not one of: {known}.") from None
    if env.get("RUNPOD_ENDPOINT_ID") and env.get("PORT_HEALTH"):
        return Mode.LOAD_BALANCER
    if env.get("RUNPOD_WEBHOOK_GET_JOB"):
        return Mode.QUEUE
    return Mode.LOAD_BALANCER if env.get("RUNPOD_ENDPOINT_ID") else Mode.HTTP
