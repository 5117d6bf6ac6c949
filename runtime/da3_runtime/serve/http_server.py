"""The HTTP server: the paths of RunPod's API, health, metrics and schemas."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import orjson
import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from da3_runtime import __version__
from da3_runtime.api.response import JSON
from da3_runtime.api.schema import Answer, Failure, json_schemas, openapi_components
from da3_runtime.errors import (
    BusyError,
    DA3Error,
    ImageTooLargeError,
    RequestError,
    SettingError,
    UnauthorizedError,
)
from da3_runtime.serve.bodies import Bodies
from da3_runtime.serve.inputs import input_of
from da3_runtime.serve.jobs import Job, Jobs
from da3_runtime.serve.metrics import Metrics
from da3_runtime.serve.models import ModelStates, model_states
from da3_runtime.serve.page import add_page, is_of_page
from da3_runtime.serve.service import KEY_HEADER, NO_KEY, Service
from da3_runtime.serve.startup import check_exposure, load_in_background
from da3_runtime.settings import Settings

logger = logging.getLogger(__name__)

PORT = 8080
LOOPBACK, EVERY_ADDRESS = "127.0.0.1", "0.0.0.0"  # noqa: S104  (check_exposure guards it)
# Room for the fields of a request beside its image, in bytes.
_FIELDS_BYTES = 2**16
# Path prefix of RunPod's API, so that clients of RunPod work with this server.
_PLATFORM = "/v2/{endpoint_id}"
_HEALTH_PATHS = ("/health", "/ping")
_ASSETS = "/docs-assets/"
_OPEN_PATHS = {*_HEALTH_PATHS, "/docs", "/openapi.json"}
_PATHS = "GET /openapi.json lists the paths and their methods"
# A POST to these may have the key in its body.
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
    bodies = Bodies(-(-service.settings.images.max_image_bytes // 3) * 4 + _FIELDS_BYTES)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await jobs.close()

    app = FastAPI(
        title="DA3 Engines",
        version=__version__,
        description="Depth maps of photos.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        default_response_class=_Json,
    )
    app.state.bodies = bodies
    router = APIRouter()

    @app.middleware("http")
    async def authorize(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        """Require the API key for all but health and documentation; a job may have it in its input."""
        request.state.is_authorized = service.is_key(request.headers.get(KEY_HEADER))
        path = request.url.path
        is_job = request.method == "POST" and _JOB_PATH.fullmatch(path)
        is_open = path in _OPEN_PATHS or path.startswith(_ASSETS) or is_of_page(path)
        if request.state.is_authorized or is_open or is_job:
            return await proceed(request)
        return _failure(UnauthorizedError(NO_KEY))

    @app.middleware("http")
    async def count(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        """Count every response, those that refuse a request too."""
        status = 500
        try:
            response = await proceed(request)
            status = response.status_code
        finally:
            route = request.scope.get("route")
            metrics.count_response(getattr(route, "path", ""), status)
        return response

    async def submit(request: Request, keep: bool) -> tuple[Job, asyncio.Task[None]]:
        if request.state.is_authorized:
            # A busy server refuses before it reads the body; the place is taken after that.
            jobs.require_place()
        data = await read_input(request)
        return jobs.start(data, keep)

    async def read_input(request: Request) -> object:
        """The ``input`` of a request. Without a header key every fault is 401, to reveal nothing."""
        start = time.perf_counter()
        try:
            data = await input_of(request, await bodies.read(request))
        except (RequestError, ImageTooLargeError):
            if request.state.is_authorized:
                raise
            raise UnauthorizedError(NO_KEY) from None
        finally:
            metrics.observe("body", time.perf_counter() - start)
        if not request.state.is_authorized:
            service.authorize(data)
        return data

    @router.post(
        "/runsync",
        summary="Run a job and wait for its result",
        response_model=Answer,
        responses=_failures(400, 401, 413, 415, 422, 500, 502, 503, 507, of_job=True),
        openapi_extra=_BODY,
    )
    async def runsync(request: Request) -> Response:
        job, task = await submit(request, keep=False)
        await asyncio.shield(task)
        return await _respond(job.envelope(), job.http_status)

    @router.post(
        "/run",
        summary="Queue a job; /status returns its result",
        response_model=Answer,
        responses=_failures(400, 401, 413, 503),
        openapi_extra=_BODY,
    )
    async def run(request: Request) -> Response:
        job, _ = await submit(request, keep=True)
        return await _respond(job.envelope())

    of_job = _failures(401, 404)

    @router.get(
        "/status/{job_id}",
        summary="State and result of a job",
        response_model=Answer,
        responses=of_job,
    )
    @router.post(
        "/status/{job_id}",
        summary="The same, for RunPod's clients",
        response_model=Answer,
        responses=of_job,
    )
    async def status(job_id: str) -> Response:
        return await _respond(jobs.find(job_id).envelope())

    @router.get(
        "/stream/{job_id}",
        summary="The result of a job as RunPod's list of parts",
        responses=of_job,
    )
    @router.post("/stream/{job_id}", summary="The same, for RunPod's clients", responses=of_job)
    async def stream(job_id: str) -> Response:
        envelope = jobs.find(job_id).envelope()
        parts = [{"output": envelope["output"]}] if "output" in envelope else []
        return await _respond({"status": envelope["status"], "stream": parts})

    @router.post("/cancel/{job_id}", summary="Cancel a job that has not ended", responses=of_job)
    async def cancel(job_id: str) -> Response:
        job = jobs.find(job_id)
        jobs.cancel(job)
        return _Json({"id": job.id, "status": job.status.value})

    @router.post(
        "/purge-queue",
        summary="Cancel every job that waits in the queue",
        responses=_failures(401),
    )
    async def purge_queue() -> Response:
        return _Json({"removed": jobs.purge(), "status": "completed"})

    app.include_router(router)
    app.include_router(router, prefix=_PLATFORM, include_in_schema=False)

    async def ping() -> Response:
        return _ping(service, loading)

    for path, method in itertools.product(_HEALTH_PATHS, ("GET", "HEAD")):
        app.add_api_route(
            path,
            ping,
            methods=[method],
            summary="200 when ready, 204 while the model is loading, 503 if it cannot run",
            responses={
                204: {"description": "The model is loading."},
                503: {"description": "The model cannot run.", "content": {"application/json": {}}},
            },
        )

    @app.get(
        "/metrics",
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={200: {"content": {CONTENT_TYPE_LATEST: {}}}, **_failures(401)},
    )
    async def read_metrics() -> Response:
        text = metrics.text(
            service.stages.values(), bodies.reading, jobs.unfinished, len(service.pool.loaded())
        )
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @app.get("/schema", summary="JSON schemas of request and response", responses=_failures(401))
    async def schema() -> JSON:
        return json_schemas()

    @app.get("/models", summary="The models that a request may name", responses=_failures(401))
    async def models() -> ModelStates:
        return await asyncio.to_thread(model_states, service)

    @app.get("/docs", include_in_schema=False)
    async def documentation() -> Response:
        """Swagger UI; all its addresses are relative, so it works behind a proxy's path."""
        return get_swagger_ui_html(
            title=app.title,
            openapi_url="openapi.json",
            swagger_js_url=f".{_ASSETS}swagger-ui-bundle.js",
            swagger_css_url=f".{_ASSETS}swagger-ui.css",
            swagger_favicon_url=f".{_ASSETS}favicon-32x32.png",
        )

    app.mount(_ASSETS, StaticFiles(packages=[("fastapi_swagger", "resources")]))

    @app.exception_handler(DA3Error)
    async def report_error(_: Request, error: DA3Error) -> Response:
        return _failure(error)

    @app.exception_handler(ClientDisconnect)
    async def ignore_disconnect(_: Request, error: ClientDisconnect) -> Response:
        """The client has disconnected before its request was complete; nobody reads this response."""
        return Response(status_code=400)

    @app.exception_handler(HTTPException)
    async def report_http_error(request: Request, error: HTTPException) -> Response:
        """An unknown path, or a method that a path does not have."""
        status, headers = error.status_code, None
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            # The exception has the methods of the first route of this path only.
            path = request.url.path
            routes = (route for route in app.routes if isinstance(route, Route))
            allowed = {
                m for route in routes if route.path_regex.match(path) for m in route.methods or ()
            }
            # A file of a folder is in no route.
            headers = {"Allow": ", ".join(sorted(allowed or {"GET", "HEAD"}))}
        return _Json({"error": f"{error.detail}: {_PATHS}.", "status": status}, status, headers)

    @app.get(
        _PLATFORM + "/health",
        summary="RunPod's counts of jobs and workers",
        responses=_failures(401),
    )
    async def counts(endpoint_id: str) -> Response:
        is_ready = service.has_loaded and not service.is_lost
        workers = {
            "idle": 0,
            "initializing": 0,
            "ready": 0,
            "running": 0,
            "throttled": 0,
            "unhealthy": 0,
        }
        workers["ready" if is_ready else "initializing" if loading.is_alive() else "unhealthy"] = 1
        return _Json({"jobs": jobs.counts(), "workers": workers})

    if service.settings.server.page:
        add_page(app)
    if origins := service.settings.server.cors_origins:
        # The last one is the outermost: a browser's question before a request carries no key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "HEAD"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _failures(*statuses: int, of_job: bool = False) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's description of error statuses; ``of_job``: also those of a job that failed."""
    model = Answer | Failure if of_job else Failure
    return {status: {"model": model, "description": HTTPStatus(status).phrase} for status in statuses}


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            servers=[{"url": "./", "description": "Where this document comes from."}],
        )
        # FastAPI's own 422 never occurs: the service checks every field.
        for operations in schema["paths"].values():
            for operation in operations.values():
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        schema["components"]["schemas"] |= openapi_components()
        key = {"type": "apiKey", "in": "header", "name": KEY_HEADER}
        schema["components"]["securitySchemes"] = {"key": key}
        schema["security"] = [{"key": []}, {}]
        app.openapi_schema = schema
    return app.openapi_schema


def _failure(error: DA3Error) -> Response:
    headers = {"Retry-After": "1"} if isinstance(error, BusyError) else None
    return _Json({"error": str(error), "status": error.status}, error.status, headers)


def _ping(service: Service, loading: threading.Thread) -> Response:
    if service.has_loaded and not service.is_lost:
        return _Json({"status": "healthy"})
    if loading.is_alive():
        return Response(status_code=204)
    return _Json({"status": "unhealthy"}, 503)


class _Json(JSONResponse):
    """JSON written by orjson, several times faster: maps are megabytes of text."""

    def render(self, content: object) -> bytes:
        return orjson.dumps(content)


async def _respond(content: JSON, status: int = 200) -> Response:
    """A response that may be large, made on a thread."""
    return await asyncio.to_thread(_Json, content, status)


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
    logger.info("serving %s on http://%s:%d (see / and /docs)", service.default.model_id, host, port)
    app = make_app(service, loading, settings.capacity.max_response_bytes or max_response_bytes)
    _Server(app, server.keep_alive_seconds).run(sockets=[listener])
    if loading.is_alive():
        # An orderly exit would unload libraries that the loading thread still uses.
        os._exit(0)
    return 0


def _serve_pings(service: Service, loading: threading.Thread, listener: socket.socket) -> None:
    """Serve /ping, and nothing else, on a separate port."""
    app = FastAPI(openapi_url=None)
    app.add_api_route("/ping", lambda: _ping(service, loading))
    server = _Server(app)
    threading.Thread(target=server.run, args=([listener],), name="health", daemon=True).start()


class _Server(uvicorn.Server):
    """The server of an app. At SIGTERM, requests whose body is not complete end at once."""

    def __init__(self, app: FastAPI, keep_alive_seconds: int = 5) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="on",
                timeout_keep_alive=keep_alive_seconds,
            )
        )
        self._bodies: Bodies | None = getattr(app.state, "bodies", None)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._bodies is not None:
            self._bodies.close()
        await super().shutdown(sockets)


def _listen(host: str, port: int, name: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise SettingError(f"{name}: cannot listen on {host}:{port}: {error.strerror}.") from None
