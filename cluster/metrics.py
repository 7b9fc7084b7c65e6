"""Every metric that Lightship exports: its name, its unit, what it means and when it is counted. Knows nothing of HTTP.

Names follow vLLM's where it has the metric, with `lightship_` in front. Times are seconds; a page is 64 tokens.
"""

import time
from collections.abc import Callable, Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.errors import ApiError
from cluster.flight import Flight
from cluster.records import Finish
from workers.messages import Load

__all__ = ["CONTENT_TYPE_LATEST", "WORKER_COUNTERS", "WORKER_GAUGES", "Metrics"]

SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)


def _usage(load: Load) -> float:
    num_pages = load.free_pages + load.cached_pages + load.held_pages
    return load.held_pages / num_pages if num_pages else 0.0


WORKER_GAUGES: dict[str, tuple[str, Callable[[Load], float]]] = {
    "num_requests_running": ("requests that are scheduled", lambda load: load.running),
    "num_requests_waiting": ("requests that wait for pages or a turn", lambda load: load.waiting),
    "queued_tokens": ("prompt tokens still to be computed", lambda load: load.queued_tokens),
    "kv_cache_usage_perc": ("share of the pages held by requests, 0 to 1", _usage),
    "free_pages": ("pages that hold nothing", lambda load: load.free_pages),
    "cached_pages": ("pages that are prefix cache and held by no request", lambda load: load.cached_pages),
    "held_pages": ("pages held by requests", lambda load: load.held_pages),
    "seconds_per_token": ("prefill time of one token, smoothed", lambda load: load.seconds_per_token),
    "step_seconds": ("time of one decode step, smoothed", lambda load: load.step_seconds),
    "pairs_alive": ("counterparts it can ship to or receive from", lambda load: len(load.peers)),
}
# What a worker counts in Load.counters. A restarted worker has another id, so its counters begin anew.
WORKER_COUNTERS = {
    "shipments": "shipments sent",
    "resent_shipments": "shipments sent once more after a refusal",
    "shipped_bytes": "bytes of cache pages sent",
    "shipped_header_bytes": "bytes of headers and checksums sent",
    "shipped_pages": "cache pages sent and accepted",
    "ship_seconds": "time in which a shipment was under way",
    "landed_bytes": "bytes of cache pages received and published",
    "refused_shipments": "shipments refused by epoch, generation or checksum",
    "refused_pages": "cache pages in refused shipments",
    "pairs_made": "links made to counterparts",
    "pairs_lost": "links lost",
}


class Metrics:
    """One gateway's metrics, in a registry of their own. `render` is the answer to /metrics."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._registry = registry = CollectorRegistry()
        self._workers = _WorkerCollector()
        self._last_token_at: dict[str, float] = {}
        registry.register(self._workers)

        def seconds(name: str, text: str, buckets: tuple[float, ...] = LONG_S) -> Histogram:
            return Histogram(f"lightship_{name}_seconds", text, buckets=buckets, registry=registry)

        def count(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"lightship_{name}", text, labels, registry=registry)

        self._first_token = seconds("time_to_first_token", "admission to the first token sent to the client")
        self._between_tokens = seconds("inter_token_latency", "between two tokens of a stream", SHORT_S)
        self._end_to_end = seconds("e2e_request_latency", "admission to the end of the answer")
        self._queue = seconds(
            "request_queue_time", "at the gateway and at the prefill worker before the first step"
        )
        self._prefill = seconds("request_prefill_time", "first prefill step to first token")
        self._ship = seconds("request_ship_time", "first token until the caches had landed", SHORT_S)
        self._running = Gauge(
            "lightship_requests_in_progress", "requests admitted and not ended", registry=registry
        )
        self._prompt = count("prompt_tokens", "prompt tokens of requests that got a first token")
        self._output = count("generation_tokens", "output tokens sent to clients")
        self._queries = count("prefix_cache_queries", "prompt tokens looked up in the prefix cache")
        self._hits = count("prefix_cache_hits", "prompt tokens billed as cache hits")
        self._success = count(
            "request_success", "requests answered, or cancelled by the client", "finished_reason"
        )
        self._failed = count("requests_failed", "requests that ended in an error after they were admitted")
        self._rejected = count("requests_rejected", "error answers, by what went wrong", "reason")
        self._resumed = count("requests_resumed", "times other workers had to go on with a request")
        self._billed = count("billed_nanodollars", "amounts charged, in nano-dollars", "tenant")

    def started(self) -> None:
        """A request was admitted. `ended` must follow."""
        self._running.inc()

    def tokens(self, flight: Flight, num_tokens: int) -> None:
        """A request sends new tokens to its client."""
        if not num_tokens:
            return
        now = self._clock()
        last = self._last_token_at.get(flight.id)
        if last is None:
            self._first_token.observe(now - flight.timing.admitted_at)
        else:
            for _ in range(num_tokens):
                self._between_tokens.observe((now - last) / num_tokens)
        self._last_token_at[flight.id] = now
        self._output.inc(num_tokens)

    def ended(self, flight: Flight, finish: Finish, *, tenant: str, nanodollars: int) -> None:
        """A request is over, in whatever way."""
        self._running.dec()
        self._end_to_end.observe(self._clock() - flight.timing.admitted_at)
        self._resumed.inc(flight.restarts)
        if finish == "error":
            self._failed.inc()
        else:
            self._success.labels(finish).inc()
            self._billed.labels(tenant).inc(nanodollars)
        if self._last_token_at.pop(flight.id, None) is not None:
            self._queue.observe(flight.timing.queue)
            self._prefill.observe(flight.timing.prefill)
            self._ship.observe(flight.timing.ship)
            self._prompt.inc(len(flight.prompt))
            self._queries.inc(len(flight.prompt))
            self._hits.inc(flight.num_hit)

    def rejected(self, error: ApiError) -> None:
        """A request was answered with an error status."""
        self._rejected.labels(type(error).__name__).inc()

    def observe_load(self, worker: str, role: str, load: Load) -> None:
        """Keeps the last load frame of a worker, to be exported until `forget`."""
        self._workers.loads[worker] = role, load

    def forget(self, worker: str) -> None:
        """Exports a worker no more. Unknown ones are fine."""
        self._workers.loads.pop(worker, None)

    def render(self) -> bytes:
        """Everything in Prometheus' text format, of type CONTENT_TYPE_LATEST."""
        return generate_latest(self._registry)


class _WorkerCollector(Collector):
    """The last load frame of each worker, as metrics labelled with its id and its role."""

    def __init__(self) -> None:
        self.loads: dict[str, tuple[str, Load]] = {}

    def collect(self) -> Iterator[Metric]:
        labels = ("worker", "role")
        for name, (text, value) in WORKER_GAUGES.items():
            gauge = GaugeMetricFamily(f"lightship_{name}", text, labels=labels)
            for worker, (role, load) in self.loads.items():
                gauge.add_metric((worker, role), value(load))
            yield gauge
        for name, text in WORKER_COUNTERS.items():
            counter = CounterMetricFamily(f"lightship_{name}", text, labels=labels)
            for worker, (role, load) in self.loads.items():
                if name in load.counters:
                    counter.add_metric((worker, role), load.counters[name])
            yield counter
