"""The HTTP server: the paths of RunPod's API, health, metrics and schemas."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from da3_runtime import __version__
from da3_runtime.api.response import JSON
from da3_runtime.api.schema import Answer, json_schemas, openapi_components
from da3_runtime.errors import (
    BusyError,
    DA3Error,
    ImageTooLargeError,
    RequestError,
    SettingError,
    UnauthorizedError,
)
from da3_runtime.serve.jobs import Job, Jobs
from da3_runtime.serve.metrics import Metrics
from da3_runtime.serve.service import KEY_HEADER, NO_KEY, Service
from da3_runtime.serve.startup import check_exposure, load_in_background
from da3_runtime.settings import Settings

logger = logging.getLogger(__name__)

PORT = 8080
LOOPBACK, EVERY_ADDRESS = "127.0.0.1", "0.0.0.0"  # noqa: S104  (check_exposure guards it)
# Room for the fields of a request beside its image, in bytes.
_FIELDS_BYTES = 2**16
# How long a body may take to arrive, and how many bodies are read at once before their API key is known:
# the key may be in the body instead of a header.
_BODY_SECONDS = 60
_UNKNOWN_BODIES = 4
# Path prefix of RunPod's API, so that clients of RunPod work with this server.
_PLATFORM = "/v2/{endpoint_id}"
_JOB_PATH = re.compile(r"(/v2/[^/]+)?/run(sync)?")

_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Job"}}},
    }
}


def make_app(
    service: Service, loading: threading.Thread, max_response_bytes: int | None = None
) -> FastAPI:
    """The web application.

    Parameters
    ----------
    service : Service
        Runs the requests.
    loading : threading.Thread
        Alive while the service loads its default model.
    max_response_bytes : int | None
        Largest response in bytes; None for no limit.
    """
    metrics = Metrics()
    jobs = Jobs(service, metrics.count, max_response_bytes)
    unknown_bodies = asyncio.Semaphore(_UNKNOWN_BODIES)
    max_bytes = -(-service.settings.images.max_image_bytes // 3) * 4 + _FIELDS_BYTES

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(jobs.close)

    app = FastAPI(
        title="DA3 Engines",
        version=__version__,
        description="Depth maps of photos.",
        lifespan=lifespan,
        redoc_url=None,
    )
    router = APIRouter()

    @app.middleware("http")
    async def authorize(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        """Require the API key everywhere but on /ping; a job may have the key in its input instead."""
        request.state.is_authorized = service.is_key(request.headers.get(KEY_HEADER))
        path = request.url.path
        is_job = request.method == "POST" and _JOB_PATH.fullmatch(path)
        if request.state.is_authorized or path == "/ping" or is_job:
            return await proceed(request)
        return _failure(UnauthorizedError(NO_KEY))

    async def submit(request: Request, keep: bool) -> tuple[Job, asyncio.Future[None]]:
        if not request.state.is_authorized:
            data = await read_unknown(request)
            with jobs.reserve() as slot:
                job, future = slot.submit(data, keep)
        else:
            with jobs.reserve() as slot:
                data = (await _read_json(request, max_bytes)).get("input")
                job, future = slot.submit(data, keep)
        return job, asyncio.wrap_future(future)

    async def read_unknown(request: Request) -> object:
        """The ``input`` of a request without a key in a header; any fault is 401, to reveal nothing."""
        async with unknown_bodies:
            try:
                data = (await _read_json(request, max_bytes)).get("input")
            except DA3Error:
                raise UnauthorizedError(NO_KEY) from None
        service.authorize(data)
        return data

    @router.post(
        "/runsync",
        summary="Run a job and wait for its result",
        response_model=Answer,
        openapi_extra=_BODY,
    )
    async def runsync(request: Request) -> Response:
        job, future = await submit(request, keep=False)
        await future
        return JSONResponse(job.envelope(), job.http_status)

    @router.post("/run", summary="Queue a job; /status returns its result", openapi_extra=_BODY)
    async def run(request: Request) -> Response:
        job, _ = await submit(request, keep=True)
        return JSONResponse(job.envelope())

    @router.get("/status/{job_id}", summary="State and result of a job", response_model=Answer)
    @router.post("/status/{job_id}", include_in_schema=False)
    async def status(job_id: str) -> Response:
        job = jobs.find(job_id)
        if job is None:
            return JSONResponse(
                {"error": "Unknown job: its id is wrong, or its result has expired.", "status": 404}, 404
            )
        return JSONResponse(job.envelope())

    @app.get("/ping", summary="200 when ready, 204 while the model is loading, 503 if it cannot run")
    async def ping() -> Response:
        return _ping(service, loading)

    @app.get("/metrics", summary="Metrics for Prometheus")
    async def read_metrics() -> Response:
        text = metrics.text(jobs.unfinished, len(service.pool.loaded()))
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @app.get("/schema", summary="JSON schemas of request and response")
    async def schema() -> JSON:
        return json_schemas()

    @app.exception_handler(DA3Error)
    async def report_error(_: Request, error: DA3Error) -> Response:
        return _failure(error)

    @app.exception_handler(ClientDisconnect)
    async def ignore_disconnect(_: Request, error: ClientDisconnect) -> Response:
        """The client has disconnected before its request was complete; nobody reads this response."""
        return Response(status_code=400)

    app.include_router(router)
    app.include_router(router, prefix=_PLATFORM, include_in_schema=False)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        schema["components"]["schemas"] |= openapi_components()
        key = {"type": "apiKey", "in": "header", "name": KEY_HEADER}
        schema["components"]["securitySchemes"] = {"key": key}
        schema["security"] = [{"key": []}, {}]
        app.openapi_schema = schema
    return app.openapi_schema


def _failure(error: DA3Error) -> Response:
    headers = {"Retry-After": "1"} if isinstance(error, BusyError) else None
    return JSONResponse({"error": str(error), "status": error.status}, error.status, headers)


def _ping(service: Service, loading: threading.Thread) -> Response:
    if service.has_loaded and not service.is_lost:
        return JSONResponse({"status": "healthy"})
    if loading.is_alive():
        return Response(status_code=204)
    return JSONResponse({"status": "unhealthy"}, 503)


async def _read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a request's body.

    Raises
    ------
    ImageTooLargeError
        As soon as the body exceeds ``max_bytes``.
    RequestError
        If the body does not arrive in time, or is not a JSON object.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise ImageTooLargeError(
                        f"The request has more than {max_bytes} bytes: send a smaller image, or raise "
                        "MAX_IMAGE_BYTES of the server."
                    )
    except TimeoutError:
        raise RequestError(f"The request took more than {_BODY_SECONDS} seconds to arrive.") from None
    try:
        data = await asyncio.to_thread(json.loads, body)
    except (ValueError, RecursionError):
        raise RequestError('The body of the request is not valid JSON: send {"input": {...}}.') from None
    if not isinstance(data, dict):
        raise RequestError('The body of the request must be a JSON object: {"input": {...}}.')
    return data


def serve(
    settings: Settings, host: str = LOOPBACK, port: int = PORT, max_response_bytes: int | None = None
) -> int:
    """Serve HTTP until the process gets a signal to stop; accepted requests are finished first.

    Parameters
    ----------
    settings : Settings
        All settings of the runtime.
    host : str
        Address to listen on if the settings name none.
    port : int
        Port to listen on if the settings name none.
    max_response_bytes : int | None
        Largest response in bytes if the settings name no limit; None for no limit.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    SettingError
        If a setting is invalid, the server cannot listen on the address, or other machines can reach the
        address and no API key is set.
    """
    server = settings.server
    host, port = server.host or host, server.port or port
    check_exposure(host, server)
    service = Service(settings)
    listener = _listen(host, port, "PORT")
    health_port = server.health_port or port
    health = _listen(host, health_port, "PORT_HEALTH") if health_port != port else None
    loading = load_in_background(service)
    if health is not None:
        _serve_pings(service, loading, health)
    logger.info("serving %s on http://%s:%d (see /docs)", service.default.model_id, host, port)
    app = make_app(service, loading, settings.capacity.max_response_bytes or max_response_bytes)
    _server(app).run(sockets=[listener])
    if loading.is_alive():
        # An orderly exit would unload libraries that the loading thread still uses.
        os._exit(0)
    return 0


def _serve_pings(service: Service, loading: threading.Thread, listener: socket.socket) -> None:
    """Serve /ping, and nothing else, on a separate port."""
    app = FastAPI(openapi_url=None)
    app.add_api_route("/ping", lambda: _ping(service, loading))
    server = _server(app)
    threading.Thread(target=server.run, args=([listener],), name="health", daemon=True).start()


def _server(app: FastAPI) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on"))


def _listen(host: str, port: int, name: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise SettingError(f"{name}: cannot listen on {host}:{port}: {error.strerror}.") from None
