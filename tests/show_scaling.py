"""By hand: a service whose decode workers go from 2 to 1 to 2 while streams run. Exit code 0 if not one came out otherwise.

    python tests/show_scaling.py [--drain SECONDS]

Serve scales by itself, by `cluster.scaling`: little load lets one worker go, more load brings it back. Every answer is compared
with what the same request was answered before.
"""

import argparse
import asyncio
import itertools
import json
import random
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from cluster.ledger import verify
from cluster.serve import DEMO_MODEL, Service, prepare

NUM_PROMPTS = 12
NUM_TOKENS = 160  # of each answer
FEW, MANY = 3, 14  # streams at once; a decode worker has places for 8
PHASE_S = 120.0  # at most


@dataclass
class Seen:
    expected: dict[int, str] = field(default_factory=dict)
    answered: int = 0
    failures: list[str] = field(default_factory=list)
    stop: bool = False


def _body(number: int) -> dict[str, Any]:
    generator = random.Random(number)
    prompt = [generator.randrange(20, 270) for _ in range(80 + 10 * number)]
    fixed = {"model": "lightship", "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    return {**fixed, "prompt": prompt, "stream": True, "stream_options": {"include_usage": True}}


async def _answer(client: httpx.AsyncClient, number: int) -> str:
    """The text and, behind it, how many tokens it has."""
    text, usage = "", None
    async with client.stream("POST", "/v1/completions", json=_body(number)) as answer:
        if answer.status_code != 200:
            return f"{answer.status_code}: {(await answer.aread()).decode()}"
        async for line in answer.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                chunk = json.loads(line[6:])
                text += "".join(choice["text"] for choice in chunk.get("choices", []))
                usage = chunk.get("usage") or usage
    return f"{text} ({usage and usage['completion_tokens']} tokens)"


async def _ask_on(client: httpx.AsyncClient, seen: Seen, numbers: Iterator[int]) -> None:
    while not seen.stop:
        number = next(numbers) % NUM_PROMPTS
        try:
            found = await _answer(client, number)
        except httpx.HTTPError as error:
            found = repr(error)
        seen.answered += 1
        if found != seen.expected[number]:
            seen.failures.append(f"prompt {number}: {found!r} instead of {seen.expected[number]!r}")


async def _decode_workers(client: httpx.AsyncClient) -> int:
    workers = (await client.get("/ready")).json()["workers"]
    return sum(worker["role"] == "decode" for worker in workers)


async def _phase(client: httpx.AsyncClient, seen: Seen, streams: int, until: int, started: float) -> None:
    """Asks with so many streams until there are `until` decode workers, and a little longer."""
    seen.stop = False
    numbers = itertools.count()
    asking = [asyncio.create_task(_ask_on(client, seen, numbers)) for _ in range(streams)]
    deadline = time.monotonic() + PHASE_S
    before = -1
    while (count := await _decode_workers(client)) != until or before != until:
        if count != before:
            _say(f"{time.monotonic() - started:6.1f} s  {streams} streams, {count} decode workers")
        before = count
        if time.monotonic() > deadline:
            seen.failures.append(f"{count} decode workers after {PHASE_S:.0f} s, not {until}")
            break
        await asyncio.sleep(0.5)
    _say(f"{time.monotonic() - started:6.1f} s  {streams} streams, {count} decode workers")
    await asyncio.sleep(8.0)
    seen.stop = True
    await asyncio.gather(*asking)


async def _show(url: str) -> Seen:
    seen = Seen()
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        answers = await asyncio.gather(*(_answer(client, number) for number in range(NUM_PROMPTS)))
        seen.expected = dict(enumerate(answers))
        assert all(f"({NUM_TOKENS} tokens)" in text for text in seen.expected.values()), seen.expected
        started = time.monotonic()
        for streams, until in ((FEW, 1), (MANY, 2)):
            await _phase(client, seen, streams, until, started)
        metrics = (await client.get("/metrics")).text
    for line in metrics.splitlines():
        if line.startswith("lightship_") and "resum" in line and "created" not in line:
            _say(line)
    return seen


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drain", type=float, default=60.0, help="decode.drain_s (default: %(default)s)")
    drain_s = parser.parse_args().drain
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        ledger = f"sqlite:///{Path(folder)}/ledger.db"
        console = Console(stderr=True)
        settings = [
            "decode.workers=2",
            f"decode.drain_s={drain_s}",
            "decode.engine.max_running=8",
            "decode.engine.threads=1",
            "prefill.engine.threads=1",
            "scaling.decode={max_workers: 2, share_goal: 0.5, lower_after_s: 5}",
        ]
        overrides = [f"model={DEMO_MODEL}", f"port={port}", f"ledger.url={ledger}", *settings]
        arguments = argparse.Namespace(config=None, set=overrides, model=None, port=None)
        with Service(prepare(arguments, console), console) as service:
            service.wait_ready()
            seen = asyncio.run(_show(f"http://127.0.0.1:{port}"))
        report = verify(ledger)
    _say(f"{seen.answered} answers, {len(seen.failures)} of them failed or other than before")
    _say(f"ledger: {report.records} records, {report.unsettled} open, bad: {report.bad}")
    for failure in seen.failures[:5]:
        _say(failure[:400])
    return 1 if seen.failures or report.bad or report.unsettled else 0


if __name__ == "__main__":
    sys.exit(main())
