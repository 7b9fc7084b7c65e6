"""Load tests that look like use: a trace replayed, conversations, a sweep to the knee; with a bill that is checked and an HTML report.

    python -m cluster.scenarios make-trace trace.jsonl --minutes 10 --seed 1
    python -m cluster.scenarios replay trace.jsonl --speed 4 --html report.html
    python -m cluster.scenarios chats --users 4 --turns 5 --cancel-rate 0.1 --ledger sqlite:///var/ledger.db
    python -m cluster.scenarios sweep --from 0.25 --to 8 --slo-ttft-ms 1000

What `cluster.loadtest` is for one kind of request, this is for many; definitions are in `cluster.loadtest_report`. The exit code is 1 where a
request failed or the bill is not the ledger's. Knows nothing of the server's inside.
"""

import argparse
import asyncio
import contextlib
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import msgspec
import numpy as np
from rich.console import Console
from rich.progress import Progress

from cluster import client, loadtest_bill, loadtest_html, loadtest_kill, loadtest_trace
from cluster.ledger import LedgerUnavailable
from cluster.loadtest import DEFAULT_VOCAB, Plan
from cluster.loadtest_bill import Bill, UsageMeter
from cluster.loadtest_chats import PATH as CHAT_PATH
from cluster.loadtest_chats import Chats, talk
from cluster.loadtest_html import Report
from cluster.loadtest_options import parse
from cluster.loadtest_report import Record, Slo, summarize, table
from cluster.loadtest_send import send
from cluster.loadtest_sweep import Sweep

COMPLETION_PATH = "/v1/completions"
CANCELS, GAPS = range(2)  # streams of random numbers


class Sender:
    """Sends the requests of one scenario, each under an id of its own, and keeps their records."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        *,
        seed: int,
        cancel_rate: float,
        timeout_s: float,
        report: Callable[[], None],
    ) -> None:
        self.prefix = f"load-{secrets.token_hex(6)}-"
        self.records: list[Record] = []
        self._http = http
        self._seed = seed
        self._cancel_rate = cancel_rate
        self._timeout_s = timeout_s
        self._report = report
        self._started = time.perf_counter()

    def start(self) -> None:
        """Seconds count from now."""
        self._started = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._started

    async def until(self, due_s: float) -> None:
        await asyncio.sleep(max(0.0, due_s - self.now()))

    async def complete(self, number: int, body: bytes, num_input: int, num_output: int) -> Record:
        """A prompt of token ids."""
        record = self._record(number, num_input, num_output)
        await self._send(COMPLETION_PATH, body, record)
        return record

    async def chat(self, number: int, body: dict[str, Any]) -> tuple[Record, str]:
        """A turn of a conversation, and what was answered. How long its prompt was only the server knows."""
        record, texts = self._record(number, 0, body["max_tokens"]), list[str]()

        def read(event: dict[str, Any]) -> None:
            for choice in event.get("choices", []):
                texts.append(choice["delta"].get("content") or "")
            if event.get("usage"):
                record.input_tokens = event["usage"]["prompt_tokens"]

        streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
        await self._send(CHAT_PATH, msgspec.json.encode(streamed), record, read)
        return record, "".join(texts)

    def _record(self, number: int, num_input: int, num_output: int) -> Record:
        return Record(
            index=number,
            start_s=self.now(),
            input_tokens=num_input,
            output_tokens=num_output,
            client_id=f"{self.prefix}{number}",
        )

    async def _send(
        self,
        path: str,
        body: bytes,
        record: Record,
        read: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> None:
        await send(
            self._http,
            path,
            body,
            record,
            now=self.now,
            timeout_s=self._timeout_s,
            cancel_after=self._cancel_after(record),
            on_event=read,
        )
        self.records.append(record)
        self._report()

    def _cancel_after(self, record: Record) -> int | None:
        """After how many chunks its client hangs up; None: never."""
        random = np.random.default_rng([self._seed, CANCELS, record.index])
        if record.output_tokens < 2 or random.random() >= self._cancel_rate:
            return None
        return int(random.integers(1, record.output_tokens))


class Scenario:
    """One run of the command line: what to send, and what to make of it."""

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self._arguments = arguments
        self._console = console
        self._slo = Slo(ttft_ms=arguments.slo_ttft_ms, tpot_ms=arguments.slo_tpot_ms)
        self._kills = loadtest_kill.Schedule(arguments.kill)
        self._sweep: Sweep | None = None
        self._bill: Bill | None = None
        self._prefix = ""
        self._records: list[Record] = []

    async def run(self) -> None:
        """Sends everything. Raises ConnectionError or ValueError where that cannot begin."""
        arguments = self._arguments
        async with self._client() as http:
            answer = await http.get("/v1/models")
            if answer.status_code != 200:
                raise ConnectionError(client.error_text(answer.status_code, answer.content))
            card = client.choose_model(answer.json(), arguments.model)
            work, total = getattr(self, f"_{arguments.scenario}")(card)
            with Progress(console=self._console) as progress:
                task = progress.add_task(arguments.scenario, total=total)
                sender = Sender(
                    http,
                    seed=arguments.seed,
                    cancel_rate=arguments.cancel_rate,
                    timeout_s=arguments.timeout,
                    report=lambda: progress.advance(task),
                )
                meter = UsageMeter(http) if arguments.usage else None
                if meter is not None:
                    await meter.start()
                sender.start()
                killer = asyncio.create_task(self._kills.run(sender.now))
                await work(sender)
                killer.cancel()
            self._prefix, self._records = (
                sender.prefix,
                sorted(sender.records, key=lambda record: record.start_s),
            )
            if meter is not None:
                self._bill = await meter.bill(self._records)

    def finish(self) -> int:
        """Checks the bill, prints and writes what was asked for; the exit code. Raises LedgerUnavailable."""
        arguments = self._arguments
        if arguments.ledger:
            self._bill = loadtest_bill.of_ledger(arguments.ledger, self._prefix, self._records)
        summary = summarize(self._records, self._slo)
        out = Console()
        out.print(table(summary))
        if self._sweep is not None:
            out.print(f"knee: {self._sweep.knee} requests/s")
        if self._bill is not None:
            out.print(f"bill: {self._bill.sentence()}", markup=False, highlight=False, soft_wrap=True)
        hidden = ("api_key", "json", "html")
        settings = {name: value for name, value in vars(arguments).items() if name not in hidden}
        report = Report(
            title=f"Load test: {arguments.scenario}",
            settings=settings,
            summary=summary,
            records=self._records,
            bill=self._bill,
            kills=self._kills.done,
            steps=self._sweep.steps if self._sweep else (),
            knee=self._sweep.knee if self._sweep else None,
        )
        if arguments.json:
            arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(report, enc_hook=str)))
        if arguments.html:
            arguments.html.write_text(loadtest_html.render(report))
        promised = self._sweep is None or self._sweep.knee is not None
        billed = self._bill is None or self._bill.holds
        return 0 if self._records and not summary["failed"] and promised and billed else 1

    def _client(self) -> contextlib.AbstractAsyncContextManager[httpx.AsyncClient]:
        arguments = self._arguments
        return httpx.AsyncClient(
            base_url=arguments.url,
            headers=client.headers(arguments.api_key) | {"content-type": "application/json"},
            timeout=client.timeouts(arguments.timeout),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    def _replay(self, card: dict[str, Any]) -> tuple[Any, int]:
        arguments = self._arguments
        entries = loadtest_trace.read(arguments.trace)
        prompts = loadtest_trace.Prompts(
            vocab_size=card.get("vocab_size", DEFAULT_VOCAB),
            seed=arguments.seed,
            block_tokens=arguments.block_tokens,
        )
        longest = max(sum(prompts.lengths(entry)) for entry in entries)
        if longest > card.get("max_model_len", longest):
            raise ValueError(
                f"the trace's longest request has {longest} tokens with its answer, but the model takes "
                f"{card['max_model_len']}: --block-tokens scales it down"
            )

        async def one(sender: Sender, number: int, entry: loadtest_trace.Entry) -> None:
            num_input, num_output = prompts.lengths(entry)
            body = _completion(card["id"], prompts.tokens(entry), num_output, number)
            await sender.complete(number, body, num_input, num_output)

        async def work(sender: Sender) -> None:
            async with asyncio.TaskGroup() as group:
                for number, entry in enumerate(entries):
                    await sender.until((entry.timestamp - entries[0].timestamp) / 1000 / arguments.speed)
                    group.create_task(one(sender, number, entry))

        return work, len(entries)

    def _chats(self, card: dict[str, Any]) -> tuple[Any, int]:
        arguments = self._arguments
        chats = Chats(
            model=card["id"],
            users=arguments.users,
            sessions=arguments.sessions,
            turns=arguments.turns,
            system_words=arguments.system_words,
            turn_words=arguments.turn_words,
            output_tokens=arguments.output[1],
            think_s=arguments.think,
            seed=arguments.seed,
        )
        return (lambda sender: talk(chats, sender.chat)), chats.num_requests

    def _sweep_rates(self, card: dict[str, Any]) -> tuple[Any, None]:
        arguments = self._arguments
        sweep = self._sweep = Sweep(arguments.low, arguments.high, arguments.target)

        async def work(sender: Sender) -> None:
            while (rate := sweep.next_rate()) is not None:
                first = len(sender.records)
                plan = Plan(
                    model=card["id"],
                    vocab_size=card.get("vocab_size", DEFAULT_VOCAB),
                    input_tokens=arguments.input,
                    output_tokens=arguments.output,
                    shared_prefix=arguments.shared_prefix,
                    seed=arguments.seed + len(sweep.steps),
                )
                await self._at_rate(sender, plan, rate, first)
                sweep.add(rate, summarize(sender.records[first:], self._slo)["slo_attainment"])

        return work, None

    async def _at_rate(self, sender: Sender, plan: Plan, rate: float, first: int) -> None:
        """Poisson arrivals for one step, until all are answered."""
        begun = sender.now()
        async with asyncio.TaskGroup() as group:
            async for number in _arrivals(sender, rate, begun, self._arguments.step, [plan.seed, GAPS]):
                body, num_input, num_output = plan.body(first + number)
                group.create_task(sender.complete(first + number, body, num_input, num_output))


async def _arrivals(
    sender: Sender, rate: float, begun: float, seconds: float, seed: list[int]
) -> AsyncIterator[int]:
    """At least one, so that every step says something."""
    random = np.random.default_rng(seed)
    due, number = 0.0, 0
    while due < seconds:
        await sender.until(begun + due)
        yield number
        number += 1
        due += random.exponential(1 / rate)


def _completion(model: str, tokens: list[int], num_output: int, seed: int) -> bytes:
    body = {
        "model": model,
        "prompt": tokens,
        "max_tokens": num_output,
        "ignore_eos": True,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return msgspec.json.encode(body)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    console = Console(stderr=True)
    try:
        if arguments.scenario == "make-trace":
            entries = loadtest_trace.make(arguments.shape, arguments.seed)
            loadtest_trace.write(entries, arguments.trace)
            console.print(f"{len(entries)} requests in {arguments.trace}", markup=False)
            return 0
        scenario = Scenario(arguments, console)
        asyncio.run(scenario.run())
        return scenario.finish()
    except KeyboardInterrupt:
        return 130
    except (
        httpx.HTTPError,
        httpx.InvalidURL,
        ConnectionError,
        ValueError,
        OSError,
        LedgerUnavailable,
    ) as error:
        console.print(str(error) or type(error).__name__, style="red", markup=False)
        return 1


if __name__ == "__main__":
    sys.exit(main())
