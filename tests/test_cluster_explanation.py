"""What a client is told about its request's route: the pairs, their scores, what was found of the prompt, and the times."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from in_process_gateway import Gateway, running_gateway

from cluster.errors import InvalidRequest
from cluster.explanation import is_wanted
from cluster.tenants import DEFAULT, Tenant
from workers.page_hash import page_hashes
from workers.tiny import write_tiny

ASK = {"x-explain-routing": "1"}
PROMPT = list(range(20, 220))


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    write_tiny(folder / "model", num_hidden_layers=2)
    with running_gateway(folder / "model", folder, each=2) as running:
        yield running


def _complete(gateway: Gateway, headers: dict[str, str] = ASK, **body: Any) -> httpx.Response:
    fields = {"model": "lightship", "prompt": PROMPT, "max_tokens": 3, "ignore_eos": True}
    return httpx.post(f"{gateway.url}/v1/completions", json={**fields, **body}, headers=headers, timeout=60)


def _wait_reported(gateway: Gateway) -> None:
    """Until the gateway has heard that a prefill and a decode worker hold the prompt."""
    hashes = page_hashes(Tenant(DEFAULT, "none").namespace, PROMPT)
    deadline = time.monotonic() + 10
    while sorted(gateway.cluster.directory.lookup(hashes).values()) != [3, 3]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _events(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_whole_answer_explains_its_route(gateway: Gateway) -> None:
    before = _complete(gateway).json()
    _wait_reported(gateway)
    answer = _complete(gateway).json()
    (routing,) = answer["routing"]
    (attempt,) = routing["attempts"]
    best = attempt["alternatives"][0]
    assert attempt["id"].startswith(answer["id"] + "#")
    assert attempt["num_pairs"] == len(attempt["alternatives"]) == 4
    assert attempt["failure"] is None
    assert (attempt["prefill"], attempt["decode"]) == (best["prefill"], best["decode"])
    assert (best["prefill"], best["decode"]) == tuple(
        before["routing"][0]["attempts"][0][role] for role in ("prefill", "decode")
    ), "it goes where its prefix is"
    assert best["prefill_hit_tokens"] == best["decode_hit_tokens"] == attempt["hit_tokens"] == 192
    assert answer["usage"]["prompt_cache_hit_tokens"] == 192
    for pair in attempt["alternatives"]:
        parts = pair["queue"] + pair["compute"] + pair["ship"] + pair["decode_step"]
        assert pair["seconds"] == pytest.approx(parts)
        assert pair["seconds"] >= best["seconds"]
    phases = routing["phases"]
    assert 0 < phases["prefill"] <= phases["first_token"] < phases["total"]
    assert phases["first_token"] == answer["timing"]["first_token"]


def test_the_last_event_of_a_stream_explains_it(gateway: Gateway) -> None:
    plain = _events(_complete(gateway, stream=True))
    assert [("routing" in event, len(event["choices"])) for event in plain[-2:]] == [(False, 1), (True, 0)]
    usage = _events(_complete(gateway, stream=True, stream_options={"include_usage": True}))
    assert [("routing" in event, bool(event["usage"])) for event in usage[-2:]] == [
        (False, False),
        (True, True),
    ]


def test_each_choice_has_a_route_of_its_own(gateway: Gateway) -> None:
    answer = _complete(gateway, n=2, prompt=[[20] * 70, [21] * 90]).json()
    assert [routing["index"] for routing in answer["routing"]] == [0, 1, 2, 3]
    ids = [routing["attempts"][0]["id"].partition("#")[0] for routing in answer["routing"]]
    assert ids == [f"{answer['id']}-{index}" for index in range(4)]


def test_who_does_not_ask_is_told_nothing(gateway: Gateway) -> None:
    for headers in ({}, {"x-explain-routing": "0"}):
        assert "routing" not in _complete(gateway, headers).json()
        assert not any("routing" in event for event in _events(_complete(gateway, headers, stream=True)))
    refused = _complete(gateway, {"x-explain-routing": "yes"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "x-explain-routing"


def test_the_header_is_a_switch() -> None:
    assert [is_wanted(header) for header in (None, "0", "1")] == [False, False, True]
    with pytest.raises(InvalidRequest, match="must be 0 or 1, not 'true'"):
        is_wanted("true")
