"""Reads the bodies of HTTP requests: each within its size and time, all of them within their memory."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import Counter

from starlette.requests import Request

from da3_runtime.errors import BusyError, ImageTooLargeError, RequestError

# A body may take this long, and one second more for every so many bytes that have arrived.
GRACE_SECONDS = 10.0
BYTES_PER_SECOND = 32 * 1024
# Bodies that one address may send at once. Behind a proxy all clients have its address.
PER_CLIENT = 256
# Memory of all unfinished bodies, in bodies of the largest size. One address may use half of it.
_LARGEST_BODIES = 8


class Bodies:
    """The bodies that one server is reading; used on its event loop only.

    Parameters
    ----------
    max_bytes : int
        Largest body in bytes, before and after decompression.

    Attributes
    ----------
    reading : int
        How many bodies are being read.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes: Counter[str] = Counter()  # by address
        self._count: Counter[str] = Counter()
        self._closed = asyncio.Event()

    @property
    def reading(self) -> int:
        """How many bodies are being read."""
        return self._count.total()

    def close(self) -> None:
        """End the reading of every unfinished body, because the server stops."""
        self._closed.set()

    async def read(self, request: Request) -> bytes | bytearray:
        """The body of a request, decompressed.

        Raises
        ------
        ImageTooLargeError
            As soon as the body exceeds the limit.
        RequestError
            If it arrives too slowly or its encoding is not supported.
        BusyError
            If its client, or all clients together, send too much at once, or the server stops.
        """
        client = request.client.host if request.client else ""
        if self._count[client] >= PER_CLIENT:
            raise BusyError(
                f"{PER_CLIENT} requests of this address are arriving already; try again later."
            )
        self._count[client] += 1
        arriving = asyncio.ensure_future(self._receive(request, client))
        closing = asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait((arriving, closing), return_when=asyncio.FIRST_COMPLETED)
            if not arriving.done():
                raise BusyError("The server is stopping; send the request again.")
            body = arriving.result()
        finally:
            arriving.cancel()
            closing.cancel()
            self._count[client] -= 1
        return await self._decompress(body, request.headers.get("content-encoding", "identity"))

    async def _receive(self, request: Request, client: str) -> bytearray:
        body, start = bytearray(), time.monotonic()
        try:
            async with asyncio.timeout(GRACE_SECONDS) as limit:
                async for chunk in request.stream():
                    body += chunk
                    self._bytes[client] += len(chunk)
                    self._check_size(len(body))
                    self._check_memory(client)
                    seconds = GRACE_SECONDS + len(body) / BYTES_PER_SECOND
                    limit.reschedule(
                        asyncio.get_running_loop().time() - time.monotonic() + start + seconds
                    )
        except TimeoutError:
            raise RequestError(
                f"The request arrived too slowly: send at least {BYTES_PER_SECOND // 1024} KiB a second."
            ) from None
        finally:
            self._bytes[client] -= len(body)
        return body

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise ImageTooLargeError(
                f"The request has more than {self._max_bytes} bytes: send a smaller image, or raise "
                "MAX_IMAGE_BYTES of the server."
            )

    def _check_memory(self, client: str) -> None:
        most = _LARGEST_BODIES * self._max_bytes
        if self._bytes.total() > most or self._bytes[client] > most // 2:
            raise BusyError("Too many large requests are arriving at once; try again later.")

    async def _decompress(self, body: bytearray, encoding: str) -> bytes | bytearray:
        match encoding.strip().lower():
            case "" | "identity":
                return body
            case "gzip" | "x-gzip":
                return await asyncio.to_thread(self._unzip, body)
        raise RequestError("Content-Encoding must be gzip, or be left out.")

    def _unzip(self, body: bytearray) -> bytes:
        stream = zlib.decompressobj(wbits=31)
        try:
            data = stream.decompress(body, self._max_bytes + 1)
        except zlib.error:
            data = b""
        self._check_size(len(data))
        if not stream.eof:
            raise RequestError("The body is not valid gzip, as its Content-Encoding says.")
        return data
