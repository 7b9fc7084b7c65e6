"""Replies held to a schema by the small model through the real service, while decode workers are killed under them.

python tests/structured_replies.py --replies 200 --kills 4      prints figures; fails unless every reply parses and validates
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jsonschema

ROOT = Path(__file__).resolve().parent.parent
CONCURRENCY = 8
DECODE_WORKERS = 2
READY_S = 150.0
QUESTIONS = [
    "Who is the tester of Lemon Otter?",
    "What is the rate of Keen Hawk?",
    "What is the size of Indigo Adder?",
]

FACT = {
    "type": "object",
    "properties": {
        "service": {"type": "string", "minLength": 3, "maxLength": 16},
        "property": {"enum": ["tester", "rate", "size", "serial"]},
        "value": {
            "anyOf": [{"type": "integer", "minimum": 0, "maximum": 9999}, {"type": "string", "maxLength": 20}]
        },
    },
    "required": ["service", "property", "value"],
    "additionalProperties": False,
}
REPORT = {
    "type": "object",
    "properties": {
        "day": {"type": "string", "format": "date"},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{2,4}$"},
        "sure": {"type": "boolean"},
        "notes": {
            "type": "array",
            "items": {"type": "string", "maxLength": 16},
            "minItems": 1,
            "maxItems": 3,
        },
        "next": {"anyOf": [{"$ref": "#/$defs/step"}, {"type": "null"}]},
    },
    "required": ["day", "code", "sure", "notes"],
    "additionalProperties": False,
    "$defs": {
        "step": {
            "type": "object",
            "properties": {
                "name": {"enum": ["read", "write"]},
                "weight": {"enum": [0, 0.25, 0.5, 1]},
            },
            "required": ["name"],
            "additionalProperties": False,
        }
    },
}
TABLE = {
    "type": "array",
    "items": {
        "type": "array",
        "items": {"type": "integer", "minimum": -99, "maximum": 99},
        "minItems": 2,
        "maxItems": 4,
    },
    "minItems": 1,
    "maxItems": 3,
}
SCHEMAS: list[dict[str, Any]] = [FACT, REPORT, TABLE]


@dataclass
class Figures:
    replies: int = 0
    valid: int = 0
    tokens: int = 0
    in_flight_at_kill: list[int] = field(default_factory=list)  # streams that had text and had not ended
    wrong: list[str] = field(default_factory=list)
    resumed: int = 0  # times a stream went on at other workers
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.valid} of {self.replies} replies parse and validate; {self.tokens} tokens in {self.seconds:.0f} s; "
            f"decode workers killed with so many streams in the middle of their text: {self.in_flight_at_kill}; {self.resumed} resumed"
        )


@dataclass
class Service:
    url: str
    model: str = "lightship"

    def decode_workers(self) -> dict[str, int]:
        """Worker -> process id."""
        workers = httpx.get(f"{self.url}/ready", timeout=10).json()["workers"]
        return {info["worker"]: info["pid"] for info in workers if info["role"] == "decode"}

    def resumed(self) -> int:
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        (value,) = re.findall(r"^lightship_requests_resumed_total (.*)$", text, re.M)
        return int(float(value))

    def ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.get(f"{self.url}/ready", timeout=5)
            return answer.status_code == 200 and len(answer.json()["pairs"]) == DECODE_WORKERS
        return False


@contextlib.contextmanager
def running_service(folder: Path) -> Iterator[Service]:
    """With the model of demo/, one prefill and two decode workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = [f"ledger.url=sqlite:///{folder}/ledger.db", f"decode.workers={DECODE_WORKERS}"]
    settings += [f"{role}.engine.threads=1" for role in ("prefill", "decode")]
    command = [sys.executable, "-m", "cluster.serve", "--port", str(port)]
    for setting in settings:
        command += ["--set", setting]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            service = Service(f"http://127.0.0.1:{port}")
            deadline = time.monotonic() + READY_S
            while not service.ready():
                if time.monotonic() > deadline or process.poll() is not None:
                    raise AssertionError((folder / "log").read_text())
                time.sleep(0.2)
            yield service
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0


class Run:
    """Asks for replies, several at a time, and kills a decode worker now and then."""

    def __init__(self, service: Service, *, replies: int, kills: int) -> None:
        self._service = service
        self._numbers = iter(range(replies))
        self._kill_at = [replies * (n + 1) // (kills + 1) for n in range(kills)]
        self._document = (ROOT / "demo" / "spec.txt").read_text()[:1500]
        self._open: dict[int, str] = {}
        self.figures = Figures(replies)

    async def all(self) -> Figures:
        started = time.monotonic()
        async with httpx.AsyncClient(base_url=self._service.url, timeout=300) as client:
            await asyncio.gather(*(self._ask_on(client) for _ in range(CONCURRENCY)))
        self.figures.seconds = time.monotonic() - started
        self.figures.resumed = self._service.resumed()
        return self.figures

    async def _ask_on(self, client: httpx.AsyncClient) -> None:
        for number in self._numbers:
            schema = SCHEMAS[number % len(SCHEMAS)]
            self._open[number] = ""
            text = await self._stream(client, number, schema)
            del self._open[number]
            try:
                jsonschema.Draft202012Validator(
                    schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
                ).validate(json.loads(text))
                self.figures.valid += 1
            except (ValueError, jsonschema.ValidationError) as error:
                self.figures.wrong.append(f"{number}: {text!r}: {error}")

    async def _stream(self, client: httpx.AsyncClient, number: int, schema: dict[str, Any]) -> str:
        body = {
            "model": self._service.model,
            "messages": [
                {"role": "system", "content": self._document},
                {"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]},
            ],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "reply", "strict": True, "schema": schema},
            },
            "temperature": number % 4 / 2,
            "seed": number,
            "max_tokens": 800,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                for choice in event.get("choices", []):
                    self._open[number] += choice["delta"].get("content") or ""
                self.figures.tokens += (event.get("usage") or {}).get("completion_tokens", 0)
                self._kill(number)
        return self._open[number]

    def _kill(self, number: int) -> None:
        if not self._kill_at or number < self._kill_at[0] or len(self._open[number]) < 10:
            return
        workers = self._service.decode_workers()
        if len(workers) == DECODE_WORKERS and self._service.ready():
            self._kill_at.pop(0)
            self.figures.in_flight_at_kill.append(sum(bool(text) for text in self._open.values()))
            os.kill(random.Random(number).choice(sorted(workers.values())), signal.SIGKILL)


def show(replies: int, kills: int) -> Figures:
    with tempfile.TemporaryDirectory() as folder, running_service(Path(folder)) as service:
        return asyncio.run(Run(service, replies=replies, kills=kills).all())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replies", type=int, default=200)
    parser.add_argument("--kills", type=int, default=4)
    arguments = parser.parse_args()
    figures = show(arguments.replies, arguments.kills)
    sys.stdout.write(f"{figures}\n" + "".join(f"{wrong}\n" for wrong in figures.wrong))
    return int(figures.valid != figures.replies or len(figures.in_flight_at_kill) != arguments.kills)


if __name__ == "__main__":
    sys.exit(main())
