"""Steps that all serving modes share at their start."""

from __future__ import annotations

import io
import ipaddress
import logging
import threading

import numpy as np
from PIL import Image

from da3_runtime.errors import DA3Error, SettingError
from da3_runtime.image.fetch import import_downloader
from da3_runtime.inference.estimator import Timings
from da3_runtime.serve.service import Service
from da3_runtime.serve.settings import ServerSettings

logger = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Whether a server on ``host`` is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, settings: ServerSettings) -> None:
    """Refuse to serve other machines without an API key.

    Raises
    ------
    SettingError
        If other machines can reach ``host`` and no API key is set. The message names both settings that
        allow it.
    """
    if is_loopback(host) or settings.api_key is not None or settings.allow_anonymous:
        return
    raise SettingError(
        f"Other machines could use a server on {host} without a key: set DA3_API_KEY, or "
        "DA3_ALLOW_ANONYMOUS=1 to allow that."
    )


def load_in_background(service: Service) -> threading.Thread:
    """Load the default model, then the libraries that download images, on a new thread.

    An error is logged. Every later request for the model tries to load it again.

    Returns
    -------
    threading.Thread
        Alive while the model is loading.
    """

    def load() -> None:
        try:
            service.load_default()
        except DA3Error:
            pass  # the service has logged the reason
        except Exception:
            logger.exception("%s cannot be loaded", service.default.model_id)
        import_downloader()

    thread = threading.Thread(target=load, name="load", daemon=True)
    thread.start()
    return thread


def warm_up(service: Service) -> None:
    """Load the default model and run it once; raises as loading and :meth:`Estimator.estimate` do."""
    stream = io.BytesIO()
    Image.fromarray(np.zeros((280, 504, 3), np.uint8)).save(stream, "png")
    timings = Timings()
    with service.pool.borrow(service.default) as estimator, timings.stage("total"):
        estimator.estimate(stream.getvalue(), timings)
    logger.info("%s is warm: %s", service.default.model_id, timings.ms)
