import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_server import DONE, Answer, StubServer, event

from cluster import loadtest
from cluster.loadtest import Plan
from cluster.loadtest_report import Record, Slo, statistics, summarize

HIT = 64


def _usage(body: dict[str, Any], **changes: int) -> dict[str, Any]:
    num_prompt = len(body["prompt"])
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": body["max_tokens"],
        "prompt_cache_hit_tokens": HIT,
        "prompt_cache_miss_tokens": num_prompt - HIT,
        "cost_nanodollars": 1000,
    } | changes


def _stream(body: dict[str, Any], usage: dict[str, Any]) -> Iterator[bytes]:
    for number in range(body["max_tokens"]):
        yield event(choices=[{"text": "\u2028" if number else "", "finish_reason": None}], usage=None)
    yield event(choices=[{"text": "", "finish_reason": "length"}], usage=None)
    yield event(
        choices=[], usage=usage, timing={"queue": 0.0, "prefill": 0.0, "ship": 0.0, "first_token": 0.0}
    )
    yield DONE


def _well(path: str, body: dict[str, Any]) -> Answer:
    assert path == "/v1/completions"
    return _stream(body, _usage(body))


def _run(
    capsys: pytest.CaptureFixture[str], server: StubServer, *arguments: str
) -> tuple[int, dict[str, Any], str]:
    code = loadtest.main(["--url", server.url, "--input", "100:200", "--output", "3", *arguments])
    out = capsys.readouterr().out
    return code, json.loads(out.splitlines()[-1]), out


def test_several_tenants_each_at_its_pace(capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer(_well).running() as server:
        code, summary, out = _run(
            capsys, server, "--requests", "4", "--warmup", "1", "--tenant", "flood=key:one:3", "--tenant", "light=two:50/s"
        )  # fmt: skip
    assert code == 0
    assert sorted(server.keys) == ["Bearer key:one"] * 5 + ["Bearer two"] * 5
    assert (summary["requests"], list(summary["tenants"])) == (8, ["flood", "light"])
    for of_one in summary["tenants"].values():
        assert (of_one["completed"], of_one["failed"], of_one["output_tokens"]) == (4, 0, 12)
    assert "By tenant" in out
    prompts = [tuple(body["prompt"]) for body in server.seen]
    assert len(set(prompts)) == len(prompts), "no tenant sends another's prompts"


@pytest.mark.parametrize(
    "wrong", ["a", "a=b", "a=b:0", "a=b:x", "=b:1", "a=:1", "a=b:-1/s", "a=b:1.5", "a=b:inf/s"]
)
def test_a_pace_that_means_nothing(capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    with pytest.raises(SystemExit):
        loadtest.main(["--tenant", wrong])
    assert "is not NAME=KEY:CONCURRENCY or NAME=KEY:RATE/s" in " ".join(capsys.readouterr().err.split())


def test_a_closed_loop_from_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = [tmp_path / "report.json", tmp_path / "plot.png"]
    with StubServer(_well).running() as server:
        code, summary, out = _run(
            capsys, server, "--concurrency", "3", "--requests", "12", "--warmup", "1", "--seed", "5",
            "--slo-ttft-ms", "60000", "--slo-tpot-ms", "0.000001", "--api-key", "secret",
            "--json", str(files[0]), "--plot", str(files[1]),
        )  # fmt: skip
    assert code == 0
    assert len(server.seen) == 13
    assert set(server.keys) == {"Bearer secret"}
    measured = server.seen[1:]
    assert all(
        body["ignore_eos"] and body["max_tokens"] == 3 and body["model"] == "stub" for body in measured
    )
    assert all(100 <= id < 300 for body in measured for id in body["prompt"])  # the middle of 400
    assert (summary["requests"], summary["completed"], summary["failed"]) == (12, 12, 0)
    assert summary["input_tokens"] == sum(len(body["prompt"]) for body in measured)
    assert summary["output_tokens"] == 36
    assert summary["hit_tokens"] == 12 * HIT
    assert summary["cost_nanodollars"] == 12_000
    assert 1 <= summary["peak_concurrency"] <= 3
    assert summary["slo_attainment"] == 0
    assert summary["seed"] == 5
    assert summary["added_share_of_ttft"] == 1
    assert "$0.000012000" in out
    report = json.loads(files[0].read_text())
    assert [len(record["chunks_s"]) for record in report["requests"]] == [3] * 12
    assert report["settings"]["input_tokens"] == [100, 200]
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_an_open_loop_sends_until_its_time_is_over(capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer(_well).running() as server:
        code, summary, _ = _run(capsys, server, "--rate", "40", "--duration", "0.5", "--seed", "1")
        few, limited, _ = _run(capsys, server, "--rate", "40", "--requests", "4", "--duration", "60")
    assert (code, few) == (0, 0)
    assert 5 <= summary["completed"] <= 50  # 20 on average
    assert limited["requests"] == 4


def test_a_closed_loop_ends_with_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer(_well).running() as server:
        _, summary, _ = _run(capsys, server, "--concurrency", "1", "--duration", "0.2", "--warmup", "0")
    assert summary["completed"] >= 1
    assert len(server.seen) == summary["completed"]


BAD: dict[str, Any] = {
    "HTTP 429: slow down": lambda body: (429, b'{"error": {"message": "slow down"}}'),
    "HTTP 502: <html>": lambda body: (502, b"<html>"),
    "in the stream: lost": lambda body: iter([event(error={"message": "lost"}), DONE]),
    "the stream was cut": lambda body: iter([*_stream(body, _usage(body))][:-1]),
    "no usage": lambda body: iter([DONE]),
    "not JSON": lambda body: iter([b"data: oops\n\n"]),
    "wrong number of output tokens": lambda body: _stream(body, _usage(body, completion_tokens=2)),
    "wrong number of prompt tokens": lambda body: _stream(body, _usage(body, prompt_tokens=2)),
    "hit and miss tokens are not the prompt": lambda body: _stream(
        body, _usage(body, prompt_cache_hit_tokens=0)
    ),
}


@pytest.mark.parametrize("error", BAD)
def test_failures_are_counted_by_kind_and_decide_the_exit_code(
    capsys: pytest.CaptureFixture[str], error: str
) -> None:
    def answer(path: str, body: dict[str, Any]) -> Answer:
        reply: Answer = _well(path, body) if body["seed"] % 2 else BAD[error](body)
        return reply

    with StubServer(answer).running() as server:
        code, summary, _ = _run(capsys, server, "--requests", "4", "--concurrency", "1", "--warmup", "0")
    assert code == 1
    assert (summary["completed"], summary["errors"]) == (2, {error: 2})


def test_a_server_that_is_not_fit_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer(lambda path, body: (503, b"away")).running() as server:
        assert loadtest.main(["--url", server.url]) == 1
        assert "HTTP 503" in capsys.readouterr().err
        assert loadtest.main(["--url", server.url, "--model", "other"]) == 1
        assert "no model 'other', only stub" in capsys.readouterr().err
    assert loadtest.main(["--url", server.url]) == 1
    assert loadtest.main(["--url", "nowhere"]) == 1


@pytest.mark.parametrize(
    "arguments",
    ["--rate 0", "--rate inf", "--rate 5 --concurrency 5", "--concurrency 0", "--input 0", "--input 9:3",
     "--output x", "--shared-prefix 1.5", "--duration -1", "--requests 0"],
)  # fmt: skip
def test_wrong_options_are_refused(arguments: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        loadtest.main(arguments.split())


def _plan(**changes: Any) -> Plan:
    fixed = {"model": "m", "vocab_size": 4000, "input_tokens": (100, 400), "output_tokens": (5, 9)}
    return Plan(**(fixed | {"shared_prefix": 0.5, "seed": 3} | changes))


def test_a_plan_follows_from_its_seed() -> None:
    bodies = [_plan().body(index) for index in range(20)]
    assert bodies == [_plan().body(index) for index in range(20)]
    assert bodies[0] != _plan(seed=4).body(0)
    assert bodies[0] != _plan().body(0, loadtest.WARM_UP)
    for body, num_input, num_output in bodies:
        request = json.loads(body)
        assert len(request["prompt"]) == num_input
        assert request["max_tokens"] == num_output
    assert len({num_input for _, num_input, _ in bodies}) > 10
    assert {num_output for _, _, num_output in bodies} == {5, 6, 7, 8, 9}


def test_prompts_share_their_beginning_and_nothing_else() -> None:
    first, second = (
        json.loads(_plan(input_tokens=(200, 200)).body(index)[0])["prompt"] for index in range(2)
    )
    assert first[:100] == second[:100]
    assert first[100:110] != second[100:110]
    first, second = (json.loads(_plan(shared_prefix=0).body(index)[0])["prompt"] for index in range(2))
    assert first[:10] != second[:10]
    long, short = (json.loads(_plan(input_tokens=(n, n)).body(0)[0])["prompt"] for n in (400, 100))
    assert long[:50] == short[:50]


def _record(start: float, chunks: list[float], **changes: Any) -> Record:
    num_output = len(chunks)
    return Record(
        **({"index": 0, "start_s": start, "input_tokens": 100, "output_tokens": num_output, "chunks_s": chunks,
            "end_s": chunks[-1], "timing": {"queue": 0.25, "prefill": 0.5}} | changes)
    )  # fmt: skip


def test_the_definitions() -> None:
    records = [
        _record(0.0, [1.0, 1.5, 3.0], usage={"prompt_cache_hit_tokens": 64, "cost_nanodollars": 7}),
        _record(2.0, [4.0]),
        _record(2.5, [5.0], error="timeout"),
    ]
    summary = summarize(records, Slo(ttft_ms=1000, tpot_ms=1000))
    assert (summary["requests"], summary["failed"], summary["errors"]) == (3, 1, {"timeout": 1})
    assert summary["seconds"] == 5
    assert summary["peak_concurrency"] == 3
    assert summary["requests_per_s"] == 2 / 5
    assert summary["input_tokens_per_s"] == 200 / 5
    assert summary["output_tokens_per_s"] == 4 / 5
    assert summary["hit_rate"] == 64 / 200
    assert summary["cost_nanodollars"] == 7
    assert summary["ttft_ms"]["mean"] == 1500
    assert summary["tpot_ms"]["p50"] == 1000  # of the first only: (3 - 1) / 2
    assert (summary["itl_ms"]["p50"], summary["itl_ms"]["max"]) == (1000, 1500)
    assert summary["e2e_ms"]["max"] == 3000
    assert summary["added_ms"]["mean"] == 750
    assert summary["added_share_of_ttft"] == 0.5
    assert summary["goodput_requests_per_s"] == 1 / 5
    assert summary["slo_attainment"] == 1 / 3


def test_no_requests_are_a_report_too() -> None:
    summary = summarize([], Slo())
    assert summary["requests"] == 0
    assert summary["ttft_ms"] is None
    assert statistics([0.001, 0.003]) == pytest.approx(
        {"mean": 2, "p50": 2, "p90": 2.8, "p99": 2.98, "max": 3, "std": 1}
    )
