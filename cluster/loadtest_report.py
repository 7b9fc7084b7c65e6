"""What a load test has measured, in numbers, a table and a plot. Knows nothing of how the requests were sent.

For each request: TTFT = first chunk of text - send. E2E = last chunk of text - send. TPOT = (E2E - TTFT) / (output tokens - 1).
ITL = every gap between two chunks, pooled over all requests. These are the definitions of vLLM's `bench serve`. Goodput =
completed requests a second that meet every SLO. Added = TTFT at the client less the workers' own queue and prefill times:
what gateway, Serve and network add.
Latencies are of completed requests only; a request counts as completed when its answer and its bill have the right lengths.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster.prices import dollars

LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_ms": "E2E", "added_ms": "added"}
STATISTICS = ("mean", "p50", "p90", "p99", "max", "std")


@dataclass(kw_only=True)
class Record:
    """One request. Times are seconds since the test began."""

    index: int
    start_s: float
    input_tokens: int  # as sent
    output_tokens: int  # as asked for
    client_id: str | None = None  # as sent, and found again in the ledger
    cancelled: bool = False  # its client hung up, as planned
    end_s: float = 0.0
    chunks_s: list[float] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    timing: dict[str, float] | None = None
    error: str | None = None
    tenant: str = ""  # whose key it was sent with, where there are several

    @property
    def completed(self) -> bool:
        return self.error is None and not self.cancelled

    def flaw(self) -> str | None:
        """What is wrong with an answer that came to its end."""
        usage = self.usage or {}
        hit, miss = usage.get("prompt_cache_hit_tokens", 0), usage.get("prompt_cache_miss_tokens")
        if not self.usage:
            return "no usage"
        if usage["prompt_tokens"] != self.input_tokens:
            return "wrong number of prompt tokens"
        if usage["completion_tokens"] != self.output_tokens:
            return "wrong number of output tokens"
        if miss is not None and hit + miss != self.input_tokens:
            return "hit and miss tokens are not the prompt"
        return None

    @property
    def ttft_s(self) -> float:
        return (self.chunks_s or [self.end_s])[0] - self.start_s

    @property
    def e2e_s(self) -> float:
        return (self.chunks_s or [self.end_s])[-1] - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """None for a single token."""
        gaps = self.output_tokens - 1
        return (self.e2e_s - self.ttft_s) / gaps if gaps else None

    @property
    def added_s(self) -> float | None:
        """None where the server does not say how long its workers took."""
        return self.ttft_s - self.timing["queue"] - self.timing["prefill"] if self.timing else None


@dataclass(frozen=True, kw_only=True)
class Slo:
    """None: no objective."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def met_by(self, record: Record) -> bool:
        slow_start = self.ttft_ms is not None and record.ttft_s * 1e3 > self.ttft_ms
        slow_rest = self.tpot_ms is not None and (record.tpot_s or 0.0) * 1e3 > self.tpot_ms
        return not (slow_start or slow_rest)


def summarize(records: Sequence[Record], slo: Slo) -> dict[str, Any]:
    """Everything that is printed, as JSON values. Rates are over the time from the first send to the last answer."""
    done = [record for record in records if record.completed]
    seconds = max((r.end_s for r in records), default=0.0) - min((r.start_s for r in records), default=0.0)

    def per_second(amount: float) -> float:
        return amount / seconds if seconds else 0.0

    num_input, num_output = sum(r.input_tokens for r in done), sum(r.output_tokens for r in done)
    num_hit = sum(_used(r, "prompt_cache_hit_tokens") for r in done)
    num_good = sum(map(slo.met_by, done))
    num_kept = sum(not r.cancelled for r in records)
    ttft = sum(r.ttft_s for r in done if r.timing)
    return {
        "requests": len(records),
        "completed": len(done),
        "cancelled": sum(r.cancelled for r in records),
        "failed": sum(r.error is not None for r in records),
        "errors": dict(Counter(r.error for r in records if r.error is not None)),
        "seconds": seconds,
        "peak_concurrency": _peak_concurrency(records),
        "requests_per_s": per_second(len(done)),
        "input_tokens_per_s": per_second(num_input),
        "output_tokens_per_s": per_second(num_output),
        "input_tokens": num_input,
        "output_tokens": num_output,
        "hit_tokens": num_hit,
        "hit_rate": num_hit / num_input if num_input else 0.0,
        "cost_nanodollars": sum(_used(r, "cost_nanodollars") for r in done),
        "slo": {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms},
        "goodput_requests_per_s": per_second(num_good),
        "slo_attainment": num_good / num_kept if num_kept else 0.0,
        "added_share_of_ttft": sum(r.added_s or 0.0 for r in done) / ttft if ttft else None,
        **{name: statistics(values) for name, values in latencies(done).items()},
    }


def statistics(values_s: Sequence[float]) -> dict[str, float] | None:
    """Seconds to STATISTICS in milliseconds; None where there are no values."""
    if not values_s:
        return None
    ms = np.asarray(values_s) * 1e3
    p50, p90, p99 = np.percentile(ms, [50, 90, 99]).tolist()
    values = (ms.mean().item(), p50, p90, p99, ms.max().item(), ms.std().item())
    return dict(zip(STATISTICS, values, strict=True))


def table(summary: dict[str, Any]) -> Group:
    """For people."""
    return Group(_figures(summary), _percentiles(summary))


def plot(records: Sequence[Record], path: Path) -> None:
    """Draws distributions and the course of the test into a PNG file."""
    from matplotlib.figure import (
        Figure,
    )  # here: it takes longer to import than all the rest, and few ask for a plot

    done = [record for record in records if record.completed]
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    values_of = latencies(done)
    for axis, name in zip(axes.flat, ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"), strict=False):
        axis.ecdf([value * 1e3 for value in values_of[name]] or [0.0])
        axis.set(title=LATENCIES[name], xlabel="ms", ylabel="share of all", ylim=(0, 1))
        axis.set_xlim(left=0)
    course, throughput = axes.flat[4:]
    course.scatter([r.start_s for r in done], [r.ttft_s * 1e3 for r in done], s=8, label="TTFT")
    failed = [record for record in records if record.error is not None]
    course.scatter(
        [r.start_s for r in failed], [0.0] * len(failed), s=20, marker="x", color="red", label="failed"
    )
    course.set(title="Requests by time of sending", xlabel="s", ylabel="ms")
    course.legend()
    chunks = [time for record in done for time in record.chunks_s]
    counts, edges = np.histogram(chunks, bins=max(1, min(120, round(max(chunks, default=1.0)))))
    throughput.stairs(counts / np.diff(edges), edges, fill=True)
    throughput.set(title="Chunks of text a second", xlabel="s")
    figure.savefig(path, dpi=120)


def latencies(done: Sequence[Record]) -> dict[str, list[float]]:
    """Seconds, by the keys of LATENCIES."""
    return {
        "ttft_ms": [r.ttft_s for r in done],
        "tpot_ms": [r.tpot_s for r in done if r.tpot_s is not None],
        "itl_ms": [gap for r in done for gap in np.diff(r.chunks_s).tolist()],
        "e2e_ms": [r.e2e_s for r in done],
        "added_ms": [r.added_s for r in done if r.added_s is not None],
    }


def _used(record: Record, name: str) -> int:
    return int((record.usage or {}).get(name, 0))


def _peak_concurrency(records: Sequence[Record]) -> int:
    changes = sorted([(r.start_s, 1) for r in records] + [(r.end_s, -1) for r in records])
    return max(np.cumsum([change for _, change in changes], dtype=int).tolist(), default=0)


def _percentiles(summary: dict[str, Any]) -> Table:
    rows = Table(title="Latency, ms", title_justify="left")
    for column in ("", *STATISTICS):
        rows.add_column(column, justify="right")
    for key, name in LATENCIES.items():
        if summary[key] is not None:
            rows.add_row(name, *(f"{summary[key][statistic]:.1f}" for statistic in STATISTICS))
    if summary["added_share_of_ttft"] is not None:
        rows.caption = f"added by gateway and Serve: {summary['added_share_of_ttft']:.1%} of TTFT"
    return rows


def _figures(summary: dict[str, Any]) -> Table:
    rows = Table(title="Load test", title_justify="left", show_header=False)
    rows.add_column(justify="left")
    rows.add_column(justify="right")
    rows.add_row(
        "completed", f"{summary['completed']} of {summary['requests']} in {summary['seconds']:.1f} s"
    )
    if summary["cancelled"]:
        rows.add_row("cancelled, as planned", str(summary["cancelled"]))
    rows.add_row("peak concurrency", str(summary["peak_concurrency"]))
    rows.add_row("requests/s", f"{summary['requests_per_s']:.2f}")
    rows.add_row("input tokens/s", f"{summary['input_tokens_per_s']:.0f}")
    rows.add_row("output tokens/s", f"{summary['output_tokens_per_s']:.0f}")
    if any(summary["slo"].values()):
        good = f"{summary['goodput_requests_per_s']:.2f} requests/s ({summary['slo_attainment']:.1%})"
        rows.add_row("goodput", good)
    rows.add_row("cache hits", f"{summary['hit_rate']:.1%} of {summary['input_tokens']} tokens")
    rows.add_row("billed", dollars(summary["cost_nanodollars"]))
    for error, count in summary["errors"].items():
        rows.add_row(Text(f"failed: {count}", style="red"), Text(error))
    return rows
