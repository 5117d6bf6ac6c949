"""Metrics of the HTTP server in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from da3_runtime.api.response import JSON
from da3_runtime.inference.stages import Stage

# Upper bounds in seconds: from decoding an image to loading a large model.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


class Metrics:
    """Metrics of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "da3_requests", "Finished requests.", ["status", "model", "backend"], registry=self._registry
        )
        self._seconds = Histogram(
            "da3_stage_seconds",
            "Seconds of each stage of a request.",
            ["stage"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._unfinished = Gauge(
            "da3_unfinished_requests", "Requests that wait or run.", registry=self._registry
        )
        self._loaded = Gauge("da3_loaded_models", "Loaded models.", registry=self._registry)
        self._responses = Counter(
            "da3_http_responses", "HTTP responses.", ["path", "status"], registry=self._registry
        )
        self._waiting, self._in_hand = (
            Gauge(f"da3_stage_{name}", text, ["stage"], registry=self._registry)
            for name, text in (
                ("waiting", "Requests that wait for a stage."),
                ("in_hand", "Requests that are in a stage."),
            )
        )

    def count(self, response: JSON) -> None:
        """Count a finished request by its response: result fields, or ``error`` and ``status``."""
        status = str(response.get("status", 200))
        model, backend = (str(response.get(name, "")) for name in ("model_id", "backend"))
        self._requests.labels(status, model, backend).inc()
        timings = response.get("timings_ms")
        if isinstance(timings, Mapping):
            for stage, milliseconds in timings.items():
                self._seconds.labels(stage).observe(milliseconds / 1000)

    def count_response(self, path: str, status: int) -> None:
        """Count an HTTP response by the pattern of its path; "" if the path is unknown."""
        self._responses.labels(path, str(status)).inc()

    def observe(self, stage: str, seconds: float) -> None:
        """Record how long a stage took."""
        self._seconds.labels(stage).observe(seconds)

    def text(self, stages: Iterable[Stage], bodies: int, unfinished: int, loaded: int) -> bytes:
        """All metrics in Prometheus's text format.

        Parameters
        ----------
        stages : Iterable[Stage]
            The stages of a request.
        bodies : int
            How many bodies are being read now.
        unfinished : int
            How many requests wait or run now.
        loaded : int
            How many models are loaded now.
        """
        self._unfinished.set(unfinished)
        self._loaded.set(loaded)
        self._in_hand.labels("body").set(bodies)
        for stage in stages:
            self._waiting.labels(stage.name).set(stage.waiting)
            self._in_hand.labels(stage.name).set(stage.in_hand)
        return generate_latest(self._registry)
