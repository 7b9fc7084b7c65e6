"""The OpenAPI document against the routes, and bodies made from it against the service."""

from collections.abc import Iterator

import httpx
import msgspec
import pytest
from fuzz import TIMEOUT_S, fuzz
from in_process_gateway import ENGINE, Gateway, running_gateway

from cluster.openapi import document
from cluster.schemas import Limits
from workers.tiny import write_tiny


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    write_tiny(folder / "model", num_hidden_layers=2)
    engine = msgspec.structs.replace(ENGINE, max_context=64)  # a body that names no length gets all there is
    with running_gateway(folder / "model", folder, engine=engine) as running:
        yield running


def test_every_route_is_in_the_document(gateway: Gateway) -> None:
    paths = document("lightship", Limits(max_context=64, vocab_size=512))["paths"]
    for path, methods in paths.items():
        for method in methods:
            answer = httpx.request(method, f"{gateway.url}{path}", timeout=10)
            assert answer.status_code in (200, 400), path
    assert httpx.get(f"{gateway.url}/nothing", timeout=10).status_code == 404
    assert set(paths) == set(gateway.paths)


def test_any_body_gets_an_answer_or_a_named_refusal(gateway: Gateway) -> None:
    with httpx.Client(base_url=gateway.url, timeout=TIMEOUT_S) as client:
        answers = fuzz(client, 48)
    assert answers.total() == 48
    assert sum(count for kind, count in answers.items() if kind.endswith("200")) > 5


def test_headers_of_limits_and_deadlines_are_in_the_document() -> None:
    paths = document("lightship", Limits(max_context=64, vocab_size=512))["paths"]
    chat = paths["/v1/chat/completions"]["post"]
    assert "x-request-timeout" in {parameter["name"] for parameter in chat["parameters"]}
    assert {"429", "503", "504"} <= set(chat["responses"])
    for status in ("200", "429"):
        assert "x-ratelimit-remaining-tokens" in chat["responses"][status]["headers"]
    assert "504" not in paths["/tokenize"]["post"]["responses"]
