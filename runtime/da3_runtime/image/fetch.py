"""Gets an encoded image: decodes Base64, or downloads a public URL safely."""

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

from da3_runtime.errors import ImageError, ImageTooLargeError, RequestError
from da3_runtime.util.runpod_sdk import import_sdk

if TYPE_CHECKING:
    from requests import Response

logger = logging.getLogger(__name__)

_CHUNK = 64 * 1024
_MAX_REDIRECTS = 5
_PORTS = {"http": 80, "https": 443}
# IPv6 networks whose addresses embed an IPv4 address, and the number of bits to the right of it:
# IPv4-compatible, NAT64 (RFC 6052, RFC 8215) and 6to4 (RFC 3056). The SDK itself checks IPv4-mapped
# addresses and refuses Teredo's.
_EMBEDDING_IPV4 = (
    (ipaddress.IPv6Network("::/96"), 0),
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),
    (ipaddress.IPv6Network("64:ff9b:1::/48"), 0),
    (ipaddress.IPv6Network("2002::/16"), 80),
)


def decode_base64(text: str, max_bytes: int) -> bytes:
    """Decode Base64, with or without a data URI prefix; white space is ignored.

    Raises
    ------
    RequestError
        If the text is not valid Base64.
    ImageTooLargeError
        If more than ``max_bytes`` would result; nothing is decoded then.
    """
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise RequestError("image_base64: a data URI must have the form data:image/...;base64,...")
    try:
        # Few requests contain white space, and searching for it takes longer than decoding.
        return _decode_strictly(text, max_bytes)
    except (RequestError, ImageTooLargeError):
        return _decode_strictly("".join(text.split()), max_bytes)


def _decode_strictly(text: str, max_bytes: int) -> bytes:
    if len(text) * 3 // 4 - text.count("=", -2) > max_bytes:
        raise _too_large("image_base64", max_bytes)
    try:
        return pybase64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            "image_base64 is not valid Base64: send standard Base64, with or without a data URI prefix."
        ) from None


def download(url: str, max_bytes: int, seconds: float, hosts: Sequence[str] = ()) -> bytes:
    """Download a public http or https URL.

    For the URL and for every redirect, the RunPod SDK resolves the host name once and refuses addresses
    that are not public. The connection goes to the resolved address, without a proxy. The environment
    variable ``RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS`` makes the SDK allow private addresses.

    Parameters
    ----------
    max_bytes : int
        Largest size of the body, after decompression.
    seconds : float
        Longest time for the whole download.
    hosts : Sequence[str]
        Allowed host names; ``*.name`` allows every subdomain of a name. Empty: all hosts are allowed.

    Raises
    ------
    RequestError
        If the URL is invalid, not public, not on one of ``hosts``, or contains a user or password.
    ImageTooLargeError
        As soon as the server announces or sends more than ``max_bytes``.
    ImageError
        If the server does not answer with success, or the download takes longer than ``seconds``.
    """
    import_downloader()
    result: Future[bytes] = Future()

    def work() -> None:
        try:
            result.set_result(_download(url, max_bytes, seconds, hosts))
        except Exception as error:
            result.set_exception(error)

    # On a separate thread: timeouts of sockets limit each operation only, and a slow server may do many.
    threading.Thread(target=work, name="download", daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError:
        raise ImageError(_too_slow(seconds)) from None


def import_downloader() -> None:
    """Import the RunPod SDK's download guard ahead of the first request; it takes 1 to 2 s."""
    import_sdk()
    import runpod.serverless.utils.rp_ssrf  # noqa: F401


def _download(url: str, max_bytes: int, seconds: float, hosts: Sequence[str]) -> bytes:
    import requests
    from runpod.serverless.utils.rp_ssrf import SSRFError
    from urllib3.exceptions import HTTPError

    deadline = time.monotonic() + seconds
    try:
        with _follow_redirects(url, deadline, hosts) as response:
            if not response.ok:
                raise ImageError(
                    f"The server of image_url answered with HTTP status {response.status_code}."
                )
            announced = response.headers.get("Content-Length", "")
            if announced.isdecimal() and int(announced) > max_bytes:
                raise _too_large("image_url", max_bytes)
            data = bytearray()
            # read1 returns the bytes that have arrived, so the deadline is checked even if the server is
            # slow.
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
        # The exception's text is only logged: it may name addresses inside the worker's network.
        logger.warning("image_url refused: %s", str(error).replace(url, "the URL"))
        raise RequestError("image_url must be a public http or https address.") from None
    except (requests.RequestException, HTTPError, OSError) as error:
        logger.warning("image_url failed: %s", type(error).__name__)
        raise ImageError("image_url could not be downloaded.") from None


@contextlib.contextmanager
def _follow_redirects(url: str, deadline: float, hosts: Sequence[str]) -> Iterator[Response]:
    """The response after all redirects; its body is not read yet."""
    from runpod.serverless.utils.rp_ssrf import SSRFError

    for _ in range(_MAX_REDIRECTS + 1):
        parts = urlsplit(url)
        addresses = _resolve(parts, hosts)
        with _get(url, addresses, deadline) as response:
            if not response.is_redirect:
                yield response
                return
            url = urljoin(url, response.headers["Location"])
    raise SSRFError(f"more than {_MAX_REDIRECTS} redirects")


def _resolve(parts: SplitResult, hosts: Sequence[str]) -> list[str]:
    """The IP addresses of a URL's host; all of them are allowed.

    Raises
    ------
    SSRFError, ValueError
        If the URL or one of the addresses is not allowed.
    """
    from runpod.serverless.utils.rp_ssrf import resolve_and_validate

    host = (parts.hostname or "").rstrip(".")
    if parts.scheme not in _PORTS or not host:
        raise ValueError("not an http or https URL")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the URL contains a user or password")
    if hosts and not any(_is_host(host, allowed) for allowed in hosts):
        raise ValueError("the host is not in IMAGE_URL_HOSTS")
    port = parts.port or _PORTS[parts.scheme]
    addresses: list[str] = resolve_and_validate(host, port)
    for embedded in map(_embedded_ipv4, addresses):
        if embedded is not None:
            resolve_and_validate(embedded, port)
    return addresses


def _is_host(host: str, allowed: str) -> bool:
    if allowed.startswith("*."):
        return host.endswith(allowed[1:])
    return host == allowed


def _embedded_ipv4(address: str) -> str | None:
    """The IPv4 address embedded in an IPv6 address; a gateway forwards packets to it."""
    parsed = ipaddress.ip_address(address)
    for network, shift in _EMBEDDING_IPV4:
        if parsed.version == 6 and parsed in network:
            return str(ipaddress.IPv4Address((int(parsed) >> shift) & 0xFFFFFFFF))
    return None


@contextlib.contextmanager
def _get(url: str, addresses: Sequence[str], deadline: float) -> Iterator[Response]:
    """The response of the first of ``addresses`` that accepts a connection; may be a redirect."""
    import requests
    from runpod.serverless.utils.rp_ssrf import PinnedIPAdapter

    failure: requests.ConnectionError | None = None
    for address in addresses:
        with requests.Session() as session:
            # Ignores proxies, which would resolve the name again, and passwords in .netrc.
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
