"""Measures a running server over HTTP: `python -m cluster.loadtest --url http://127.0.0.1:8000`.

Open loop (`--rate`: Poisson arrivals, however slow the answers) or closed loop (`--concurrency`: each answer is followed by
the next request). Prompts are random token ids and answers ignore EOS, so that every length is exact. Definitions are in
`cluster.loadtest_report`. Knows nothing of the server's inside.
"""

import argparse
import asyncio
import contextlib
import math
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import httpx
import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster import client
from cluster.loadtest_report import Record, Slo, plot, summarize, table
from cluster.loadtest_send import send
from cluster.loadtest_tenants import Pace, by_tenant, read_pace, tenants_table

DEFAULT_VOCAB = 32_000  # where the server's model card does not say
DEFAULT_SECONDS = 30.0
MAX_SECONDS = 3600.0
MAX_REQUESTS = 1_000_000
WARM_UP, MEASURED, SHARED = range(3)  # streams of random numbers


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is sent. Everything in it follows from `seed`."""

    model: str
    vocab_size: int
    input_tokens: tuple[int, int]  # least and most
    output_tokens: tuple[int, int]
    shared_prefix: float  # this share of each prompt's tokens is the beginning of one common text
    seed: int

    def body(self, index: int, stream: int = MEASURED) -> tuple[bytes, int, int]:
        """Request `index`: its JSON, its prompt tokens and its output tokens."""
        random = np.random.default_rng([self.seed, stream, index])
        num_input = int(random.integers(*self.input_tokens, endpoint=True))
        num_output = int(random.integers(*self.output_tokens, endpoint=True))
        shared = self._common[: round(num_input * self.shared_prefix)]
        request = {
            "model": self.model,
            "prompt": shared + self._ids(random, num_input - len(shared)),
            "max_tokens": num_output,
            "ignore_eos": True,
            "seed": index,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return msgspec.json.encode(request), num_input, num_output

    @cached_property
    def _common(self) -> list[int]:
        return self._ids(np.random.default_rng([self.seed, SHARED]), self.input_tokens[1])

    def _ids(self, random: np.random.Generator, count: int) -> list[int]:
        """From the middle half of the vocabulary: special tokens lie at its ends."""
        ids: list[int] = random.integers(self.vocab_size // 4, self.vocab_size * 3 // 4, count).tolist()
        return ids


class LoadTest:
    """Sends requests of one plan and keeps a record of each."""

    def __init__(self, http: httpx.AsyncClient, plan: Plan, *, timeout_s: float, tenant: str = "") -> None:
        self._tenant = tenant
        self._http = http
        self._plan = plan
        self._timeout_s = timeout_s
        self._started = time.perf_counter()

    async def warm_up(self, count: int) -> None:
        """Raises ConnectionError where one fails: the server is not fit for measuring."""
        for index in range(count):
            record = await self._request(index, WARM_UP)
            if record.error is not None:
                raise ConnectionError(f"the warm-up failed: {record.error}")

    async def run(
        self,
        *,
        rate: float | None,
        concurrency: int,
        seconds: float,
        requests: int,
        report: Callable[[Record], None],
    ) -> list[Record]:
        """Starts requests for `seconds`, at most `requests` of them, and waits for all. With `rate` open loop."""
        records: list[Record] = []
        self._started = time.perf_counter()
        numbers = iter(range(requests))

        async def one(index: int) -> None:
            record = await self._request(index, MEASURED)
            records.append(record)
            report(record)

        async def one_after_another() -> None:
            for index in numbers:
                if self._now() >= seconds:
                    break
                await one(index)

        async with asyncio.TaskGroup() as group:
            if rate is None:
                for _ in range(min(concurrency, requests)):
                    group.create_task(one_after_another())
            else:
                async for index in self._arrivals(rate, seconds, requests):
                    group.create_task(one(index))
        return sorted(records, key=lambda record: record.start_s)

    async def _arrivals(self, rate: float, seconds: float, requests: int) -> AsyncIterator[int]:
        random = np.random.default_rng([self._plan.seed])
        due = 0.0
        for index in range(requests):
            due += random.exponential(1 / rate)
            if due >= seconds:
                return
            await asyncio.sleep(due - self._now())
            yield index

    async def _request(self, index: int, stream: int) -> Record:
        body, num_input, num_output = self._plan.body(index, stream)
        record = Record(
            index=index,
            start_s=self._now(),
            input_tokens=num_input,
            output_tokens=num_output,
            tenant=self._tenant,
        )
        await send(self._http, "/v1/completions", body, record, now=self._now, timeout_s=self._timeout_s)
        return record

    def _now(self) -> float:
        return time.perf_counter() - self._started


def token_range(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    low, high = int(least), int(most or least)
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not N or MIN:MAX with 1 <= MIN <= MAX")
    return low, high


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not at least 1")
    return value


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value


def add_lengths(parser: argparse.ArgumentParser) -> None:
    """Options for how long prompts and answers are."""
    parser.add_argument(
        "--input", type=token_range, default=(512, 512), help="prompt tokens: N or MIN:MAX (512)"
    )
    parser.add_argument(
        "--output", type=token_range, default=(64, 64), help="output tokens: N or MIN:MAX (64)"
    )
    parser.add_argument(
        "--shared-prefix", type=share, default=0.0, help="share of each prompt all have in common (0)"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.loadtest", description="Measures a running server."
    )
    client.add_options(parser)
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument("--rate", type=positive, help="open loop: requests a second, Poisson")
    loop.add_argument(
        "--concurrency", type=count, default=8, help="closed loop: requests at once (%(default)s)"
    )
    loop.add_argument(
        "--tenant",
        type=read_pace,
        action="append",
        metavar="NAME=KEY:PACE",
        help="several tenants at once: each its key and its requests at once (4) or a second (0.5/s); repeat it",
    )
    parser.add_argument(
        "--duration", type=positive, help="seconds in which requests start (30, or 3600 with --requests)"
    )
    parser.add_argument("--requests", type=count, help="at most so many")
    parser.add_argument(
        "--timeout", type=positive, default=300.0, help="seconds for one request (%(default)s)"
    )
    add_lengths(parser)
    parser.add_argument(
        "--warmup", type=int, default=2, help="requests sent before, not counted (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, help="of prompts and arrivals; a repeated seed finds its prompts cached"
    )
    parser.add_argument("--slo-ttft-ms", type=positive, help="goodput: time to first token at most")
    parser.add_argument("--slo-tpot-ms", type=positive, help="goodput: time per output token at most")
    parser.add_argument("--json", type=Path, help="write settings, summary and every request here")
    parser.add_argument("--plot", type=Path, help="draw latencies and the course of the test here (PNG)")
    return parser


async def _measure(arguments: argparse.Namespace, console: Console) -> tuple[Plan, list[Record]]:
    paces: list[Pace] = arguments.tenant or [
        Pace(key=arguments.api_key, concurrency=arguments.concurrency, rate=arguments.rate)
    ]
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(_client(pace, arguments)) for pace in paces]
        plan = await _plan(clients[0], arguments)
        tests = [
            LoadTest(
                http, replace(plan, seed=plan.seed + number), timeout_s=arguments.timeout, tenant=pace.name
            )
            for number, (pace, http) in enumerate(zip(paces, clients, strict=True))
        ]
        for test in tests:
            await test.warm_up(arguments.warmup)
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress:
            task = progress.add_task("requests", total=arguments.requests and arguments.requests * len(paces))
            runs = [
                test.run(
                    rate=pace.rate,
                    concurrency=pace.concurrency,
                    seconds=arguments.duration or (MAX_SECONDS if arguments.requests else DEFAULT_SECONDS),
                    requests=arguments.requests or MAX_REQUESTS,
                    report=lambda record: progress.advance(task),
                )
                for pace, test in zip(paces, tests, strict=True)
            ]
            records = [record for of_one in await asyncio.gather(*runs) for record in of_one]
    return plan, records


def _client(pace: Pace, arguments: argparse.Namespace) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=arguments.url,
        headers=client.headers(pace.key) | {"content-type": "application/json"},
        timeout=client.timeouts(arguments.timeout),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    )


async def _plan(http: httpx.AsyncClient, arguments: argparse.Namespace) -> Plan:
    answer = await http.get("/v1/models")
    if answer.status_code != 200:
        raise ConnectionError(client.error_text(answer.status_code, answer.content))
    card = client.choose_model(answer.json(), arguments.model)
    return Plan(
        model=card["id"],
        vocab_size=card.get("vocab_size", DEFAULT_VOCAB),
        input_tokens=arguments.input,
        output_tokens=arguments.output,
        shared_prefix=arguments.shared_prefix,
        seed=secrets.randbits(32) if arguments.seed is None else arguments.seed,
    )


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    console = Console(stderr=True)
    try:
        plan, records = asyncio.run(_measure(arguments, console))
    except KeyboardInterrupt:
        return 130
    except (httpx.HTTPError, httpx.InvalidURL, ConnectionError, ValueError) as error:
        console.print(f"{arguments.url}: {error or type(error).__name__}", style="red", markup=False)
        return 1
    slo = Slo(ttft_ms=arguments.slo_ttft_ms, tpot_ms=arguments.slo_tpot_ms)
    summary = summarize(records, slo)
    settings = asdict(plan) | {"rate": arguments.rate, "concurrency": arguments.concurrency}
    Console().print(table(summary))
    if arguments.tenant:
        summary["tenants"] = by_tenant(records, slo)
        Console().print(tenants_table(summary["tenants"]))
    if arguments.json:
        report = {"settings": settings, "summary": summary, "requests": records}
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    if arguments.plot:
        plot(records, arguments.plot)
    print(msgspec.json.encode(summary | {"seed": plan.seed}).decode(), flush=True)
    return 1 if summary["failed"] or not records else 0


if __name__ == "__main__":
    sys.exit(main())
