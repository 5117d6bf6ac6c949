"""Gets an encoded image: decodes Base64, or downloads a public URL safely."""

from __future__ import annotations

import asyncio
import binascii
import functools
import ipaddress
import logging
import socket
import ssl
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pybase64

from da3_runtime import __version__
from da3_runtime.errors import ImageError, ImageTooLargeError, RequestError
from da3_runtime.util.runpod_sdk import import_sdk

if TYPE_CHECKING:
    from aiohttp import ClientResponse
    from yarl import URL

logger = logging.getLogger(__name__)

_CHUNK = 64 * 1024
_MAX_REDIRECTS = 5
_REDIRECTS = {301, 302, 303, 307, 308}
_SCHEMES = {"http", "https"}
_NO_HOST = "The host of image_url cannot be found."
# Some sites, such as Wikimedia's, refuse the default names of libraries.
USER_AGENT = f"da3-runtime/{__version__} (downloads photos for depth estimation)"
# A lookup cannot be ended; slow ones occupy these threads only.
_lookups = ThreadPoolExecutor(32, "lookup")
_URL_SAFE = str.maketrans("-_", "+/")
# IPv6 networks whose addresses embed an IPv4 address, and the number of bits to the right of it:
# IPv4-compatible, NAT64 (RFC 6052, RFC 8215) and 6to4 (RFC 3056). The SDK itself checks IPv4-mapped
# addresses and refuses Teredo's.
_EMBEDDING_IPV4 = (
    (ipaddress.IPv6Network("::/96"), 0),
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),
    (ipaddress.IPv6Network("64:ff9b:1::/48"), 0),
    (ipaddress.IPv6Network("2002::/16"), 80),
)


class ByteBudget:
    """Bytes that the images of one request may still have, all together.

    Parameters
    ----------
    limit : int
        All of them.
    images : int
        How many images share them.
    setting : str
        The setting that limits them.
    """

    def __init__(self, limit: int, images: int = 1, setting: str = "MAX_IMAGE_BYTES") -> None:
        self.limit = self.left = limit
        self._setting = setting
        self._what = "images together have" if images > 1 else None

    def check(self, count: int, field: str) -> None:
        """Check that it has so many bytes for the image in ``field``.

        Raises
        ------
        ImageTooLargeError
            If it has not.
        """
        if count > self.left:
            what = self._what or f"{field} has"
            raise ImageTooLargeError(f"{what} more than {self.limit} bytes ({self._setting}).")

    def take(self, count: int, field: str) -> None:
        """Count bytes of an image; raises as :meth:`check`."""
        self.check(count, field)
        self.left -= count


def decode_base64(text: str, budget: ByteBudget) -> bytes:
    """Decode Base64, standard or URL-safe, with or without padding and a data URI prefix.

    White space is ignored, and so are the percent signs of a data URI's encoding.

    Raises
    ------
    RequestError
        If the text is not valid Base64.
    ImageTooLargeError
        If more bytes would result than the budget has; nothing is decoded then.
    """
    data = _decode(text, budget)
    budget.take(len(data), "image_base64")
    return data


def _decode(text: str, budget: ByteBudget) -> bytes:
    if text[:1].isspace():
        text = text.lstrip()
    is_uri = is_data_uri(text)
    if is_uri:
        header, comma, text = text.partition(",")
        if not comma or not "".join(header.split()).lower().endswith(";base64"):
            raise RequestError("image_base64: a data URI must have the form data:image/...;base64,...")
    try:
        # Few requests need the spelling changed, and searching for that takes longer than decoding.
        return _decode_strictly(text, budget)
    except (RequestError, ImageTooLargeError):
        plain = unquote(text) if is_uri else text
        plain = "".join(plain.split()).translate(_URL_SAFE).rstrip("=")
        return _decode_strictly(plain + "=" * (-len(plain) % 4), budget)


def is_data_uri(text: str) -> bool:
    """Whether a text without leading white space is a data URI."""
    return text[:5].lower() == "data:"


def _decode_strictly(text: str, budget: ByteBudget) -> bytes:
    budget.check(len(text) * 3 // 4 - text.count("=", -2), "image_base64")
    try:
        return pybase64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            "image_base64 is not valid Base64: send Base64, with or without a data URI prefix."
        ) from None


async def download(url: str, budget: ByteBudget, seconds: float, hosts: Sequence[str] = ()) -> bytes:
    """Download a public http or https URL.

    For the URL and for every redirect, the host name is resolved once, and addresses that are not public
    are refused. The connection goes to the resolved addresses, without a proxy. The environment variable
    ``RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS`` makes the RunPod SDK, whose check this is, allow private
    addresses.

    Parameters
    ----------
    budget : ByteBudget
        From which the size of the body is taken, after decompression.
    seconds : float
        Longest time for the whole download; it ends then.
    hosts : Sequence[str]
        Allowed host names; ``*.name`` allows every subdomain of a name. Empty: all hosts are allowed.

    Raises
    ------
    RequestError
        If the URL is invalid, not public, not on one of ``hosts``, or contains a user or password.
    ImageTooLargeError
        As soon as the server announces or sends more than the budget has.
    ImageError
        If the host does not exist, the server does not answer with success, or the download takes longer
        than ``seconds``.
    """
    try:
        async with asyncio.timeout(seconds):
            return await _download(url, budget, hosts)
    except TimeoutError:
        raise ImageError(f"image_url took longer than {seconds:g} seconds.") from None


def import_downloader() -> None:
    """Import what downloads ahead of the first request; it takes 1 to 2 s."""
    import_sdk()
    import aiohttp  # noqa: F401
    import runpod.serverless.utils.rp_ssrf  # noqa: F401


async def _download(url: str, budget: ByteBudget, hosts: Sequence[str]) -> bytes:
    import aiohttp

    await asyncio.to_thread(import_downloader)
    pinned = _pinned_resolver()
    connector = aiohttp.TCPConnector(resolver=pinned, use_dns_cache=False, ssl=_tls())
    try:
        # Its cookies last for the redirects. It ignores proxies, which would resolve the name again, and
        # passwords in .netrc.
        async with aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.CookieJar(unsafe=True),
            headers={"User-Agent": USER_AGENT},
        ) as session:
            address = _parse(url, hosts)
            for _ in range(_MAX_REDIRECTS + 1):
                pinned.addresses = await _resolve(address)
                async with session.get(address, allow_redirects=False) as response:
                    location = response.headers.get("Location")
                    if response.status not in _REDIRECTS or location is None:
                        return await _read(response, budget)
                    address = _parse(location, hosts, address)
            raise ImageError(f"image_url leads to more than {_MAX_REDIRECTS} redirects.")
    except (aiohttp.ClientError, OSError, ValueError) as error:
        # The exception's text is not shown: it may name addresses inside the worker's network.
        logger.warning("image_url failed: %s", type(error).__name__)
        raise ImageError("image_url could not be downloaded.") from None


async def _read(response: ClientResponse, budget: ByteBudget) -> bytes:
    if not response.ok:
        raise ImageError(f"The server of image_url answered with HTTP status {response.status}.")
    budget.check(response.content_length or 0, "image_url")
    data = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK):
        budget.take(len(chunk), "image_url")
        data += chunk
    return bytes(data)


def _parse(text: str, hosts: Sequence[str], base: URL | None = None) -> URL:
    """The URL of a request or of a redirect; raises :class:`RequestError` if it is not allowed."""
    from yarl import URL

    try:
        url = URL(text) if base is None else base.join(URL(text))
        host, port = (url.host or "").rstrip("."), url.port
    except ValueError:
        raise _refused("the URL is invalid") from None
    if url.scheme not in _SCHEMES or not host or not port:
        raise _refused("not an http or https URL")
    if url.user is not None or url.password is not None:
        raise _refused("the URL contains a user or password")
    if hosts and not any(_is_host(host, allowed) for allowed in hosts):
        raise _refused("the host is not in IMAGE_URL_HOSTS")
    return url


async def _resolve(url: URL) -> list[str]:
    """The IP addresses of a URL's host, all of them public.

    Raises
    ------
    RequestError
        If one of the addresses is not public.
    ImageError
        If the host does not exist.
    """
    from runpod.serverless.utils.rp_ssrf import SSRFError, resolve_and_validate

    host, port = (url.host or "").rstrip("."), url.port
    lookup = functools.partial(
        asyncio.get_running_loop().run_in_executor, _lookups, resolve_and_validate
    )
    try:
        addresses: list[str] = await lookup(host, port)
        for embedded in filter(None, map(_embedded_ipv4, addresses)):
            await lookup(embedded, port)
    except SSRFError as error:
        if isinstance(error.__cause__, OSError):
            raise ImageError(_NO_HOST) from None
        raise _refused("the address is not public") from None
    except (OSError, UnicodeError):
        raise ImageError(_NO_HOST) from None
    return addresses


def _is_host(host: str, allowed: str) -> bool:
    if allowed.startswith("*."):
        return host.endswith(allowed[1:])
    return host == allowed


def _embedded_ipv4(address: str) -> str | None:
    """The IPv4 address embedded in an IPv6 address; a gateway forwards packets to it."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    for network, shift in _EMBEDDING_IPV4:
        if parsed.version == 6 and parsed in network:
            return str(ipaddress.IPv4Address((int(parsed) >> shift) & 0xFFFFFFFF))
    return None


def _pinned_resolver() -> Any:
    """A resolver for aiohttp that gives the addresses it was told, whatever the name."""
    from aiohttp.abc import AbstractResolver, ResolveResult

    class Pinned(AbstractResolver):
        addresses: Sequence[str] = ()

        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
        ) -> list[ResolveResult]:
            return [
                ResolveResult(
                    hostname=host,
                    host=address,
                    port=port,
                    family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                    proto=0,
                    flags=socket.AI_NUMERICHOST,
                )
                for address in self.addresses
            ]

        async def close(self) -> None:
            pass

    return Pinned()


@functools.cache
def _tls() -> ssl.SSLContext:
    """TLS with the certificates of certifi; the image's base has none."""
    import certifi

    return ssl.create_default_context(cafile=certifi.where())


def _refused(reason: str) -> RequestError:
    logger.warning("image_url refused: %s", reason)
    return RequestError("image_url must be a public http or https address.")
