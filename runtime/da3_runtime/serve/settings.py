"""Settings of serving: address and API key of the server, and how many requests it accepts."""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Annotated, ClassVar

from pydantic import BeforeValidator
from pydantic.dataclasses import dataclass

from da3_runtime.network_io import MAX_VIEWS, MOST_VIEWS
from da3_runtime.util.setting_group import AUTO, CONFIG, Flag, Name, comma_separated, setting

_ORIGIN = r"\*|https?://[^/\s,*]+"


def _key(value: object) -> object:
    """A key without the white space around it: secrets that are mounted as files end in a line end."""
    if not isinstance(value, str):
        return value
    key = value.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError("no header can carry it")
    return key


@dataclass(frozen=True, config=CONFIG)
class CapacitySettings:
    """How many models and requests a worker handles at once, and the response size limit."""

    title: ClassVar[str] = "Capacity"

    _: KW_ONLY
    max_loaded_models: int = setting(1, "How many models stay loaded.", low=1, high=64)
    max_concurrency: int | None = setting(
        None,
        "How many requests are in hand at once, from decoding to encoding. Unset: twice MAX_BATCH, so "
        "that the next batch comes together while one runs; 16 if MAX_BATCH is unset too.",
        low=1,
        high=256,
    )
    max_views: int = setting(
        MAX_VIEWS, "How many images a request for a scene may have.", low=1, high=MOST_VIEWS
    )
    max_queued_jobs: int = setting(
        16, "How many more requests the HTTP server queues before it responds 503.", low=0, high=10_000
    )
    max_response_bytes: int | None = setting(
        None,
        "Largest response, in bytes. Unset: RunPod's limit, 20 MB for a queue worker and 30 MB for a "
        "load-balancing worker; no limit otherwise.",
        low=10_000,
        high=2**31,
    )


@dataclass(frozen=True, config=CONFIG)
class ServerSettings:
    """Where a server listens, and which clients it accepts."""

    title: ClassVar[str] = "Server"

    _: KW_ONLY
    mode: Name = setting(
        AUTO,
        "What da3-runtime without a verb starts. auto: derived from RunPod's own variables.",
        variables=("DA3_MODE",),
        takes="auto, queue, load-balancer or http",
    )
    host: str | None = setting(
        None,
        "Address that the HTTP server listens on. Unset: 127.0.0.1 in mode http, every address in mode "
        "load-balancer.",
        variables=("DA3_HOST",),
        takes="an IP address or host name",
    )
    port: int | None = setting(
        None,
        "Port of the HTTP server. 0 or unset: 8080 in mode http, 80 in mode load-balancer.",
        low=0,
        high=65_535,
    )
    cors_origins: Annotated[tuple[str, ...], comma_separated(_ORIGIN, end="/")] = setting(
        (),
        "Origins of web pages that may use the server from a browser; * allows every page. Unset: none.",
        variables=("DA3_CORS_ORIGINS",),
        takes="origins such as https://example.com, separated by commas, or *",
    )
    keep_alive_seconds: int = setting(
        75,
        "How long an idle connection stays open, in seconds. Longer than the proxy in front keeps it.",
        low=1,
        high=3600,
    )
    health_port: int | None = setting(
        None,
        "Port that serves /ping. 0 or unset: PORT.",
        variables=("PORT_HEALTH",),
        low=0,
        high=65_535,
    )
    page: Flag = setting(
        True,
        "Whether the HTTP server has a page at /, which shows depth and points in a browser.",
        variables=("DA3_PAGE",),
    )
    api_key: Annotated[str | None, BeforeValidator(_key)] = setting(
        None,
        "API key that every request must send, in the header da3-api-key or the field api_key. White "
        "space around it does not count. Unset: no key is needed.",
        variables=("DA3_API_KEY",),
        takes="printable ASCII characters",
        is_secret=True,
    )
    allow_anonymous: Flag = setting(
        False,
        "Let a server without an API key listen on an address that other machines reach.",
        variables=("DA3_ALLOW_ANONYMOUS",),
    )
