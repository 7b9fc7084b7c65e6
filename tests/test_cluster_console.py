"""The console's data and files over HTTP: whose requests are shown to whom, and what the page may load."""

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from in_process_gateway import Gateway, running_gateway

from cluster.config import ClusterConfig, TenantConfig
from workers.tiny import write_tiny

KEYS = {"alpha": "key-of-alpha", "beta": "key-of-beta"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def gateway(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    tenants = [
        TenantConfig(name=name, keys=[hashlib.sha256(key.encode()).hexdigest()]) for name, key in KEYS.items()
    ]
    folder = tmp_path_factory.mktemp("gateway")
    with running_gateway(model, folder, ClusterConfig(tenants=tenants)) as running:
        yield running


def _headers(tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[tenant]}"}


def _state(gateway: Gateway, tenant: str) -> dict[str, Any]:
    answer = httpx.get(f"{gateway.url}/console/state", headers=_headers(tenant), timeout=10)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    state: dict[str, Any] = answer.json()
    return state


def _complete(gateway: Gateway, tenant: str, seed: int, **more: Any) -> dict[str, Any]:
    body = {"model": "lightship", "prompt": [20 + seed] * 130, "max_tokens": 5, "ignore_eos": True, **more}
    answer = httpx.post(f"{gateway.url}/v1/completions", json=body, headers=_headers(tenant), timeout=60)
    reply: dict[str, Any] = answer.json()
    return reply


def test_a_tenant_sees_its_own_requests_and_every_worker(gateway: Gateway) -> None:
    mine = [_complete(gateway, "alpha", 1) for _ in range(2)]
    theirs = _complete(gateway, "beta", 2)
    alpha, beta = _state(gateway, "alpha"), _state(gateway, "beta")
    assert [request["id"] for request in alpha["requests"]] == [reply["id"] for reply in reversed(mine)]
    assert [request["id"] for request in beta["requests"]] == [theirs["id"]]
    assert (alpha["tenant"], alpha["output_tokens"]) == ("alpha", 10)
    assert (beta["tenant"], beta["output_tokens"]) == ("beta", 5)
    assert "beta" not in json.dumps(alpha)
    newest = alpha["requests"][0]
    assert (newest["prompt_tokens"], newest["hit_tokens"], newest["output_tokens"]) == (130, 128, 5)
    assert newest["cost"] == mine[1]["usage"]["cost"]
    assert newest["finish"] == "length"
    assert newest["workers"] == ["prefill-0", "decode-0"]
    assert newest["phases"]["first_token"] == mine[1]["timing"]["first_token"]
    assert newest["phases"]["first_token"] < newest["phases"]["total"]
    for state in (alpha, beta):
        assert state["ready"]
        assert [(w["worker"], w["role"], w["alive"], w["pairs"], w["proven"]) for w in state["workers"]] == [
            ("decode-0", "decode", True, 1, 1),
            ("prefill-0", "prefill", True, 1, 1),
        ]


def test_a_request_is_shown_while_it_runs(gateway: Gateway) -> None:
    before = _state(gateway, "alpha")["output_tokens"]
    done = threading.Event()

    def run() -> None:
        _complete(gateway, "alpha", 3, max_tokens=80)
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    seen = []
    while not done.wait(0.02):
        state = _state(gateway, "alpha")
        for request in state["requests"][:1]:
            if request["finish"] is None:
                seen.append(request)
                assert state["requests_in_progress"] == 1
                assert not any(other["finish"] is None for other in _state(gateway, "beta")["requests"])
    thread.join()
    written = [request["output_tokens"] for request in seen]
    assert written == sorted(written)
    assert any(0 < tokens < 80 for tokens in written)
    assert all(request["cost"] is None and request["ended_at"] is None for request in seen)
    state = _state(gateway, "alpha")
    assert state["output_tokens"] == before + 80
    assert (state["requests_in_progress"], state["queued_tokens"]) == (0, 0)
    assert sum(worker["cached_pages"] for worker in state["workers"]) > 0


def test_only_the_last_requests_are_kept(gateway: Gateway) -> None:
    for number in range(3):
        _complete(gateway, "beta", 4, prompt=[[30 + number]] * 20, max_tokens=1)
    requests = _state(gateway, "beta")["requests"]
    assert len(requests) == 50
    assert len({request["id"] for request in requests}) == 50


def test_without_a_key_nothing_is_shown(gateway: Gateway) -> None:
    assert httpx.get(f"{gateway.url}/console/state", timeout=10).status_code == 401
    wrong = httpx.get(f"{gateway.url}/console/state", headers={"authorization": "Bearer no"}, timeout=10)
    assert wrong.status_code == 401


def test_the_page_is_three_files_that_load_nothing_from_elsewhere(gateway: Gateway) -> None:
    for path, media_type in (
        ("/", "text/html"),
        ("/console.css", "text/css"),
        ("/console.js", "text/javascript"),
    ):
        answer = httpx.get(gateway.url + path, timeout=10)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(media_type)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert "innerHTML" not in answer.text
        assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in answer.text


def test_a_cluster_without_workers_has_a_picture_too(model: Path, tmp_path: Path) -> None:
    with running_gateway(model, tmp_path, each=0) as gateway:
        state = httpx.get(f"{gateway.url}/console/state", timeout=10).json()
        assert (state["ready"], state["workers"], state["requests"]) == (False, [], [])
        assert state["tenant"] == "default"
