"""The Grafana dashboards in k8s/monitoring/dashboards: `python -m cluster.dashboards` writes them. Knows nothing of what is running.

Two rules for every query: a worker's series comes from every gateway that sees it, so these are first reduced to one by worker (`_each`);
and what counts is summed over gateways only after `rate`.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from cluster import metric_names as names
from cluster.metric_names import PREFIX, Metric

FOLDER = Path(__file__).resolve().parent.parent / "k8s" / "monitoring" / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS, HEIGHT = 24, 8
SCOPE = 'namespace=~"$namespace"'  # added by whoever scrapes; empty where nobody adds it
RATE = "$__rate_interval"
Unit = Literal["s", "short", "Bps", "percentunit", "reqps", "currencyUSD", "none"]


@dataclass(frozen=True)
class Panel:
    """`queries`: legend to PromQL."""

    title: str
    unit: Unit
    queries: dict[str, str]
    text: str = ""
    kind: Literal["timeseries", "stat"] = "timeseries"
    width: int = 8
    stacked: bool = False
    maximum: float | None = None


def _series(metric: Metric, suffix: str = "", more: str = "") -> str:
    return f"{metric.exported}{suffix}{{{SCOPE}{', ' + more if more else ''}}}"


def _rate(metric: Metric, by: str = "", more: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({_series(metric, more=more)}[{RATE}]))"


def _quantile(metric: Metric, share: float) -> str:
    return f"histogram_quantile({share}, sum by (le) (rate({_series(metric, '_bucket')}[{RATE}])))"


def _mean(metric: Metric) -> str:
    return f"sum (rate({_series(metric, '_sum')}[{RATE}])) / sum (rate({_series(metric, '_count')}[{RATE}]))"


def _quantiles(metric: Metric) -> dict[str, str]:
    return {"p50": _quantile(metric, 0.5), "p90": _quantile(metric, 0.9), "p99": _quantile(metric, 0.99)}


def _worker(name: str) -> Metric:
    (metric,) = (metric for metric in names.WORKER_GAUGES + names.WORKER_COUNTERS if metric.name == name)
    return metric


def _each(name: str, more: str = "") -> str:
    """One series for each worker."""
    metric = _worker(name)
    series = _series(metric, more=more)
    return f"max by (worker, role) ({series if metric.kind == 'gauge' else f'rate({series}[{RATE}])'})"


def _role(name: str, more: str = "") -> str:
    return f"sum by (role) ({_each(name, more)})"


OVERVIEW = (
    ("Now", (
        Panel("Ready", "none", {"": f"min ({_series(names.READY)})"}, "1: a real token has gone through every pair", "stat", 3),
        Panel("Pairs routable", "none", {"": f"min ({_series(names.PAIRS_ROUTABLE)})"}, "", "stat", 3),
        Panel("Requests in progress", "none", {"": f"sum ({_series(names.IN_PROGRESS)})"}, "", "stat", 3),
        Panel("Prompt tokens without a first token", "short", {"": f"sum ({_series(names.QUEUED_PROMPT)})"}, "", "stat", 3),
        Panel("Hit share", "percentunit", {"": f"{_rate(names.HITS)} / {_rate(names.QUERIES)}"}, "of prompt tokens", "stat", 3),
        Panel("TTFT p90", "s", {"": _quantile(names.TIME_TO_FIRST_TOKEN, 0.9)}, "", "stat", 3),
        Panel("Output tokens a second", "short", {"": _rate(names.OUTPUT)}, "", "stat", 3),
        Panel("Billed an hour", "currencyUSD", {"": f"{_rate(names.BILLED)} * 3600 / 1e9"}, "at the present rate", "stat", 3),
    )),
    ("What a client waits for", (
        Panel("Time to first token", "s", _quantiles(names.TIME_TO_FIRST_TOKEN)),
        Panel("Between two tokens", "s", _quantiles(names.BETWEEN_TOKENS)),
        Panel("Whole answer", "s", _quantiles(names.END_TO_END)),
        Panel(
            "Time to first token, its parts", "s",
            {"gateway": _mean(names.GATEWAY_TIME), "queue": _mean(names.QUEUE_TIME), "prefill": _mean(names.PREFILL_TIME)},
            "Means: they add up to the mean time to first token.", stacked=True,
        ),
        Panel(
            "First to second token, its parts", "s",
            {"ship": _mean(names.SHIP_TIME), "first decode": _mean(names.FIRST_DECODE_TIME)},
            "Means: what disaggregation costs.", stacked=True,
        ),
        Panel("Time per output token", "s", _quantiles(names.TIME_PER_OUTPUT_TOKEN)),
    )),
    ("Traffic", (
        Panel(
            "Requests ended", "reqps",
            {"{{finished_reason}}": _rate(names.SUCCESS, "finished_reason"), "failed": _rate(names.FAILED)},
        ),
        Panel("Error answers", "reqps", {"{{reason}}": _rate(names.REJECTED, "reason") + " > 0"}),
        Panel("Taken over from lost workers", "reqps", {"resumed": _rate(names.RESUMED)}),
        Panel("Tokens a second", "short", {"prompt": _rate(names.PROMPT), "of them hits": _rate(names.HITS), "output": _rate(names.OUTPUT)}),
        Panel("Prompt lengths", "short", _quantiles(names.REQUEST_PROMPT)),
        Panel("Answer lengths", "short", _quantiles(names.REQUEST_OUTPUT)),
    )),
    ("Money", (
        Panel("Billed an hour, by tenant", "currencyUSD", {"{{tenant}}": f"{_rate(names.BILLED, 'tenant')} * 3600 / 1e9"}, width=12),
        Panel("Waiting for the ledger", "none", {"requests": f"sum ({_series(names.UNSETTLED)})"}, "ended, and not yet settled", width=12),
    )),
)  # fmt: skip
WORKERS = (
    ("Load", (
        Panel("Prompt tokens queued", "short", {"{{worker}}": _each("queued_tokens", 'role="prefill"')}),
        Panel("Requests scheduled", "none", {"{{worker}}": _each("num_requests_running")}),
        Panel("Requests waiting", "none", {"{{worker}}": _each("num_requests_waiting")}),
        Panel("One decode step", "s", {"{{worker}}": _each("step_seconds", 'role="decode"')}),
        Panel("Prefill of one token", "s", {"{{worker}}": _each("seconds_per_token", 'role="prefill"')}),
        Panel("Pairs alive", "none", {"{{worker}}": _each("pairs_alive")}),
        Panel("Draining", "none", {"{{role}}": f"sum by (role) ({_each('draining')})"}),
    )),
    ("Pages", (
        Panel("Held by requests", "percentunit", {"{{worker}}": _each("kv_cache_usage_perc")}, "share of a worker's pages", maximum=1),
        *(
            Panel(
                f"Pages of the {role} workers", "short",
                {
                    kind: f"sum ({_each(f'{kind}_pages', more)})"
                    for kind, more in ((kind, f'role="{role}"') for kind in ("held", "cached", "free"))
                },
                stacked=True,
            )
            for role in ("prefill", "decode")
        ),
    )),
    ("Shipping", (
        Panel("Shipped", "Bps", {"payload": f"sum ({_each('shipped_bytes')})", "headers": f"sum ({_each('shipped_header_bytes')})"}),
        Panel("Landed", "Bps", {"{{worker}}": _each("landed_bytes")}),
        Panel("Shipping, share of the time", "percentunit", {"{{worker}}": _each("ship_seconds")}, "in which a shipment was under way"),
        Panel("Shipments a second", "short", {"sent": f"sum ({_each('shipments')})", "sent once more": f"sum ({_each('resent_shipments')})"}),
        Panel("Pages a second", "short", {"accepted": f"sum ({_each('shipped_pages')})", "refused": f"sum ({_each('refused_pages')})"}),
        Panel("Shipments refused", "short", {"{{worker}}": _each("refused_shipments")}, "by epoch, generation or checksum"),
        Panel("Links", "short", {"made": f"sum ({_each('pairs_made')})", "lost": f"sum ({_each('pairs_lost')})"}, "a second", width=24),
    )),
)  # fmt: skip
BOARDS = {
    "lightship-overview": ("Lightship: service", OVERVIEW),
    "lightship-workers": ("Lightship: workers and shipping", WORKERS),
}


def board(uid: str) -> dict[str, Any]:
    """One dashboard, as Grafana imports it."""
    title, rows = BOARDS[uid]
    panels: list[dict[str, Any]] = []
    top = 0
    for row, members in rows:
        panels.append(
            {
                "type": "row",
                "title": row,
                "collapsed": False,
                "gridPos": _place(0, top, COLUMNS, 1),
                "panels": [],
            }
        )
        top, left, height = top + 1, 0, 0
        for panel in members:
            if left + panel.width > COLUMNS:
                top, left = top + height, 0
            height = HEIGHT // 2 if panel.kind == "stat" else HEIGHT
            panels.append(_panel(panel) | {"gridPos": _place(left, top, panel.width, height)})
            left += panel.width
        top += height
    for number, panel_json in enumerate(panels, 1):
        panel_json["id"] = number
    return {
        "uid": uid,
        "title": title,
        "tags": ["lightship"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def queries(uid: str) -> list[tuple[str, str]]:
    """(panel's title, PromQL) of all panels of one dashboard."""
    members = [panel for _, row in BOARDS[uid][1] for panel in row]
    return [(panel.title, query) for panel in members for query in panel.queries.values()]


def _place(left: int, top: int, width: int, height: int) -> dict[str, int]:
    return {"x": left, "y": top, "w": width, "h": height}


def _panel(panel: Panel) -> dict[str, Any]:
    stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
    custom = {
        "lineWidth": 1,
        "fillOpacity": 30 if panel.stacked else 8,
        "showPoints": "never",
        "stacking": stacking,
    }
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    options: dict[str, Any] = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    if panel.kind == "timeseries":
        defaults["custom"] = custom
        options = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": DATASOURCE,
            "expr": query,
            "legendFormat": legend,
            "range": True,
        }
        for number, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": targets,
    }


def _variables() -> list[dict[str, Any]]:
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
        {
            "name": "namespace",
            "type": "query",
            "label": "Namespace",
            "datasource": DATASOURCE,
            "query": {"query": f"label_values({PREFIX}ready, namespace)", "refId": "namespace"},
            "refresh": 2,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        },
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.dashboards", description="Writes the Grafana dashboards."
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to (%(default)s)")
    folder: Path = parser.parse_args(argv).folder
    for uid in BOARDS:
        (folder / f"{uid}.json").write_bytes(msgspec.json.format(msgspec.json.encode(board(uid))) + b"\n")


if __name__ == "__main__":
    main()
