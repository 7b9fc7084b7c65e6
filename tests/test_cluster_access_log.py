"""One line for each request, whatever became of it, with the ids that client, log, workers and ledger share."""

import hashlib
import json
import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from in_process_gateway import Gateway, running_gateway

from cluster import access_log
from cluster.access_log import open_access_log, read_client_id
from cluster.config import ClusterConfig, TenantConfig
from cluster.errors import InvalidRequest
from cluster.ledger import verify
from workers.tiny import write_tiny

KEY = "key-of-acme"
SECRET_WORD = "heliotrope"
HEADERS = {"authorization": f"Bearer {KEY}"}


class _Lines(logging.Handler):
    """Everything that is logged, parsed."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())

    def of(self, request_id: str) -> dict[str, Any]:
        """The one line of a request, ours or the client's id; waited for."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            lines = [json.loads(text) for text in self.texts]
            found = [line for line in lines if request_id in (line["id"], line["client_id"])]
            if found:
                (line,) = found
                return line
            time.sleep(0.02)
        raise AssertionError(f"no line of {request_id}")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    write_tiny(folder / "model", num_hidden_layers=2)
    config = ClusterConfig(
        tenants=[TenantConfig(name="acme", keys=[hashlib.sha256(KEY.encode()).hexdigest()])]
    )
    with running_gateway(folder / "model", folder, config) as running:
        yield running


@pytest.fixture
def lines() -> Iterator[_Lines]:
    handler, logger = _Lines(), access_log.log
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def _body(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{SECRET_WORD} " * 40}]
    return {"model": "lightship", "messages": messages, "max_tokens": 6, "ignore_eos": True, **more}


def _ask(gateway: Gateway, headers: dict[str, str] = HEADERS, **more: Any) -> httpx.Response:
    return httpx.post(f"{gateway.url}/v1/chat/completions", json=_body(**more), headers=headers, timeout=60)


def test_a_line_says_what_a_request_came_to(gateway: Gateway, lines: _Lines) -> None:
    answer = _ask(gateway)
    body = answer.json()
    assert answer.headers["x-request-id"] == body["id"]
    line = lines.of(body["id"])
    assert line["client_id"] is None
    assert (line["tenant"], line["key_id"]) == ("acme", hashlib.sha256(KEY.encode()).hexdigest()[:12])
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert (line["finish"], line["error"], line["restarts"]) == ("length", None, 0)
    assert line["prompt_tokens"] == body["usage"]["prompt_tokens"]
    assert line["hit_tokens"] == body["usage"]["prompt_cache_hit_tokens"]
    assert line["output_tokens"] == 6
    assert line["cost"] == body["usage"]["cost"]
    for phase in ("queue", "prefill", "ship", "first_token"):
        assert line[phase] == body["timing"][phase]
    assert line["first_token"] < line["total"]
    assert line["workers"] == ["prefill-0", "decode-0"]
    assert line["time"].endswith("+00:00")
    assert SECRET_WORD not in "".join(lines.texts)


def test_several_choices_are_one_line(gateway: Gateway, lines: _Lines) -> None:
    body = _ask(gateway, n=2, max_tokens=4).json()
    line = lines.of(body["id"])
    assert line["output_tokens"] == 8
    assert line["prompt_tokens"] == body["usage"]["prompt_tokens"]
    assert line["cost"] == body["usage"]["cost"]


def test_a_clients_id_comes_back_and_is_in_the_ledger(gateway: Gateway, lines: _Lines) -> None:
    name = "order/17:" + "~" * 119
    answer = _ask(gateway, HEADERS | {"x-request-id": name})
    ours = answer.json()["id"]
    assert answer.headers.get_list("x-request-id") == [name]
    assert lines.of(name) == lines.of(ours)
    with closing(sqlite3.connect(gateway.ledger.removeprefix("sqlite:///"))) as ledger:
        rows = ledger.execute("SELECT client_id FROM openings WHERE request_id = ?", [ours]).fetchall()
    assert rows == [(name,)]
    assert verify(gateway.ledger).bad is None


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status", "code"),
    [
        ("POST", "/v1/chat/completions", HEADERS, _body(max_tokens=0), 400, "invalid_request_error"),
        ("POST", "/v1/chat/completions", HEADERS, _body(max_tokens=9999), 400, "context_length_exceeded"),
        ("POST", "/v1/chat/completions", {}, _body(), 401, "invalid_api_key"),
        ("POST", "/v1/chat/completions", HEADERS, _body(model="x"), 404, "model_not_found"),
        ("GET", "/v1/chat/completions", HEADERS, None, 405, "method_not_supported"),
        ("POST", "/v1/chat/completions", HEADERS | {"content-type": "a/b"}, _body(), 415, "unsupported_media_type"),
        ("GET", f"/nothing/{'x' * 500}", HEADERS, None, 404, "unknown_url"),
        ("GET", "/", {}, None, 200, None),
        ("GET", "/health", {}, None, 200, None),
        ("GET", "/v1/models", HEADERS, None, 200, None),
    ],
)  # fmt: skip
def test_every_answer_has_the_id_and_a_line(
    gateway: Gateway,
    lines: _Lines,
    method: str,
    path: str,
    headers: dict[str, str],
    body: Any,
    status: int,
    code: str | None,
) -> None:
    name = f"mine-{method}-{status}-{len(path)}"
    answer = httpx.request(
        method, gateway.url + path, json=body, headers=headers | {"x-request-id": name}, timeout=30
    )
    assert answer.status_code == status
    assert answer.headers.get_list("x-request-id") == [name]
    line = lines.of(name)
    assert (line["status"], line["error"]) == (status, code)
    assert path.startswith(line["path"])
    assert len(line["path"]) <= 200
    assert line["finish"] is None
    assert line["cost"] == "0.000000000"
    assert SECRET_WORD not in "".join(lines.texts)
    nameless = httpx.request(method, gateway.url + path, json=body, headers=headers, timeout=30)
    assert lines.of(nameless.headers["x-request-id"])["client_id"] is None


@pytest.mark.parametrize("name", [b"", b"x" * 129, b"two words", "é".encode(), b"tab\tbed"])
def test_an_id_that_no_log_can_show_is_refused(gateway: Gateway, lines: _Lines, name: bytes) -> None:
    answer = httpx.get(f"{gateway.url}/health", headers={b"x-request-id": name}, timeout=10)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-request-id"
    assert lines.of(answer.headers["x-request-id"])["status"] == 400
    with pytest.raises(InvalidRequest, match="1 to 128 visible ASCII characters"):
        read_client_id(name.decode("latin-1"))


def test_a_client_that_leaves_is_logged_with_what_it_got(gateway: Gateway, lines: _Lines) -> None:
    name = "left-early"
    with httpx.stream(
        "POST",
        f"{gateway.url}/v1/chat/completions",
        json=_body(stream=True, max_tokens=2000),
        headers=HEADERS | {"x-request-id": name},
        timeout=60,
    ) as answer:
        assert answer.status_code == 200
        next(answer.iter_raw())
    line = lines.of(name)
    assert (line["status"], line["finish"], line["error"]) == (200, "cancelled", None)
    assert 0 < line["output_tokens"] < 2000
    assert float(line["cost"]) > 0


def test_probes_and_open_consoles_are_no_news(gateway: Gateway, lines: _Lines) -> None:
    access_log.log.setLevel(logging.INFO)
    for path in ("/health", "/metrics", "/console/state"):
        assert httpx.get(gateway.url + path, headers=HEADERS, timeout=10).is_success
    refused = httpx.get(f"{gateway.url}/console/state", timeout=10)
    lines.of(refused.headers["x-request-id"])
    assert len(lines.texts) == 1


def test_lines_go_to_a_file_that_may_be_rotated(tmp_path: Path) -> None:
    logger = access_log.log
    before = logger.handlers, logger.propagate, logger.level
    path = tmp_path / "logs" / "access.jsonl"
    try:
        open_access_log(str(path))
        logger.info("one")
        path.rename(path.with_suffix(".1"))
        logger.info("two")
        assert path.with_suffix(".1").read_text() == "one\n"
        assert path.read_text() == "two\n"
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers, logger.propagate = before[0], before[1]
        logger.setLevel(before[2])
