"""Scenarios from the command line against a whole gateway with its ledger: every request's bill is the ledger's."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from in_process_gateway import Gateway, running_gateway
from prometheus_tools import wait_for
from stub_server import DONE, Answer, StubServer, event

from cluster import loadtest_bill, loadtest_trace, scenarios
from cluster.ledger import verify
from cluster.loadtest_bill import compare
from cluster.loadtest_report import Record
from workers.tiny import write_tiny


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    write_tiny(folder / "model", num_hidden_layers=2)
    with running_gateway(folder / "model", folder) as running:
        body = {"model": "lightship", "prompt": [5] * 9, "max_tokens": 1}
        httpx.post(
            f"{running.url}/v1/completions", json=body, timeout=60
        ).raise_for_status()  # now there is a ledger
        yield running


def _run(gateway_url: str, folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """The exit code, the report as JSON and as HTML."""
    files = [folder / "report.json", folder / "report.html"]
    options = ["--url", gateway_url, "--json", str(files[0]), "--html", str(files[1])]
    code = scenarios.main([*arguments, *options])
    return code, json.loads(files[0].read_text()), files[1].read_text()


def _settled_sum(gateway: Gateway) -> int:
    wait_for(lambda: not verify(gateway.ledger).unsettled)
    return verify(gateway.ledger).amount_nanodollars


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data") and not (value or "").startswith("#"):
                self.outside.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += data


def _page(text: str) -> _Page:
    page = _Page()
    page.feed(text)
    return page


def test_a_trace_at_60_times_its_speed_is_billed_to_the_nanodollar(
    gateway: Gateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.jsonl"
    assert (
        scenarios.main(
            ["make-trace", str(trace), "--minutes", "2", "--sessions-per-minute", "5", "--seed", "3"]
        )
        == 0
    )
    entries = loadtest_trace.read(trace)
    assert 8 < len(entries) < 40
    before = _settled_sum(gateway)
    code, report, page = _run(
        gateway.url, tmp_path, "replay", str(trace), "--speed", "60", "--block-tokens", "64",
        "--cancel-rate", "0.25", "--ledger", gateway.ledger, "--slo-ttft-ms", "60000",
    )  # fmt: skip
    summary, bill = report["summary"], report["bill"]
    assert code == 0, summary["errors"]
    assert summary["requests"] == len(entries) == summary["completed"] + summary["cancelled"]
    assert summary["cancelled"] > 0
    assert summary["hit_rate"] > 0.2
    assert summary["ttft_ms"]["p50"] > 0
    assert bill["differences"] == []
    assert bill["replies"] == summary["cost_nanodollars"] > 0
    assert bill["cut_short"] > 0
    assert bill["replies"] + bill["cut_short"] == bill["ledger"]
    assert _settled_sum(gateway) - before == bill["ledger"]
    for record in report["records"]:
        entry = entries[record["index"]]
        due = (entry.timestamp - entries[0].timestamp) / 1000 / 60
        assert record["start_s"] >= due - 0.01
        assert record["input_tokens"] == max(1, round(entry.input_length / 8))
    assert "equal" in capsys.readouterr().out
    parsed = _page(page)
    assert not parsed.outside
    assert parsed.tags.count("svg") == 7
    assert not {"script", "link", "img"} & set(parsed.tags)
    assert f"{summary['cancelled']} cancelled, as planned" in parsed.text
    assert "Share of prompt tokens that were hits" in parsed.text


def test_conversations_find_their_earlier_turns_in_the_cache(gateway: Gateway, tmp_path: Path) -> None:
    code, report, _ = _run(
        gateway.url, tmp_path, "chats", "--users", "2", "--turns", "3", "--system-words", "60", "--turn-words", "20",
        "--output", "6", "--think", "0.05", "--usage",
    )  # fmt: skip
    assert code == 0, report["summary"]["errors"]
    assert report["bill"]["differences"] == []
    assert report["bill"]["ledger"] == report["summary"]["cost_nanodollars"] > 0
    by_user = [[r for r in report["records"] if r["index"] // 3 == user] for user in (0, 1)]
    for turns in by_user:
        lengths = [turn["input_tokens"] for turn in sorted(turns, key=lambda turn: turn["index"])]
        assert lengths == sorted(lengths)
        assert lengths[2] > lengths[0] + 20
        last = max(turns, key=lambda turn: turn["index"])
        assert last["usage"]["prompt_cache_hit_tokens"] >= lengths[1] // 64 * 64 - 64


def test_a_bill_with_what_was_cut_short_is_checked_with_usage_too(gateway: Gateway, tmp_path: Path) -> None:
    code, report, _ = _run(
        gateway.url, tmp_path, "chats", "--users", "3", "--turns", "1", "--system-words", "0", "--turn-words", "5",
        "--output", "12", "--cancel-rate", "1", "--usage",
    )  # fmt: skip
    assert code == 0
    assert report["summary"]["cancelled"] == 3
    bill = report["bill"]
    assert (bill["replies"], bill["differences"]) == (0, [])
    assert bill["cut_short"] == bill["ledger"] > 0


def _stub(path: str, body: dict[str, Any]) -> Answer:
    """A server whose time to first token is as long as it is busy."""
    usage = {
        "prompt_tokens": len(body["prompt"]),
        "completion_tokens": body["max_tokens"],
        "prompt_cache_hit_tokens": 0,
        "prompt_cache_miss_tokens": len(body["prompt"]),
        "cost": "0.000000007",
        "cost_nanodollars": 7,
    }
    yield from (event(choices=[{"text": "x", "finish_reason": None}]) for _ in range(body["max_tokens"]))
    yield event(choices=[], usage=usage)
    yield DONE


def test_a_sweep_measures_rates_until_the_promise_breaks(tmp_path: Path) -> None:
    with StubServer(_stub).running() as server:
        keeps = ("sweep", "--from", "20", "--to", "80", "--step", "0.2", "--input", "9", "--output", "2")
        code, report, page = _run(server.url, tmp_path, *keeps, "--slo-ttft-ms", "60000")
        assert code == 0
        assert [step["rate"] for step in report["steps"]] == [20, 40, 80]
        assert report["knee"] == 80
        assert _page(page).tags.count("svg") == 8
        code, report, page = _run(server.url, tmp_path, *keeps, "--slo-ttft-ms", "0.000001")
    assert code == 1
    assert [step["rate"] for step in report["steps"]] == [20]
    assert "not even the lowest rate" in page


def test_kills_are_part_of_the_report(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with StubServer(_stub).running() as server:
        sweep = (
            "sweep",
            "--from",
            "5",
            "--to",
            "5",
            "--step",
            "0.5",
            "--input",
            "9",
            "--output",
            "2",
            "--slo-ttft-ms",
            "60000",
        )
        code, report, page = _run(server.url, tmp_path, *sweep, "--kill", f"0:{process.pid}")
    assert process.wait(20) == -9
    assert code == 0
    assert [(kill["pid"], kill["reason"]) for kill in report["kills"]] == [(process.pid, None)]
    assert "<h2>Kills</h2>" in page


def _record(number: int, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "index": number,
        "client_id": f"load-{number}",
        "start_s": 0.0,
        "input_tokens": 100,
        "output_tokens": 5,
        "usage": {"cost": "0.000000009", "cost_nanodollars": 9},
    }
    return Record(**fields | changes)


def _row(number: int, **changes: Any) -> dict[str, Any]:
    row = {"client_id": f"load-{number}", "amount": 9, "finish": "length", "output_tokens": 5}
    return row | {"hit_tokens": 64, "miss_tokens": 36} | changes


def test_a_bill_that_is_the_ledgers() -> None:
    records = [_record(0), _record(1, cancelled=True, usage=None), _record(2, error="timeout", usage=None)]
    rows = [_row(0), _row(1, amount=4, output_tokens=2, finish="cancelled"), _row(2, amount=3)]
    bill = compare(rows, records)
    assert bill.holds
    assert (bill.replies, bill.cut_short, bill.ledger) == (9, 7, 16)
    assert compare(rows[:2], records).holds, "what failed may never have been opened"
    assert "equal" in bill.sentence()


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([_row(0, amount=8)], "its reply said 9"),
        ([_row(0, output_tokens=4)], "its reply said 9"),
        ([_row(0, amount=None)], "not settled"),
        ([], "not in the ledger"),
        ([_row(0), _row(0)], "twice"),
        ([_row(0), _row(7)], "never sent"),
    ],
)
def test_a_bill_that_is_not_the_ledgers(rows: list[dict[str, Any]], sentence: str) -> None:
    bill = compare(rows, [_record(0)])
    assert not bill.holds
    assert sentence in "; ".join(bill.differences)
    assert "NOT EQUAL" in bill.sentence()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [(_row(0, miss_tokens=37), "its prompt had 100"), (_row(0, output_tokens=6), "more than were asked for")],
)
def test_a_cancelled_request_has_bounds_too(row: dict[str, Any], sentence: str) -> None:
    bill = compare([row], [_record(0, cancelled=True, usage=None)])
    assert sentence in "; ".join(bill.differences)


def test_a_cost_in_dollars_that_is_another_than_in_nanodollars_is_an_error() -> None:
    with pytest.raises(ValueError, match="cost '0.1' is not 9"):
        compare([_row(0)], [_record(0, usage={"cost": "0.1", "cost_nanodollars": 9})])


def test_charges_that_differ_make_the_run_fail(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loadtest_bill, "SETTLE_S", 0.0)
    real = loadtest_bill._rows

    def dearer(url: str, prefix: str) -> list[dict[str, Any]]:
        return [row | {"amount": (row["amount"] or 0) + 1} for row in real(url, prefix)]

    monkeypatch.setattr(loadtest_bill, "_rows", dearer)
    one = (
        "chats",
        "--users",
        "1",
        "--turns",
        "1",
        "--system-words",
        "0",
        "--turn-words",
        "5",
        "--output",
        "2",
    )
    code, report, page = _run(gateway.url, tmp_path, *one, "--ledger", gateway.ledger)
    assert code == 1
    assert report["bill"]["differences"]
    assert "NOT EQUAL" in page


@pytest.mark.parametrize(
    "arguments",
    ["", "replay", "sweep", "sweep --slo-ttft-ms 5 --from 9 --to 8", "chats --usage --ledger x", "chats --kill 5",
     "chats --cancel-rate 2", "replay x --speed 0", "make-trace x --turns 0.5"],
)  # fmt: skip
def test_wrong_options_are_refused(arguments: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        scenarios.main(arguments.split())


def test_what_cannot_begin_says_why(
    gateway: Gateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "long.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 512, "output_length": 4000, "hash_ids": [1]}\n')
    assert scenarios.main(["replay", str(trace), "--url", gateway.url]) == 1
    assert scenarios.main(["replay", str(tmp_path / "none"), "--url", gateway.url]) == 1
    assert scenarios.main(["chats", "--url", "http://127.0.0.1:9"]) == 1
    words = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "4512 tokens with its answer, but the model takes 3000" in words
    assert "No such file" in words
    assert httpx.get(f"{gateway.url}/health").status_code == 200
