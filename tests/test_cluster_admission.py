"""A tenant's limits, the gateway's room and a request's deadline, over real workers and sockets."""

import concurrent.futures
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import httpx
import pytest
from in_process_gateway import ENGINE, Gateway, running_gateway

from cluster.admission import duration
from cluster.config import ClusterConfig, GatewayConfig, TenantConfig
from cluster.key_store import KeyStore, hash_of, id_of
from cluster.ledger import verify
from cluster.limits import TenantLimits
from workers.tiny import write_tiny

LIMITS = {
    "free": TenantLimits(),
    "few": TenantLimits(requests_per_minute=4, tokens_per_minute=10**6),
    "little": TenantLimits(tokens_per_minute=400),
    "open": TenantLimits(tokens_per_minute=60),
    "one": TenantLimits(concurrency=1),
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    write_tiny(folder / "model", num_hidden_layers=2)
    config = ClusterConfig(
        tenants=[TenantConfig(name=name, keys=[hash_of(name)], limits=lim) for name, lim in LIMITS.items()],
        gateway=GatewayConfig(max_request_timeout_s=100.0, request_timeout_s=60.0, max_concurrency=10),
    )
    with running_gateway(folder / "model", folder, config, ENGINE) as running:
        yield running


def _headers(key: str, **more: str) -> dict[str, str]:
    return {
        "authorization": f"Bearer {key}",
        **{name.replace("_", "-"): value for name, value in more.items()},
    }


def _post(gateway: Gateway, key: str, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    body = {"model": "lightship", "prompt": list(range(30, 60)), "max_tokens": 4, "ignore_eos": True, **body}
    sent = _headers(key) | (headers or {})
    return httpx.post(f"{gateway.url}/v1/completions", json=body, headers=sent, timeout=60)


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _settled(gateway: Gateway, request_id: str) -> tuple[Any, ...]:
    """finish, output tokens and amount, once they are written."""
    query = "select finish, output_tokens, amount_nanodollars from settlements where request_id = ?"

    def rows() -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(gateway.ledger.removeprefix("sqlite:///"))) as database:
            return database.execute(query, [request_id]).fetchall()

    _until(lambda: bool(rows()))
    return rows()[0]


def test_a_tenant_without_limits_has_no_such_headers(gateway: Gateway) -> None:
    answer = _post(gateway, "free")
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


def test_requests_a_minute(gateway: Gateway) -> None:
    """Those with a wrong body count too; they are over at once, so that nothing comes back meanwhile."""
    answers = [_post(gateway, "few", prompt="") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [400] * 4 + [429]
    assert [int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers] == [3, 2, 1, 0, 0]
    refused = answers[-1]
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert "requests_per_minute: the limit of 4" in refused.json()["error"]["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 15
    for answer in answers:
        assert answer.headers["x-ratelimit-limit-requests"] == "4"
        assert answer.headers["x-ratelimit-limit-tokens"] == "1000000"
        assert {"x-ratelimit-reset-requests", "x-ratelimit-reset-tokens"} <= set(answer.headers)
    listed = httpx.get(f"{gateway.url}/v1/models", headers=_headers("few"))
    assert (listed.status_code, listed.headers["x-ratelimit-remaining-requests"]) == (200, "0")


def test_tokens_are_reserved_and_corrected(gateway: Gateway) -> None:
    """30 of the prompt and 300 of an answer that ends at its first: what was not used is there again."""
    first = _post(gateway, "little", max_tokens=1, temperature=0, logprobs=0).json()
    stop = httpx.post(
        f"{gateway.url}/tokenize",
        headers=_headers("little"),
        json={"model": "lightship", "prompt": first["choices"][0]["text"]},
    ).json()["tokens"][-1:]
    assert stop

    def left() -> int:
        answer = httpx.get(f"{gateway.url}/v1/models", headers=_headers("little"))
        return int(answer.headers["x-ratelimit-remaining-tokens"])

    before = left()
    answer = _post(gateway, "little", max_tokens=300, temperature=0, stop_token_ids=stop, ignore_eos=False)
    assert (
        int(answer.headers["x-ratelimit-remaining-tokens"]) <= before - 330 + 100
    )  # some came back meanwhile
    used = answer.json()["usage"]["total_tokens"]
    _until(lambda: left() >= min(400, before - used))
    too_much = _post(gateway, "little", max_tokens=380)
    assert too_much.status_code == 429
    assert "tokens_per_minute" in too_much.json()["error"]["message"]
    assert too_much.headers["x-should-retry"] == "false"
    assert "retry-after" not in too_much.headers


def test_an_answer_of_open_length_is_as_long_as_the_limit_allows(gateway: Gateway) -> None:
    """Without max_tokens a chat may fill the context, 3,000 tokens, of which this tenant has 60 a minute."""
    body = {"model": "lightship", "messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True}

    def ask() -> httpx.Response:
        return httpx.post(
            f"{gateway.url}/v1/chat/completions", json=body, headers=_headers("open"), timeout=60
        )

    answer = ask()
    assert answer.status_code == 200
    usage = answer.json()["usage"]
    assert usage["total_tokens"] == 60
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    refused = ask()
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60


@contextmanager
def _cut_short(gateway: Gateway, **more: Any) -> Iterator[httpx.Response]:
    """A stream that has begun and will not end in time, however fast or slow this machine is."""
    body = {
        "model": "lightship",
        "prompt": [31, 32, 33],
        "max_tokens": 2900,
        "ignore_eos": True,
        "stream": True,
    }
    for seconds in (0.5, 1, 2, 4, 8, 16):
        with httpx.stream(
            "POST",
            f"{gateway.url}/v1/completions",
            json=body | more,
            headers=_headers("free", x_request_timeout=str(seconds)),
            timeout=60,
        ) as stream:
            if stream.status_code == 200:
                yield stream
                return
            assert stream.status_code == 504
    raise AssertionError("no first token in 16 s")


class TestDeadline:
    def test_before_the_first_token(self, gateway: Gateway) -> None:
        answer = _post(
            gateway, "free", {"x-request-timeout": "0.05"}, prompt=list(range(20, 200)) * 15, max_tokens=9
        )
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        _until(gateway.cluster.idle)

    @pytest.mark.parametrize("n", [1, 2])
    def test_in_a_stream_that_has_begun(self, gateway: Gateway, n: int) -> None:
        """It is billed for what it has written, and its pages are let go."""
        events = []
        with _cut_short(gateway, n=n) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: {"):
                    events.append(json.loads(line[6:]))
                assert "[DONE]" not in line
        assert events[-1]["error"]["code"] == "deadline_exceeded"
        assert all("error" not in event for event in events[:-1])
        request_id = events[0]["id"]
        finish, output_tokens, amount = _settled(gateway, request_id if n == 1 else f"{request_id}-0")
        assert finish == "cancelled"
        assert output_tokens > 0
        assert amount > 0
        _until(gateway.cluster.idle)

    def test_a_client_that_does_not_read_is_cancelled_too(self, gateway: Gateway) -> None:
        with _cut_short(gateway):
            _until(gateway.cluster.idle)  # while nothing is read here

    def test_one_that_waits_for_its_turn(self, gateway: Gateway) -> None:
        """Its tenant's other requests have filled the workers."""
        long = {"prompt": list(range(20, 200)) * 6, "max_tokens": 20}
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            others = [pool.submit(_post, gateway, "free", seed=seed, **long) for seed in range(4)]
            late = _post(gateway, "free", {"x-request-timeout": "0.02"}, prompt=[50] * 2000)
            assert late.status_code == 504
            assert all(other.result().status_code == 200 for other in others)
        _until(gateway.cluster.idle)

    @pytest.mark.parametrize("wrong", ["0", "-1", "soon", "nan", "inf", "100.5", ""])
    def test_one_that_means_nothing(self, gateway: Gateway, wrong: str) -> None:
        answer = _post(gateway, "free", {"x-request-timeout": wrong})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "x-request-timeout"
        assert "at most 100" in answer.json()["error"]["message"]


def test_requests_at_once(gateway: Gateway) -> None:
    body = {"model": "lightship", "prompt": [51, 52], "max_tokens": 2000, "ignore_eos": True, "stream": True}
    url = f"{gateway.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=_headers("one"), timeout=60) as stream:
        assert stream.status_code == 200
        refused = _post(gateway, "one")
        assert refused.status_code == 429
        assert "concurrency: the limit of 1" in refused.json()["error"]["message"]
        assert refused.headers["retry-after"] == "1"
    _until(lambda: _post(gateway, "one").status_code == 200)
    assert _post(gateway, "one", prompt="").status_code == 400
    assert _post(gateway, "one").status_code == 200, "a refused body gave its place back"


def test_a_flood_leaves_room_for_another_tenant(gateway: Gateway) -> None:
    """Of 10 requests at once a tenant alone gets 8; what goes beyond is told to come back, and another gets in."""
    body = {"model": "lightship", "prompt": [61, 62], "max_tokens": 2500, "ignore_eos": True, "stream": True}
    url = f"{gateway.url}/v1/completions"
    with httpx.Client(timeout=60, headers=_headers("free")) as client:
        streams = [client.send(client.build_request("POST", url, json=body), stream=True) for _ in range(8)]
        assert [stream.status_code for stream in streams] == [200] * 8
        ninth = _post(gateway, "free")
        assert (ninth.status_code, ninth.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "retry-after" in ninth.headers
        assert _post(gateway, "one").status_code == 200
        for stream in streams:
            stream.close()
    _until(gateway.cluster.idle)
    assert _post(gateway, "free").status_code == 200


def test_a_flood_does_not_decide_when_another_tenant_is_read(gateway: Gateway) -> None:
    """Eight prompts of one tenant are waiting when another's comes: it is read after those under way and one more."""
    finished = []

    def ask(key: str, number: int) -> None:
        prompt = [20 + (7 * number + i) % 200 for i in range(600)]
        assert _post(gateway, key, prompt=prompt, max_tokens=1).status_code == 200
        finished.append(key)

    def in_progress() -> int:
        state = httpx.get(f"{gateway.url}/console/state", headers=_headers("free")).json()
        return int(state["requests_in_progress"])

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        flood = [pool.submit(ask, "free", number) for number in range(8)]
        _until(lambda: len(finished) + in_progress() == 8)  # the first may be through before the last is sent
        before = len(finished)
        pool.submit(ask, "one", 100).result()
        ahead = finished.index("one") - before
        for asked in flood:
            asked.result()
    assert before <= 3, "too few are waiting to tell"
    assert ahead <= 4


def test_a_key_made_and_revoked_while_the_service_runs(gateway: Gateway) -> None:
    store = KeyStore(gateway.ledger)
    key = store.make("new")
    _until(lambda: _post(gateway, key).status_code == 200)
    store.revoke(id_of(hash_of(key)))
    _until(lambda: _post(gateway, key).status_code == 401)
    store.close()


def test_nothing_is_left_open(gateway: Gateway) -> None:
    _until(gateway.cluster.idle)
    _until(lambda: not verify(gateway.ledger).unsettled)
    assert verify(gateway.ledger).bad is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (1, "1s"),
        (7.66, "7.66s"),
        (59.5, "59.5s"),
        (360, "6m0s"),
    ],
)
def test_durations_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text
