"""Several tenants in one load test: each its key and its pace, and a table that says what each of them got.

Knows nothing of how requests are sent.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from cluster.loadtest_report import Record, Slo, summarize


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How one tenant sends: closed loop with `concurrency` requests at once, or open loop with `rate` a second."""

    name: str = ""
    key: str | None = None
    concurrency: int = 1
    rate: float | None = None


def read_pace(text: str) -> Pace:
    """NAME=KEY:CONCURRENCY or NAME=KEY:RATE/s. Raises ArgumentTypeError."""
    name, _, rest = text.partition("=")
    key, _, pace = rest.rpartition(":")
    is_rate = pace.endswith("/s")
    try:
        value = float(pace.removesuffix("/s")) if is_rate else int(pace)
    except ValueError:
        value = math.nan
    if not (name and key and 0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=KEY:CONCURRENCY or NAME=KEY:RATE/s")
    return (
        Pace(name=name, key=key, rate=value) if is_rate else Pace(name=name, key=key, concurrency=int(value))
    )


def by_tenant(records: Sequence[Record], slo: Slo) -> dict[str, dict[str, Any]]:
    """Each tenant's own summary, in the order of their first requests."""
    names = dict.fromkeys(record.tenant for record in records)
    return {name: summarize([r for r in records if r.tenant == name], slo) for name in names}


def tenants_table(summaries: dict[str, dict[str, Any]]) -> Table:
    """For people."""
    rows = Table(title="By tenant", title_justify="left")
    rows.add_column("tenant")
    for column in (
        "requests",
        "failed",
        "TTFT p50, ms",
        "p99",
        "TPOT p50, ms",
        "output tokens/s",
        "tokens/s",
    ):
        rows.add_column(column, justify="right")
    for name, summary in summaries.items():
        ttft, tpot = summary["ttft_ms"] or {}, summary["tpot_ms"] or {}
        both = summary["input_tokens_per_s"] + summary["output_tokens_per_s"]
        rows.add_row(
            name,
            str(summary["requests"]),
            str(summary["failed"]),
            *(f"{value:.0f}" if value is not None else "-" for value in (ttft.get("p50"), ttft.get("p99"))),
            f"{tpot['p50']:.0f}" if tpot else "-",
            f"{summary['output_tokens_per_s']:.1f}",
            f"{both:.0f}",
        )
    return rows
