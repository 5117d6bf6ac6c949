"""The body of an HTTP request, by its content type -> the ``input`` of a job."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import Any

import orjson
import pybase64
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from da3_runtime.errors import RequestError
from da3_runtime.network_io import MOST_VIEWS

_FORM = "multipart/form-data"


async def input_of(request: Request, body: bytes | bytearray) -> object:
    """The ``input`` of a job.

    A JSON body has it in its field ``input``. A body that is an image, or the file of a form, becomes
    ``image_base64``, and several files become ``images``; the other fields are those of the form and of
    the URL's query.

    Parameters
    ----------
    body : bytes | bytearray
        The whole body of ``request``, decompressed.

    Raises
    ------
    RequestError
        If the body is not what its content type says.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _FORM:
        fields, images = await _form(request, body)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        fields, images = [], [body]
    else:
        return await _json(body)
    named = {name: _value(name, text) for name, text in (*request.query_params.items(), *fields)}
    texts = [await asyncio.to_thread(pybase64.b64encode_as_string, image) for image in images]
    if len(texts) > 1:
        return {**named, "images": [{"image_base64": text} for text in texts]}
    return {**named, "image_base64": texts[0]} if texts else named


async def _json(body: bytes | bytearray) -> object:
    try:
        data: Any = await asyncio.to_thread(orjson.loads, body)
    except ValueError:
        raise RequestError('The body of the request is not valid JSON: send {"input": {...}}.') from None
    if not isinstance(data, dict):
        raise RequestError('The body of the request must be a JSON object: {"input": {...}}.')
    return data.get("input")


async def _form(
    request: Request, body: bytes | bytearray
) -> tuple[Iterable[tuple[str, str]], list[bytes | bytearray]]:
    """The text fields of a form, and the contents of its files."""

    async def stream() -> AsyncGenerator[bytes, None]:
        yield bytes(body)

    # The body is in memory already and its size was checked.
    parser = MultiPartParser(
        request.headers, stream(), max_files=MOST_VIEWS, max_part_size=len(body) + 1
    )
    parser.spool_max_size = len(body) + 1
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError):
        raise RequestError(
            "The body of the request is not a valid form of fields and image files."
        ) from None
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    fields = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
    return fields, [await file.read() for file in files]


def _value(name: str, text: str) -> object:
    """A field's value from text: names of outputs are separated by commas, lists are JSON."""
    if name == "outputs":
        return [each.strip() for each in text.split(",")]
    if name in ("intrinsics", "images"):
        try:
            return orjson.loads(text)
        except ValueError:
            return text
    return text
