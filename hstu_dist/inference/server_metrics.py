"""What Prometheus reads of a server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hstu_dist.inference.cache import StateCache

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_JOBS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self, cache: StateCache | None) -> None:
        """Nothing counted yet; `cache` is watched."""
        self._registry = CollectorRegistry()
        self._requests = Counter("hstu_requests", "Requests answered", ["path", "status"], registry=self._registry)
        self._seconds = Histogram(
            "hstu_request_seconds", "From arrival to answer", ["path"], buckets=_SECONDS, registry=self._registry
        )
        self._batch_seconds = Histogram(
            "hstu_batch_seconds", "Computing a batch", buckets=_SECONDS, registry=self._registry
        )
        self._batch_jobs = Histogram(
            "hstu_batch_requests", "Requests of a batch", buckets=_JOBS, registry=self._registry
        )
        if cache is not None:
            self._watch("hstu_cache_bytes", "Histories kept", lambda: cache.num_bytes)
            self._watch("hstu_cache_users", "Users whose history is kept", lambda: len(cache))
            for name in ("hits", "misses", "evictions"):
                self._watch(f"hstu_cache_{name}", f"Cache {name} so far", lambda n=name: getattr(cache.statistics, n))  # type: ignore[misc]

    def watch_line(self, pending: Callable[[], int]) -> None:
        """Shows how many requests wait."""
        self._watch("hstu_pending_requests", "Requests that wait", pending)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts an answer."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, jobs: int, seconds: float) -> None:
        """Counts a batch."""
        self._batch_jobs.observe(jobs)
        self._batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        text: bytes = generate_latest(self._registry)
        return text

    def _watch(self, name: str, summary: str, value: Callable[[], float]) -> None:
        Gauge(name, summary, registry=self._registry).set_function(value)
