"""Prometheus metrics of a server: requests, documents, tokens, waiting times, and how full the queues are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastrerank.serve.batching.batcher import AsyncReranker, Scored

__all__ = ["Metrics"]

# Names of ignored fields that get a counter of their own; further names share one.
_MOST_NAMES = 64
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, models: Mapping[str, AsyncReranker]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("fastrerank_requests", "Finished requests.", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "fastrerank_request_seconds",
            "From a request's arrival to its answer.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.waited = Histogram(
            "fastrerank_queue_seconds",
            "How long requests waited for their first batch.",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        self.documents = Counter("fastrerank_documents", "Documents scored.", ["model"], registry=registry)
        self.tokens = Counter("fastrerank_tokens", "Tokens of scored pairs.", ["model"], registry=registry)
        self.refused = Counter(
            "fastrerank_overloaded", "Requests refused because the queue was full.", ["model"], registry=registry
        )
        self.ignored = Counter(
            "fastrerank_ignored_fields", "Fields of requests that had no effect, by name.", ["field"], registry=registry
        )
        self._names: set[str] = set()
        queued = Gauge(
            "fastrerank_queued_tokens", "About how many tokens wait or are computed.", ["model"], registry=registry
        )
        waiting = Gauge("fastrerank_waiting_requests", "Requests that wait for a batch.", ["model"], registry=registry)
        batches = Gauge("fastrerank_batches", "Batches computed since the start.", ["model"], registry=registry)
        for name, reranker in models.items():
            queued.labels(name).set_function(reranker.queued_tokens)
            waiting.labels(name).set_function(reranker.waiting)
            batches.labels(name).set_function(partial(getattr, reranker, "batches"))

    def log_lines_dropped(self, count: Callable[[], int]) -> None:
        """Show what `count` returns: log lines that nobody read in time."""
        name, text = "fastrerank_log_lines_dropped", "Log lines dropped because nobody read them."
        Gauge(name, text, registry=self.registry).set_function(count)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a finished request."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def scored(self, model: str, result: Scored) -> None:
        """Count what a request's scores cost."""
        self.documents.labels(model).inc(len(result.scores))
        self.tokens.labels(model).inc(result.tokens)
        self.waited.labels(model).observe(result.waited)

    def ignore(self, names: Sequence[str]) -> None:
        """Count fields that had no effect, each under its name; names beyond the first 64 count as "other"."""
        for name in names[:_MOST_NAMES]:
            if name not in self._names and (len(self._names) >= _MOST_NAMES or not _PLAIN.fullmatch(name)):
                name = "other"
            else:
                self._names.add(name)
            self.ignored.labels(name).inc()
        if len(names) > _MOST_NAMES:
            self.ignored.labels("other").inc(len(names) - _MOST_NAMES)

    def text(self) -> bytes:
        """Return the exposition format."""
        return generate_latest(self.registry)
