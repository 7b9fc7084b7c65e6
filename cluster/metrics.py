"""When each metric is counted, and the answer to /metrics. Names, units and meanings are in `cluster.metric_names`.

Knows nothing of HTTP.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from cluster import metric_names as names
from cluster.errors import ApiError
from cluster.flight import Flight
from cluster.metric_names import PREFIX, WORKER_COUNTERS, WORKER_GAUGES
from cluster.records import Finish
from workers.messages import Load

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

FINISHES: tuple[Finish, ...] = ("stop", "length", "cancelled")


@dataclass
class _Stream:
    """What a client has been sent of one answer."""

    first_at: float
    last_at: float
    num_tokens: int


class Metrics:
    """One gateway's metrics, in a registry of their own. `render` is the answer to /metrics."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._registry = registry = CollectorRegistry()
        self._workers = _WorkerCollector()
        self._streams: dict[str, _Stream] = {}
        registry.register(self._workers)

        def seconds(metric: names.Metric) -> Histogram:
            return Histogram(PREFIX + metric.name, metric.text, buckets=metric.buckets, registry=registry)

        def count(metric: names.Metric) -> Counter:
            return Counter(PREFIX + metric.name, metric.text, metric.labels, registry=registry)

        def gauge(metric: names.Metric) -> Gauge:
            return Gauge(PREFIX + metric.name, metric.text, registry=registry)

        self._first_token = seconds(names.TIME_TO_FIRST_TOKEN)
        self._gateway = seconds(names.GATEWAY_TIME)
        self._queue = seconds(names.QUEUE_TIME)
        self._prefill = seconds(names.PREFILL_TIME)
        self._ship = seconds(names.SHIP_TIME)
        self._first_decode = seconds(names.FIRST_DECODE_TIME)
        self._decode = seconds(names.DECODE_TIME)
        self._end_to_end = seconds(names.END_TO_END)
        self._between_tokens = seconds(names.BETWEEN_TOKENS)
        self._per_token = seconds(names.TIME_PER_OUTPUT_TOKEN)
        self._prompts = seconds(names.REQUEST_PROMPT)
        self._outputs = seconds(names.REQUEST_OUTPUT)
        self._running = gauge(names.IN_PROGRESS)
        self._queued = gauge(names.QUEUED_PROMPT)
        self._unsettled = gauge(names.UNSETTLED)
        self._ready = gauge(names.READY)
        self._linked = gauge(names.PAIRS_LINKED)
        self._routable = gauge(names.PAIRS_ROUTABLE)
        self._prompt = count(names.PROMPT)
        self._output = count(names.OUTPUT)
        self._queries = count(names.QUERIES)
        self._hits = count(names.HITS)
        self._success = count(names.SUCCESS)
        self._failed = count(names.FAILED)
        self._rejected = count(names.REJECTED)
        self._resumed = count(names.RESUMED)
        self._billed = count(names.BILLED)
        for finish in FINISHES:  # a rate needs the zero before the first one
            self._success.labels(finish)
        for kind in _kinds(ApiError):
            self._rejected.labels(kind.__name__)

    def started(self) -> None:
        """A request was admitted. `ended` must follow."""
        self._running.inc()

    def tokens(self, flight: Flight, num_tokens: int) -> None:
        """A request sends new tokens to its client."""
        if not num_tokens:
            return
        now = self._clock()
        self._output.inc(num_tokens)
        stream = self._streams.get(flight.id)
        if stream is None:
            self._streams[flight.id] = _Stream(now, now, num_tokens)
            self._began(flight, now - flight.timing.admitted_at)
            return
        for _ in range(num_tokens):
            self._between_tokens.observe((now - stream.last_at) / num_tokens)
        stream.last_at = now
        stream.num_tokens += num_tokens

    def _began(self, flight: Flight, first_token: float) -> None:
        timing = flight.timing
        self._first_token.observe(first_token)
        self._queue.observe(timing.queue)
        self._prefill.observe(timing.prefill)
        self._gateway.observe(max(0.0, first_token - timing.queue - timing.prefill))
        self._prompts.observe(len(flight.prompt))
        self._prompt.inc(len(flight.prompt))
        self._queries.inc(len(flight.prompt))

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
        stream = self._streams.pop(flight.id, None)
        if stream is not None:
            self._ended_after_tokens(flight, stream)

    def _ended_after_tokens(self, flight: Flight, stream: _Stream) -> None:
        self._outputs.observe(stream.num_tokens)
        self._hits.inc(flight.num_hit)
        if flight.timing.ship is not None:
            self._ship.observe(flight.timing.ship)
        if flight.timing.first_decode is not None:
            self._first_decode.observe(flight.timing.first_decode)
        if stream.num_tokens > 1:
            seconds = stream.last_at - stream.first_at
            self._decode.observe(seconds)
            self._per_token.observe(seconds / (stream.num_tokens - 1))

    def rejected(self, error: ApiError) -> None:
        """A request was answered with an error status."""
        self._rejected.labels(type(error).__name__).inc()

    def observe_gateway(
        self, *, ready: bool, linked: int, routable: int, queued_tokens: int, unsettled: int
    ) -> None:
        """What is so just now: called before each `render`."""
        self._ready.set(ready)
        self._linked.set(linked)
        self._routable.set(routable)
        self._queued.set(queued_tokens)
        self._unsettled.set(unsettled)

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

    def collect(self) -> Iterator[Family]:
        for metric in WORKER_GAUGES:
            assert metric.of_load is not None
            gauge = GaugeMetricFamily(PREFIX + metric.name, metric.text, labels=metric.labels)
            for worker, (role, load) in self.loads.items():
                gauge.add_metric((worker, role), metric.of_load(load))
            yield gauge
        for metric in WORKER_COUNTERS:
            counter = CounterMetricFamily(PREFIX + metric.name, metric.text, labels=metric.labels)
            for worker, (role, load) in self.loads.items():
                if metric.name in load.counters:
                    counter.add_metric((worker, role), load.counters[metric.name])
            yield counter


def _kinds(kind: type[ApiError]) -> Iterator[type[ApiError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from _kinds(narrower)
