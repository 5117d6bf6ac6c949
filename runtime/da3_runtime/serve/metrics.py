"""What a Prometheus server reads of the HTTP server."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from da3_runtime.api.response import JSON

# Seconds; from a decode to the load of a large model.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "da3_requests", "Requests answered.", ["status", "model", "backend"], registry=self._registry
        )
        self._seconds = Histogram(
            "da3_stage_seconds",
            "Seconds of each stage of a request.",
            ["stage"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._unfinished = Gauge(
            "da3_unfinished_requests", "Requests that wait or are worked on.", registry=self._registry
        )
        self._loaded = Gauge("da3_loaded_models", "Models that are loaded.", registry=self._registry)

    def count(self, answer: JSON) -> None:
        """Take note of a response's fields, or of ``error`` and ``status``."""
        status = str(answer.get("status", 200))
        model, backend = (str(answer.get(name, "")) for name in ("model_id", "backend"))
        self._requests.labels(status, model, backend).inc()
        timings = answer.get("timings_ms")
        if isinstance(timings, Mapping):
            for stage, milliseconds in timings.items():
                self._seconds.labels(stage).observe(milliseconds / 1000)

    def text(self, unfinished: int, loaded: int) -> bytes:
        """All figures in Prometheus's text format."""
        self._unfinished.set(unfinished)
        self._loaded.set(loaded)
        return generate_latest(self._registry)
