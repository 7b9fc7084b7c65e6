"""Every metric that Lightship exports: its name, unit, labels, buckets and meaning. Knows nothing of when they are counted.

Names follow vLLM's where it has the metric, with `lightship_` in front; counters end in `_total`, as Prometheus wants it. Times are
seconds; a page is 64 tokens. docs/metrics.md is this file as a table: `python -m cluster.metric_names`.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from workers.messages import Load

PREFIX = "lightship_"
Kind = Literal["counter", "gauge", "histogram"]

# A decode step or a shipment: from a GPU's millisecond to a CPU's seconds.
STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Reading a prompt: from a cached one to 128k tokens, for which a single GPU needs most of a minute and CPUs need several.
PROMPT_S = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    320.0,
    640.0,
)
# A whole answer: 64k tokens at 30 ms are half an hour.
ANSWER_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0)
TOKENS = tuple(float(2**power) for power in range(18))  # 1 to 131,072


@dataclass(frozen=True)
class Metric:
    """`name` without PREFIX and without a counter's `_total`."""

    name: str
    kind: Kind
    unit: str
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    of_load: Callable[[Load], float] | None = field(
        default=None, repr=False
    )  # a worker's gauge, from its load frame

    @property
    def exported(self) -> str:
        """The name in a scrape; a histogram's samples add _bucket, _sum and _count."""
        return PREFIX + self.name + ("_total" if self.kind == "counter" else "")


def _seconds(name: str, text: str, buckets: tuple[float, ...]) -> Metric:
    return Metric(f"{name}_seconds", "histogram", "seconds", text, buckets=buckets)


TIME_TO_FIRST_TOKEN = _seconds(
    "time_to_first_token", "the whole body read to the first token sent to the client", PROMPT_S
)
GATEWAY_TIME = _seconds(
    "request_gateway_time",
    "of the time to first token, all but queue and prefill: tokenising, routing, the landing ticket, the ledger's opening, "
    "attempts that failed",
    STEP_S,
)
QUEUE_TIME = _seconds(
    "request_queue_time",
    "of the time to first token: at the gateway's gate, and at the prefill worker before its first step",
    PROMPT_S,
)
PREFILL_TIME = _seconds(
    "request_prefill_time", "of the time to first token: first prefill step to first token", PROMPT_S
)
SHIP_TIME = _seconds(
    "request_ship_time", "first token until all caches had landed at the decode worker", STEP_S
)
FIRST_DECODE_TIME = _seconds(
    "request_first_decode_time",
    "caches landed, or first token if that came later, to the second token: with ship, what its client waits for that",
    STEP_S,
)
DECODE_TIME = _seconds("request_decode_time", "first token to the end of the answer", ANSWER_S)
END_TO_END = _seconds("e2e_request_latency", "the whole body read to the end of the answer", ANSWER_S)
BETWEEN_TOKENS = _seconds("inter_token_latency", "between two tokens of a stream", STEP_S)
TIME_PER_OUTPUT_TOKEN = _seconds(
    "request_time_per_output_token",
    "of an answer: (end - first token) / (output tokens - 1), where there is more than one",
    STEP_S,
)
REQUEST_PROMPT = Metric(
    "request_prompt_tokens",
    "histogram",
    "tokens",
    "prompt tokens of a request that got a first token",
    buckets=TOKENS,
)
REQUEST_OUTPUT = Metric(
    "request_generation_tokens",
    "histogram",
    "tokens",
    "output tokens of a request that got one",
    buckets=TOKENS,
)
IN_PROGRESS = Metric("requests_in_progress", "gauge", "requests", "admitted and not ended")
QUEUED_PROMPT = Metric(
    "queued_prompt_tokens", "gauge", "tokens", "prompt tokens of requests without a first token yet"
)
UNSETTLED = Metric("unsettled_requests", "gauge", "requests", "ended, and not yet settled in the ledger")
READY = Metric(
    "ready", "gauge", "0 or 1", "1 while /ready says yes: a real token has gone through every pair"
)
PAIRS_LINKED = Metric(
    "pairs_linked", "gauge", "pairs", "a prefill and a decode worker, both alive, with a link between them"
)
PAIRS_ROUTABLE = Metric(
    "pairs_routable", "gauge", "pairs", "of them, those through which a real token has gone"
)
PROMPT = Metric("prompt_tokens", "counter", "tokens", "prompt tokens of requests that got a first token")
OUTPUT = Metric("generation_tokens", "counter", "tokens", "output tokens sent to clients")
QUERIES = Metric("prefix_cache_queries", "counter", "tokens", "prompt tokens looked up in the prefix cache")
HITS = Metric("prefix_cache_hits", "counter", "tokens", "prompt tokens billed as cache hits")
SUCCESS = Metric(
    "request_success",
    "counter",
    "requests",
    "answered, or cancelled by the client",
    ("finished_reason",),
)
FAILED = Metric("requests_failed", "counter", "requests", "ended in an error after they were admitted")
REJECTED = Metric(
    "requests_rejected",
    "counter",
    "answers",
    "with an error status, by the class in cluster/errors.py",
    ("reason",),
)
RESUMED = Metric(
    "requests_resumed",
    "counter",
    "times",
    "other workers had to go on with a request whose workers were lost",
)
BILLED = Metric("billed_nanodollars", "counter", "nano-dollars", "charged to a tenant", ("tenant",))

_WORKER = ("worker", "role")


def _usage(load: Load) -> float:
    num_pages = load.free_pages + load.cached_pages + load.held_pages
    return load.held_pages / num_pages if num_pages else 0.0


def _gauge(name: str, unit: str, text: str, of_load: Callable[[Load], float]) -> Metric:
    return Metric(name, "gauge", unit, text, _WORKER, of_load=of_load)


def _count(name: str, unit: str, text: str) -> Metric:
    return Metric(name, "counter", unit, text, _WORKER)


WORKER_GAUGES = (
    _gauge("num_requests_running", "requests", "scheduled", lambda load: load.running),
    _gauge("num_requests_waiting", "requests", "waiting for pages or a turn", lambda load: load.waiting),
    _gauge("queued_tokens", "tokens", "prompt tokens still to be computed", lambda load: load.queued_tokens),
    _gauge("kv_cache_usage_perc", "share, 0 to 1", "of the pages, held by requests", _usage),
    _gauge("free_pages", "pages", "that hold nothing", lambda load: load.free_pages),
    _gauge("cached_pages", "pages", "prefix cache, held by no request", lambda load: load.cached_pages),
    _gauge("held_pages", "pages", "held by requests", lambda load: load.held_pages),
    _gauge(
        "seconds_per_token",
        "seconds",
        "prefill time of one token, smoothed",
        lambda load: load.seconds_per_token,
    ),
    _gauge(
        "step_seconds", "seconds", "one decode step, smoothed; 0 when idle", lambda load: load.step_seconds
    ),
    _gauge(
        "pairs_alive", "pairs", "counterparts it can ship to or receive from", lambda load: len(load.peers)
    ),
    _gauge(
        "draining",
        "0 or 1",
        "takes no more requests, ends those it has, and goes",
        lambda load: load.draining,
    ),
)
# What a worker counts in Load.counters. A restarted worker has another id, so its counters begin anew.
WORKER_COUNTERS = (
    _count("shipments", "shipments", "sent"),
    _count("resent_shipments", "shipments", "sent once more after a refusal"),
    _count("shipped_bytes", "bytes", "of cache pages, sent"),
    _count("shipped_header_bytes", "bytes", "of headers and checksums, sent"),
    _count("shipped_pages", "pages", "sent and accepted"),
    _count("ship_seconds", "seconds", "in which a shipment was under way"),
    _count("landed_bytes", "bytes", "of cache pages, received and published"),
    _count("refused_shipments", "shipments", "refused by epoch, generation or checksum"),
    _count("refused_pages", "pages", "in refused shipments"),
    _count("pairs_made", "links", "made to counterparts"),
    _count("pairs_lost", "links", "lost"),
)
GATEWAY = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
ALL = (*GATEWAY, *WORKER_GAUGES, *WORKER_COUNTERS)


def table() -> str:
    """docs/metrics.md's tables."""
    return "\n".join(
        [*_rows("One gateway", GATEWAY), "", *_rows("Each worker", WORKER_GAUGES + WORKER_COUNTERS), ""]
    )


def _rows(title: str, metrics: tuple[Metric, ...]) -> Iterator[str]:
    yield from (
        f"## {title}",
        "",
        "| metric | kind | unit | labels | what |",
        "| --- | --- | --- | --- | --- |",
    )
    for metric in metrics:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        yield f"| `{metric.exported}` | {metric.kind} | {metric.unit} | {labels} | {metric.text} |"


if __name__ == "__main__":
    sys.stdout.write(table())
