"""A request's image field -> image bytes."""

from __future__ import annotations

import binascii
import contextlib
import ipaddress
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urljoin, urlsplit

import pybase64

from da3_runtime.api.request import DepthRequest
from da3_runtime.errors import ImageError, ImageTooLargeError, RequestError
from da3_runtime.image.settings import DownloadSettings, ImageSettings
from da3_runtime.util.runpod_sdk import import_sdk

if TYPE_CHECKING:
    from requests import Response

logger = logging.getLogger(__name__)

_CHUNK = 64 * 1024
_MAX_REDIRECTS = 5
_PORTS = {"http": 80, "https": 443}
# IPv6 networks whose addresses hold an IPv4 address, and how far from their end: IPv4-compatible, NAT64
# (RFC 6052, RFC 8215) and 6to4 (RFC 3056). The SDK knows the mapped ones; Teredo's are not public.
_HOLDING_IPV4 = (
    (ipaddress.IPv6Network("::/96"), 0),
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),
    (ipaddress.IPv6Network("64:ff9b:1::/48"), 0),
    (ipaddress.IPv6Network("2002::/16"), 80),
)


def image_bytes(request: DepthRequest, images: ImageSettings, downloads: DownloadSettings) -> bytes:
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
        limits = images.max_image_bytes, downloads.download_seconds
        return download(request.image_url, *limits, downloads.image_url_hosts)
    assert request.image_base64 is not None
    return decode_base64(request.image_base64, images.max_image_bytes)


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
    try:
        # Most have no white space, and to look for it takes longer than to decode.
        return _decoded(text, max_bytes)
    except (RequestError, ImageTooLargeError):
        return _decoded("".join(text.split()), max_bytes)


def _decoded(text: str, max_bytes: int) -> bytes:
    if len(text) * 3 // 4 - text.count("=", -2) > max_bytes:
        raise _too_large("image_base64", max_bytes)
    try:
        return pybase64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("image_base64 is not valid Base64.") from None


def download(url: str, max_bytes: int, seconds: float, hosts: Sequence[str] = ()) -> bytes:
    """What a public http or https address answers.

    At first and after every redirect the name is resolved once, by the RunPod SDK, which refuses what is
    not public, and what it resolved to is connected to, through no proxy.
    ``RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS`` is the SDK's way to allow other addresses.

    Parameters
    ----------
    hosts : Sequence[str]
        Names of hosts that may be asked, ``*.name`` for all below one; none for every host.

    Raises
    ------
    RequestError
        If the address is none, not public, not one of ``hosts`` or has a user or password.
    ImageTooLargeError
        As soon as more than ``max_bytes`` are announced or have come.
    ImageError
        If it answers anything but success, or takes longer than ``seconds``.
    """
    import_downloader()
    result: Future[bytes] = Future()

    def work() -> None:
        try:
            result.set_result(_download(url, max_bytes, seconds, hosts))
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


def _download(url: str, max_bytes: int, seconds: float, hosts: Sequence[str]) -> bytes:
    import requests
    from runpod.serverless.utils.rp_ssrf import SSRFError
    from urllib3.exceptions import HTTPError

    deadline = time.monotonic() + seconds
    try:
        with _opened(url, deadline, hosts) as response:
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


@contextlib.contextmanager
def _opened(url: str, deadline: float, hosts: Sequence[str]) -> Iterator[Response]:
    """The answer at the end of an address's redirects, its body not read yet."""
    from runpod.serverless.utils.rp_ssrf import SSRFError

    for _ in range(_MAX_REDIRECTS + 1):
        parts = urlsplit(url)
        addresses = _resolved(parts, hosts)
        with _asked(url, addresses, deadline) as response:
            if not response.is_redirect:
                yield response
                return
            url = urljoin(url, response.headers["Location"])
    raise SSRFError("redirected too often")


def _resolved(parts: SplitResult, hosts: Sequence[str]) -> list[str]:
    """Addresses of an URL's host, every one of which may be asked.

    Raises
    ------
    ValueError
        If one may not, or the URL is none that may be asked.
    """
    from runpod.serverless.utils.rp_ssrf import resolve_and_validate

    host = (parts.hostname or "").rstrip(".")
    if parts.scheme not in _PORTS or not host:
        raise ValueError("not an http or https address")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a user or password in the address")
    if hosts and not any(_is_host(host, allowed) for allowed in hosts):
        raise ValueError("not one of IMAGE_URL_HOSTS")
    port = parts.port or _PORTS[parts.scheme]
    addresses: list[str] = resolve_and_validate(host, port)
    for held in (_held_ipv4(address) for address in addresses):
        if held is not None:
            resolve_and_validate(held, port)
    return addresses


def _is_host(host: str, allowed: str) -> bool:
    if allowed.startswith("*."):
        return host.endswith(allowed[1:])
    return host == allowed


def _held_ipv4(address: str) -> str | None:
    """The IPv4 address that an IPv6 address holds, where a gateway would send packets on to."""
    parsed = ipaddress.ip_address(address)
    for network, shift in _HOLDING_IPV4:
        if parsed.version == 6 and parsed in network:
            return str(ipaddress.IPv4Address((int(parsed) >> shift) & 0xFFFFFFFF))
    return None


@contextlib.contextmanager
def _asked(url: str, addresses: Sequence[str], deadline: float) -> Iterator[Response]:
    """The answer of the first of ``addresses`` that can be connected to."""
    import requests
    from runpod.serverless.utils.rp_ssrf import PinnedIPAdapter

    failure: requests.ConnectionError | None = None
    for address in addresses:
        with requests.Session() as session:
            # No proxy, which would resolve the name anew, and no password out of a .netrc.
            session.trust_env = False
            for prefix in _PORTS:
                session.mount(f"{prefix}://", PinnedIPAdapter(address))
            seconds = max(0.001, deadline - time.monotonic())
            try:
                response = session.get(url, stream=True, timeout=seconds, allow_redirects=False)
            except requests.ConnectionError as error:
                failure = error
                continue
            with response:
                yield response
                return
    assert failure is not None
    raise failure


def _too_slow(seconds: float) -> str:
    return f"image_url took longer than {seconds:g} seconds."


def _too_large(field: str, max_bytes: int) -> ImageTooLargeError:
    return ImageTooLargeError(f"{field} has more than {max_bytes} bytes (MAX_IMAGE_BYTES).")
