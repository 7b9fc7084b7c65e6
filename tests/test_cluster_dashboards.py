"""Dashboards and alerts ask only for what a running gateway exports, and a real Prometheus that scrapes it answers every query."""

import itertools
import json
import math
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from in_process_gateway import Gateway, running_gateway
from prometheus_client.parser import text_string_to_metric_families
from prometheus_tools import Prometheus, find, running_prometheus, wait_for

from cluster import metric_names
from cluster.dashboards import BOARDS, FOLDER, board, queries
from workers.tiny import write_tiny

ALERTS = FOLDER.parent / "alerts.yaml"
COURSES = Path(__file__).with_name("alerts_promtool.yaml")
ADDED_BY_SCRAPERS = {"namespace"}
# Quiet where nothing goes wrong: a query of these may answer with nothing.
NEEDS_TROUBLE = {"Error answers"}


def _rules() -> list[dict[str, str]]:
    (group,) = msgspec.yaml.decode(ALERTS.read_bytes())["spec"]["groups"]
    rules: list[dict[str, str]] = group["rules"]
    return rules


EXPRESSIONS = [query for uid in BOARDS for _, query in queries(uid)] + [rule["expr"] for rule in _rules()]


def _write_rules(folder: Path) -> Path:
    """What stands under `spec`, as a plain Prometheus wants it."""
    path = folder / "rules.yaml"
    path.write_bytes(msgspec.yaml.encode(msgspec.yaml.decode(ALERTS.read_bytes())["spec"]))
    return path


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    write_tiny(folder / "model", num_hidden_layers=2)
    with running_gateway(folder / "model", folder) as running:
        yield running


def _numbers(prometheus: Prometheus, query: str) -> list[float]:
    expression = query.replace("$__rate_interval", "1m").replace("$namespace", ".*")
    values = [float(each["value"][1]) for each in prometheus.query(expression)]
    return [value for value in values if math.isfinite(value)]


def _chat(gateway: Gateway, number: int) -> None:
    body = {
        "model": "lightship",
        "prompt": [5] * 150 + [7 + number] * 20,
        "max_tokens": 4,
        "ignore_eos": True,
    }
    httpx.post(f"{gateway.url}/v1/completions", json=body, timeout=60).raise_for_status()


@pytest.fixture(scope="module")
def scrape(gateway: Gateway) -> dict[str, dict[str, set[str]]]:
    """Of each series: its labels and their values."""
    _chat(gateway, 0)
    seen: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(httpx.get(f"{gateway.url}/metrics").text):
        for sample in family.samples:
            labels = seen.setdefault(sample.name, defaultdict(set))
            for label, value in sample.labels.items():
                labels[label].add(value)
    return seen


def test_a_live_scrape_shows_every_metric_of_the_one_file(scrape: dict[str, dict[str, set[str]]]) -> None:
    for metric in metric_names.ALL:
        suffixes = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        for suffix in suffixes:
            labels = set(scrape[metric.exported + suffix]) - {"le"}
            assert labels == set(metric.labels), metric.exported


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_query_asks_only_for_what_a_live_scrape_shows(
    scrape: dict[str, dict[str, set[str]]], expression: str
) -> None:
    series = re.findall(r"(lightship_\w+)(?:\{([^}]*)\})?", expression)
    assert series
    for name, matchers in series:
        assert name in scrape
        for label, values in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
            if label not in ADDED_BY_SCRAPERS:
                assert set(values.split("|")) <= scrape[name][label], f"{name}, {label}"
    known = {label for name, _ in series for label in scrape[name]}
    for grouping in re.findall(r"by \(([^)]*)\)", expression):
        assert {label.strip() for label in grouping.split(",")} <= known


def test_legends_name_labels_that_the_query_keeps() -> None:
    for uid in BOARDS:
        for panel in board(uid)["panels"]:
            for target in panel.get("targets", []):
                for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                    kept = re.findall(r"by \(([^)]*)\)", target["expr"])
                    assert any(label in grouping for grouping in kept), target


@pytest.mark.parametrize("uid", BOARDS)
def test_the_files_are_what_the_module_writes(uid: str) -> None:
    assert json.loads((FOLDER / f"{uid}.json").read_text()) == board(uid), "run python -m cluster.dashboards"


@pytest.mark.parametrize("uid", BOARDS)
def test_panels_lie_beside_each_other_and_not_upon(uid: str) -> None:
    panels = board(uid)["panels"]
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_the_files_are_all_in_the_kustomization() -> None:
    listed = msgspec.yaml.decode((FOLDER.parent / "kustomization.yaml").read_bytes())
    assert listed["resources"] == ["alerts.yaml"]
    assert listed["configMapGenerator"][0]["files"] == [f"dashboards/{uid}.json" for uid in BOARDS]
    assert {path.stem for path in FOLDER.iterdir()} == set(BOARDS)


def test_every_alert_says_what_to_do_and_how_urgent_it_is() -> None:
    names = [rule["alert"] for rule in _rules()]
    assert len(set(names)) == len(names)
    for rule in msgspec.yaml.decode(ALERTS.read_bytes())["spec"]["groups"][0]["rules"]:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_every_alert_fires_when_it_should_and_at_rest_none_does(tmp_path: Path) -> None:
    promtool = find("promtool")
    rules, courses = _write_rules(tmp_path), tmp_path / COURSES.name
    courses.write_bytes(COURSES.read_bytes())
    for command in (["check", "rules", rules], ["test", "rules", courses]):
        run = subprocess.run([promtool, *command], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    untested = [
        rule["alert"] for rule in _rules() if f'alertname="{rule["alert"]}"' not in COURSES.read_text()
    ]
    assert not untested


def test_a_real_prometheus_answers_every_query_of_the_dashboards(gateway: Gateway, tmp_path: Path) -> None:
    rules = _write_rules(tmp_path)
    with running_prometheus(tmp_path, gateway.url.removeprefix("http://"), rules) as prometheus:
        waiting = [item for uid in BOARDS for item in queries(uid) if item[0] not in NEEDS_TROUBLE]
        chats = itertools.count(1)

        def all_answered() -> bool:
            """With a number: neither with nothing nor with NaN."""
            _chat(gateway, next(chats))
            waiting[:] = [item for item in waiting if not _numbers(prometheus, item[1])]
            return not waiting

        wait_for(all_answered, what=waiting)
        (group,) = prometheus.get("/api/v1/rules")["groups"]
        assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in _rules()]
        assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}
        (target,) = prometheus.get("/api/v1/targets")["activeTargets"]
        assert (target["health"], target["lastError"]) == ("up", "")
