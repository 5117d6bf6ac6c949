"""What every way of serving does when it starts."""

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
    """Whether only this machine reaches a server on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, settings: ServerSettings) -> None:
    """Refuse to answer other machines without a key.

    Raises
    ------
    SettingError
        Naming the two ways on.
    """
    if is_loopback(host) or settings.api_key is not None or settings.allow_anonymous:
        return
    raise SettingError(
        f"On {host} anyone who reaches this machine would be answered: set DA3_API_KEY, or "
        "DA3_ALLOW_ANONYMOUS=1 if that is meant."
    )


def load_in_background(service: Service) -> threading.Thread:
    """Begin to load the default model, and then what downloads images.

    What goes wrong is logged, and told to whoever asks for the model.
    """

    def load() -> None:
        try:
            service.load_default()
        except DA3Error:
            pass  # the service has said why
        except Exception:
            logger.exception("%s cannot be loaded", service.default.model_id)
        import_downloader()

    thread = threading.Thread(target=load, name="load", daemon=True)
    thread.start()
    return thread


def warm_up(service: Service) -> None:
    """Load the default model and run it once; raises what goes wrong."""
    stream = io.BytesIO()
    Image.fromarray(np.zeros((280, 504, 3), np.uint8)).save(stream, "png")
    timings = Timings()
    with service.pool.borrow(service.default) as estimator, timings.stage("total"):
        estimator.estimate(stream.getvalue(), timings)
    logger.info("%s is warm: %s", service.default.model_id, timings.ms)
