"""What the load test and the terminal chat share: options, server-sent events, error texts. Knows only HTTP."""

import argparse
import os
from typing import Any

import httpx
import msgspec

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S = 10.0


class Events:
    """Splits a byte stream into the JSON objects of its server-sent events. Comments and other fields are skipped.

    At newlines only: httpx's own `iter_lines` also splits at characters that may stand inside a JSON string.
    """

    def __init__(self) -> None:
        self._rest = b""
        self.done = False  # "[DONE]" has come: the stream is whole

    def push(self, data: bytes) -> list[dict[str, Any]]:
        """The events that are complete now. Raises msgspec.DecodeError where the server sends no JSON."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        payloads = [line[5:].strip() for line in lines if line.startswith(b"data:")]
        self.done = self.done or b"[DONE]" in payloads
        return [msgspec.json.decode(payload, type=dict) for payload in payloads if payload != b"[DONE]"]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help="of the server, without /v1 (%(default)s)")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="or OPENAI_API_KEY")
    parser.add_argument("--model", help="one of /v1/models; the first of them if left out")


def headers(api_key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def choose_model(models: dict[str, Any], wanted: str | None) -> dict[str, Any]:
    """A model card from the answer of /v1/models. Raises ValueError where the wanted one is not there."""
    cards: list[dict[str, Any]] = models["data"]
    for card in cards:
        if wanted in (None, card["id"]):
            return card
    raise ValueError(f"the server has no model {wanted!r}, only {', '.join(card['id'] for card in cards)}")


def error_text(status: int, body: bytes) -> str:
    """The sentence of an OpenAI-shaped error, or the beginning of whatever came instead."""
    try:
        sentence = error_message(msgspec.json.decode(body))
    except (msgspec.DecodeError, UnicodeDecodeError):
        sentence = body[:200].decode(errors="replace")
    return f"HTTP {status}: {sentence}"


def error_message(event: Any) -> str:
    """The sentence of an OpenAI-shaped error object; servers of other make may send another shape."""
    try:
        return str(event["error"]["message"])
    except (KeyError, TypeError):
        return str(event)[:200]


def timeouts(read_s: float) -> httpx.Timeout:
    return httpx.Timeout(read_s, connect=CONNECT_TIMEOUT_S)
