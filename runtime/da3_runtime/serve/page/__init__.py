"""The page at /: photos in, depth and points out, in a browser. Its files are in ``files``.

Everything that it loads comes from this server, so it works offline, and its Content-Security-Policy
allows nothing else. All its addresses are relative, so it works behind a proxy's path.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pybase64
from fastapi import FastAPI, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from da3_runtime.output.preview import COLOR_MAPS

ADDRESS, COLORS, FILES = "/", "/color-maps", "/page/"
_FOLDER = Path(__file__).parent / "files"
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # a browser asks whether a file has changed
}


def add_page(app: FastAPI) -> None:
    """Add the page and its files to the web application."""

    @app.api_route(ADDRESS, methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_FOLDER / "index.html", headers=_HEADERS)

    @app.get(COLORS, include_in_schema=False)
    async def color_maps() -> Response:
        return JSONResponse(_color_maps(), headers=_HEADERS)

    app.mount(FILES, _Files(directory=_FOLDER))


class _Files(StaticFiles):
    """The files of the page, with its headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The response to a request for one file."""
        response = await super().get_response(path, scope)
        response.headers.update(_HEADERS)
        return response


def is_of_page(path: str) -> bool:
    """Whether a path is the page or one of its files, which need no key."""
    return path in (ADDRESS, COLORS) or path.startswith(FILES)


def _color_maps() -> dict[str, str]:
    """The 256 colors of each map, RGB, as Base64."""
    levels = np.arange(256, dtype=np.uint8)
    return {
        name: pybase64.b64encode_as_string(
            np.ascontiguousarray(cv2.applyColorMap(levels, number)[:, 0, ::-1]).tobytes()
        )
        for name, number in COLOR_MAPS.items()
    }
