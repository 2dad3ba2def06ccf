"""Prometheus metrics: requests, tokens and times by steering, and the queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from ..generation.engine import FinishEvent
    from .worker import Worker

OTHER = "other"
_MAX_STEERINGS = 512  # clients can register and delete names without limit, and each has its own counters

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server. Labels are registered names, never texts of a request."""

    def __init__(self, worker: Worker) -> None:
        self._registry = registry = CollectorRegistry()
        self._steerings: set[str] = set()
        labels = ("endpoint", "steering")
        self._requests = Counter(
            "steermoe_requests", "Requests that were answered.", (*labels, "status"), registry=registry
        )
        self._prompt = Counter("steermoe_prompt_tokens", "Tokens of prompts.", labels, registry=registry)
        self._cached = Counter(
            "steermoe_cached_prompt_tokens",
            "Tokens of prompts that were in memory, computed under the same steering.",
            labels,
            registry=registry,
        )
        self._generated = Counter("steermoe_generated_tokens", "Tokens of answers.", labels, registry=registry)
        self._seconds = Histogram(
            "steermoe_request_seconds",
            "From a request's arrival to its end.",
            labels,
            buckets=_SECONDS,
            registry=registry,
        )
        self._first = Histogram(
            "steermoe_first_token_seconds",
            "From a request's arrival to its first token.",
            labels,
            buckets=_SECONDS,
            registry=registry,
        )
        for name, what, read in (
            ("running", "Answers that are being decoded.", lambda: worker.n_running),
            ("slots", "Answers that can be decoded at once.", lambda: worker.n_slots),
            ("waiting", "Requests that wait for a slot.", lambda: worker.n_waiting),
            ("ready", "1: the model is loaded.", lambda: worker.state == "ok"),
        ):
            Gauge(f"steermoe_{name}", what, registry=registry).set_function(read)

    def answered(self, endpoint: str, steering: str, finishes: list[FinishEvent], seconds: float) -> None:
        """Count a request that was answered."""
        steering = self._bounded(steering)
        self._requests.labels(endpoint, steering, "ok").inc()
        self._seconds.labels(endpoint, steering).observe(seconds)
        for finish in finishes:
            self._prompt.labels(endpoint, steering).inc(finish.n_prompt)
            self._cached.labels(endpoint, steering).inc(finish.n_cached)
            self._generated.labels(endpoint, steering).inc(finish.n_generated)

    def first_token(self, endpoint: str, steering: str, seconds: float) -> None:
        """Count the time to a request's first token."""
        self._first.labels(endpoint, self._bounded(steering)).observe(seconds)

    def failed(self, endpoint: str, steering: str, status: str) -> None:
        """Count a request that was not answered; `status` is an error's, or "gone"."""
        self._requests.labels(endpoint, self._bounded(steering), status).inc()

    def _bounded(self, steering: str) -> str:
        if steering not in self._steerings and len(self._steerings) >= _MAX_STEERINGS:
            return OTHER
        self._steerings.add(steering)
        return steering

    def text(self) -> bytes:
        """All metrics in the exposition format."""
        return generate_latest(self._registry)
