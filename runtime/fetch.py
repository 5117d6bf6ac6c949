"""A request's image field -> image bytes."""

from __future__ import annotations

import base64
import binascii
import logging
import threading
import time
from concurrent.futures import Future

from runtime.errors import ImageError, ImageTooLargeError, RequestError
from runtime.request import DepthRequest
from runtime.sdk import import_sdk
from runtime.settings import Settings

logger = logging.getLogger(__name__)

_CHUNK = 64 * 1024


def image_bytes(request: DepthRequest, settings: Settings) -> bytes:
    """The encoded image of a request, decoded from Base64 or downloaded.

    Raises
    ------
    RequestError
        If the Base64 is none, or the address is not one that may be asked.
    ImageTooLargeError
        If it has more bytes than ``MAX_IMAGE_BYTES``.
    ImageError
        If it cannot be downloaded.
    """
    if request.image_url is not None:
        return download(request.image_url, settings.max_image_bytes, settings.download_seconds)
    assert request.image_base64 is not None
    return decode_base64(request.image_base64, settings.max_image_bytes)


def decode_base64(text: str, max_bytes: int) -> bytes:
    """Bytes of Base64 with or without a data URI's prefix; white space in it does not matter.

    Raises
    ------
    RequestError
        If it is not Base64.
    ImageTooLargeError
        Before it is decoded, if that would be over the limit.
    """
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise RequestError("image_base64: a data URI must have the form data:image/...;base64,...")
    text = "".join(text.split())
    if len(text) * 3 // 4 - text.count("=", -2) > max_bytes:
        raise _too_large("image_base64", max_bytes)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("image_base64 is not valid Base64.") from None


def download(url: str, max_bytes: int, seconds: float) -> bytes:
    """What a public http or https address answers, fetched through the RunPod SDK.

    The SDK resolves the name once, refuses every address that is not public, also after a redirect, and
    connects to what it resolved. ``RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS`` is its way to allow others.

    Raises
    ------
    RequestError
        If the address is none, or not public.
    ImageTooLargeError
        As soon as more than ``max_bytes`` are announced or have come.
    ImageError
        If it answers anything but success, or takes longer than ``seconds``.
    """
    import_downloader()
    result: Future[bytes] = Future()

    def work() -> None:
        try:
            result.set_result(_download(url, max_bytes, seconds))
        except Exception as error:
            result.set_exception(error)

    # On a thread of its own, because a server may let every single step take as long as it may.
    threading.Thread(target=work, name="download", daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError:
        raise ImageError(_too_slow(seconds)) from None


def import_downloader() -> None:
    """Import the SDK, which takes a second or two, before the first image is waited for."""
    import_sdk()
    import runpod.serverless.utils.rp_ssrf  # noqa: F401


def _download(url: str, max_bytes: int, seconds: float) -> bytes:
    import requests
    from runpod.serverless.utils.rp_ssrf import SSRFError, safe_get
    from urllib3.exceptions import HTTPError

    deadline = time.monotonic() + seconds
    try:
        with safe_get(url, timeout=seconds) as response:
            if not response.ok:
                raise ImageError(f"image_url answered with HTTP status {response.status_code}.")
            announced = response.headers.get("Content-Length", "")
            if announced.isdecimal() and int(announced) > max_bytes:
                raise _too_large("image_url", max_bytes)
            data = bytearray()
            # What has come, rather than a whole chunk: a server that sends little is still timed.
            while chunk := response.raw.read1(_CHUNK, decode_content=True):
                data += chunk
                if len(data) > max_bytes:
                    raise _too_large("image_url", max_bytes)
                if time.monotonic() > deadline:
                    raise ImageError(_too_slow(seconds))
            return bytes(data)
    except requests.Timeout:
        raise ImageError(_too_slow(seconds)) from None
    except (SSRFError, ValueError) as error:
        # Its own words name addresses inside the worker's network.
        logger.warning("image_url refused: %s", str(error).replace(url, "the address"))
        raise RequestError("image_url must be a public http or https address.") from None
    except (requests.RequestException, HTTPError, OSError) as error:
        logger.warning("image_url failed: %s", type(error).__name__)
        raise ImageError("image_url could not be downloaded.") from None


def _too_slow(seconds: float) -> str:
    return f"image_url took longer than {seconds:g} seconds."


def _too_large(field: str, max_bytes: int) -> ImageTooLargeError:
    return ImageTooLargeError(f"{field} has more than {max_bytes} bytes (MAX_IMAGE_BYTES).")
