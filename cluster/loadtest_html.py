"""A load test's report as one HTML file without outside assets: figures, percentiles, the bill, and plots as inline SVG.

Knows nothing of how the requests were sent.
"""

import html
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.loadtest_bill import Bill
from cluster.loadtest_kill import Killed
from cluster.loadtest_report import LATENCIES, STATISTICS, Record, latencies
from cluster.loadtest_sweep import Step
from cluster.prices import dollars

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #d8dee4; }
th:first-child, td:first-child { text-align: left; } .bad { color: #b3261e; } .good { color: #1a6b36; }
figure { margin: 0; } .plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; }
"""


@dataclass(kw_only=True)
class Report:
    """What is shown. `settings`: by name, in order."""

    title: str
    settings: dict[str, Any]
    summary: dict[str, Any]
    records: Sequence[Record]
    bill: Bill | None = None
    kills: Sequence[Killed] = ()
    steps: Sequence[Step] = ()
    knee: float | None = None
    notes: list[str] = field(default_factory=list)


def render(report: Report) -> str:
    """The whole page."""
    parts = [
        f"<h1>{html.escape(report.title)}</h1>",
        _verdict(report),
        "<h2>Figures</h2>",
        _table((), _figures(report.summary)),
        "<h2>Latency, ms</h2>",
        _table(("", *STATISTICS), _percentiles(report.summary)),
        *_sweep(report),
        *_kills(report.kills),
        *_errors(report.summary["errors"]),
        "<h2>Plots</h2>",
        f'<div class="plots">{"".join(_plots(report))}</div>',
        "<h2>Settings</h2>",
        _table((), [(name, str(value)) for name, value in report.settings.items()]),
        *(f"<p>{html.escape(note)}</p>" for note in report.notes),
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(report.title)}</title><style>{STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _verdict(report: Report) -> str:
    summary = report.summary
    lines = [
        f"{summary['completed']} of {summary['requests']} requests completed in {summary['seconds']:.1f} s"
    ]
    if summary["cancelled"]:
        lines.append(f"{summary['cancelled']} cancelled, as planned")
    sentences = [_marked(", ".join(lines), good=not summary["failed"])]
    if report.bill is not None:
        sentences.append(_marked(f"Bill: {report.bill.sentence()}", good=report.bill.holds))
    return "".join(sentences)


def _marked(text: str, *, good: bool) -> str:
    return f'<p class="{"good" if good else "bad"}">{html.escape(text)}</p>'


def _figures(summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("requests/s", f"{summary['requests_per_s']:.2f}"),
        ("peak concurrency", str(summary["peak_concurrency"])),
        ("input tokens", f"{summary['input_tokens']:,}"),
        ("cache hits", f"{summary['hit_rate']:.1%} of them"),
        ("output tokens", f"{summary['output_tokens']:,}"),
        ("output tokens/s", f"{summary['output_tokens_per_s']:.1f}"),
        ("billed in replies", dollars(summary["cost_nanodollars"])),
    ]
    if any(summary["slo"].values()):
        rows.append(
            (
                "goodput",
                f"{summary['goodput_requests_per_s']:.2f}/s, {summary['slo_attainment']:.1%} of requests",
            )
        )
    return rows


def _percentiles(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name, *(f"{summary[key][statistic]:.1f}" for statistic in STATISTICS))
        for key, name in LATENCIES.items()
        if summary[key] is not None
    ]


def _sweep(report: Report) -> list[str]:
    if not report.steps:
        return []
    rows = [
        (f"{step.rate:.3g}", f"{step.attainment:.1%}")
        for step in sorted(report.steps, key=lambda step: step.rate)
    ]
    knee = (
        "not even the lowest rate kept the promise"
        if report.knee is None
        else f"{report.knee:.3g} requests/s"
    )
    return [
        "<h2>Sweep</h2>",
        f"<p>The knee: {html.escape(knee)}</p>",
        _table(("requests/s", "within the SLO"), rows),
    ]


def _kills(kills: Sequence[Killed]) -> list[str]:
    rows = [(f"{kill.at_s:.1f}", str(kill.pid), kill.reason or "killed") for kill in kills]
    return ["<h2>Kills</h2>", _table(("s", "process", ""), rows)] if rows else []


def _errors(errors: dict[str, int]) -> list[str]:
    return (
        ["<h2>Errors</h2>", _table((), [(error, str(count)) for error, count in errors.items()])]
        if errors
        else []
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return (
        "<table>"
        + (line(header, "th") if header else "")
        + "".join(line(row, "td") for row in rows)
        + "</table>"
    )


def _plots(report: Report) -> list[str]:
    done = [record for record in report.records if record.completed]
    by_name = latencies(done)
    plots: dict[str, Callable[[Axes], None]] = {
        name: lambda axes, values=by_name[key]: _distribution(axes, values)  # type: ignore[misc]
        for key, name in LATENCIES.items()
        if by_name[key] and key != "added_ms"
    }
    plots["Requests by time of sending"] = lambda axes: _course(axes, report)
    plots["Chunks of text a second"] = lambda axes: _throughput(axes, done)
    plots["Share of prompt tokens that were hits"] = lambda axes: _hits(axes, done)
    if report.steps:
        plots["Rate and promise"] = lambda axes: _attainment(axes, report.steps)
    return [_svg(title, draw) for title, draw in plots.items()]


def _distribution(axes: "Axes", values_s: Sequence[float]) -> None:
    axes.ecdf([value * 1e3 for value in values_s])
    axes.set(xlabel="ms", ylabel="share of all", ylim=(0, 1))
    axes.set_xlim(left=0)


def _course(axes: "Axes", report: Report) -> None:
    kinds = {
        "completed": [r for r in report.records if r.completed],
        "cancelled": [r for r in report.records if r.cancelled and r.error is None],
        "failed": [r for r in report.records if r.error is not None],
    }
    for (name, records), marker in zip(kinds.items(), "o^x", strict=True):
        if records:
            axes.scatter(
                [r.start_s for r in records],
                [r.ttft_s * 1e3 for r in records],
                s=9,
                marker=marker,
                label=name,
            )
    for kill in report.kills:
        axes.axvline(kill.at_s, color="#b3261e", linestyle=":")
    axes.set(xlabel="s", ylabel="TTFT, ms")
    if report.records:
        axes.legend(fontsize="small")


def _throughput(axes: "Axes", done: Sequence[Record]) -> None:
    times = [time for record in done for time in record.chunks_s]
    counts, edges = np.histogram(times, bins=max(1, min(120, round(max(times, default=1.0)))))
    axes.stairs(counts / np.diff(edges), edges, fill=True)
    axes.set(xlabel="s")


def _hits(axes: "Axes", done: Sequence[Record]) -> None:
    """Of all prompts so far."""
    ended = sorted(done, key=lambda record: record.end_s)
    hits = np.cumsum([(record.usage or {}).get("prompt_cache_hit_tokens", 0) for record in ended])
    prompts = np.cumsum([record.input_tokens for record in ended])
    axes.plot([record.end_s for record in ended], hits / np.maximum(prompts, 1))
    axes.set(xlabel="s", ylabel="so far", ylim=(0, 1))


def _attainment(axes: "Axes", steps: Sequence[Step]) -> None:
    ordered = sorted(steps, key=lambda step: step.rate)
    axes.plot([step.rate for step in ordered], [step.attainment for step in ordered], marker="o")
    axes.set(xlabel="requests/s", ylabel="within the SLO", ylim=(0, 1.05))


def _svg(title: str, draw: Callable[["Axes"], None]) -> str:
    """A plot as an SVG element, the same bytes for the same data."""
    import matplotlib  # here: it takes longer to import than all the rest
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.6, 3.2), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title, fontsize="medium")
        text = io.StringIO()
        figure.savefig(
            text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return f"<figure>{svg}</figure>"
