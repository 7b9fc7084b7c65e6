"""Sends one request of a load test and writes down what came back, and when. Knows nothing of what is sent, or why."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import msgspec

from cluster import client
from cluster.loadtest_report import Record


async def send(
    http: httpx.AsyncClient,
    path: str,
    body: bytes,
    record: Record,
    *,
    now: Callable[[], float],
    timeout_s: float,
    cancel_after: int | None = None,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> None:
    """Fills in `record`, whose start is now. Never raises for what a server does.

    cancel_after: hangs up after so many chunks of text, where the answer is longer.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await _stream(http, path, body, record, now, cancel_after, on_event)
    except TimeoutError:
        record.error = "timeout"
    except httpx.HTTPError as error:
        record.error = type(error).__name__
    except msgspec.DecodeError:
        record.error = "not JSON"
    record.end_s = now()


async def _stream(
    http: httpx.AsyncClient,
    path: str,
    body: bytes,
    record: Record,
    now: Callable[[], float],
    cancel_after: int | None,
    on_event: Callable[[dict[str, Any]], None],
) -> None:
    events = client.Events()
    headers = {} if record.client_id is None else {"x-request-id": record.client_id}
    async with http.stream("POST", path, content=body, headers=headers) as answer:
        if answer.status_code != 200:
            record.error = client.error_text(answer.status_code, await answer.aread())
            return
        async for data in answer.aiter_bytes():
            for event in events.push(data):
                _take(event, record, now)
                on_event(event)
            if cancel_after is not None and len(record.chunks_s) >= cancel_after and not events.done:
                record.cancelled = True
                return
    if record.error is None:
        record.error = record.flaw() if events.done else "the stream was cut"


def _take(event: dict[str, Any], record: Record, now: Callable[[], float]) -> None:
    if "error" in event:
        record.error = f"in the stream: {client.error_message(event)}"
    for choice in event.get("choices", []):
        if choice.get("text") or choice.get("finish_reason") is None:
            record.chunks_s.append(now())
    record.usage = event.get("usage") or record.usage
    record.timing = event.get("timing") or record.timing
