"""What this machine is: a RunPod queue worker, a RunPod load-balancing worker, or neither."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum

from da3_runtime.errors import SettingError

AUTO = "auto"  # the value of DA3_MODE that leaves the choice to the environment
# PORT of a load-balancing worker where the platform says nothing else.
PLATFORM_PORT = 80
# Largest answer that RunPod carries from a load-balancing worker.
PLATFORM_BYTES = 30_000_000


class Mode(StrEnum):
    """What ``python -m da3_runtime`` starts; the values of ``DA3_MODE``."""

    QUEUE = "queue"
    LOAD_BALANCER = "load-balancer"
    HTTP = "http"


def find_mode(wanted: str, env: Mapping[str, str] = os.environ) -> Mode:
    """The mode that is set, else the one that the environment tells.

    RunPod gives a queue worker the address of its jobs, ``RUNPOD_WEBHOOK_GET_JOB`` (the SDK itself goes
    by it), and a load-balancing worker ``PORT_HEALTH``; both have ``RUNPOD_ENDPOINT_ID``.

    Raises
    ------
    SettingError
        If ``wanted`` is no mode.
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
