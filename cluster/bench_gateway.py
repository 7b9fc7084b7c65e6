"""What the gateway itself costs: `python -m cluster.bench_gateway`. Its workers are do-nothing engines.

Three processes: a gateway under uvicorn (Api, Pilot, Fleet as in the service, without Ray and HAProxy in front), one that
speaks for a prefill and a decode worker and emits a token a step for every request, and the clients. Prints the streamed tokens
per second of the gateway's own CPU time and the time to first token, all of which is the gateway's: with steps as long as a
model's, and with steps so short that the gateway is what limits. Ends with one JSON line.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import msgspec
import uvicorn
from rich.console import Console
from rich.table import Table

from cluster.api import Api
from cluster.billing import Books
from cluster.chat_codec import ChatCodec
from cluster.config import ClusterConfig
from cluster.controller import WorkerInfo
from cluster.fleet import Fleet
from cluster.flight import Pilot
from cluster.key_store import KeyList
from cluster.metrics import Metrics
from cluster.prefix_directory import PrefixDirectory
from cluster.prices import PriceBook
from cluster.router import Costs
from cluster.schemas import Limits
from cluster.serve import DEMO_MODEL
from cluster.structured import StructuredOutput
from cluster.tenants import Tenants
from cluster.tokenizer import Tokenizer
from workers.messages import (
    HEARTBEAT_S,
    Frame,
    Landed,
    Load,
    Prefill,
    Reserve,
    Ticket,
    Ticketed,
    ToWorker,
    pack,
    read_body,
)
from workers.messages import Tokens as TokensUpdate
from workers.model_config import ModelConfig

EPOCH = 1
STEPS_S = {
    "paced": 0.02,
    "flooded": 0.001,
}  # of the do-nothing decode worker: as a model's, or faster than any
_decoder = msgspec.msgpack.Decoder(ToWorker)


class DoNothing:
    """A prefill and a decode worker behind two doors, without a model: every request gets its tokens at once."""

    def __init__(self, vocab_size: int, step_s: float) -> None:
        self._step_s = step_s
        self._text = range(300, min(vocab_size, 1300))
        self._left: dict[str, tuple[int, int]] = {}  # request -> (next output index, tokens wanted)
        self._gateways: dict[str, asyncio.StreamWriter] = {}

    async def open(self) -> dict[str, int]:
        """Ports by role."""
        self._servers = [
            await asyncio.start_server(lambda r, w, role=role: self._serve(role, r, w), "127.0.0.1", 0)  # type: ignore[misc]
            for role in ("prefill", "decode")
        ]
        self._decoding = asyncio.create_task(self._decode())
        ports = [server.sockets[0].getsockname()[1] for server in self._servers]
        return dict(zip(("prefill", "decode"), ports, strict=True))

    async def _serve(self, role: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_body(reader)  # the gateway's hello
        self._gateways[role] = writer
        heart = asyncio.create_task(self._beat(role))
        try:
            while True:
                match _decoder.decode(await read_body(reader)):
                    case Reserve() as reserve:
                        ticket = Ticket("decode-0", EPOCH, reserve.request_id, [], [], 0)
                        self._send("decode", [Ticketed(reserve.request_id, ticket)])
                    case Prefill() as prefill:
                        first = TokensUpdate(
                            request_id=prefill.request_id,
                            start=0,
                            tokens=[self._text[0]],
                            num_cached_tokens=0,
                        )
                        self._send("prefill", [first])
                        self._send("decode", [Landed(prefill.request_id)])
                        self._left[prefill.request_id] = 1, prefill.sampling.max_tokens
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            heart.cancel()
            writer.close()

    async def _beat(self, role: str) -> None:
        while True:
            self._send(role, [])
            await asyncio.sleep(HEARTBEAT_S)

    async def _decode(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            updates = []
            for request_id, (index, wanted) in list(self._left.items()):
                token, is_last = self._text[index % len(self._text)], index + 1 >= wanted
                updates.append(
                    TokensUpdate(
                        request_id=request_id,
                        start=index,
                        tokens=[token],
                        finish="length" if is_last else None,
                    )
                )
                if is_last:
                    del self._left[request_id]
                else:
                    self._left[request_id] = index + 1, wanted
            if updates:
                self._send("decode", updates)

    def _send(self, role: str, updates: list[Any]) -> None:
        other = "decode" if role == "prefill" else "prefill"
        load = Load(peers=[(f"{other}-0", EPOCH)], free_pages=2**20, max_running=2**20)
        self._gateways[role].write(pack(Frame(f"{role}-0", EPOCH, load, updates)))


class _NoLedger:
    """Takes every record at once and has no keys."""

    class _Method:
        def __init__(self, answer: KeyList | None = None) -> None:
            self._answer = answer

        async def remote(self, argument: Any) -> KeyList | None:
            return self._answer

    open = settle = _Method()
    keys = _Method(KeyList(version=0, keys={}, limits={}, any_made=False))


def _run_workers(pipe: Connection, vocab_size: int, step_s: float) -> None:
    async def body() -> None:
        workers = DoNothing(vocab_size, step_s)
        pipe.send(await workers.open())
        await asyncio.to_thread(pipe.recv)

    asyncio.run(body())


def _run_gateway(pipe: Connection, folder: Path, ports: dict[str, int]) -> None:
    asyncio.run(_serve(pipe, folder, ports))


async def _serve(pipe: Connection, folder: Path, ports: dict[str, int]) -> None:
    """Sends its port, then its CPU seconds so far for each message, until one is None."""
    config = ClusterConfig()
    fleet = Fleet(gateway="bench", secret="bench", timeout_s=30)
    fleet.set_members([_member("prefill", ports), _member("decode", ports)])
    while not fleet.linked_pairs():
        await asyncio.sleep(0.01)
    fleet.proven = fleet.linked_pairs()
    model = ModelConfig.load(folder)
    books = Books(_NoLedger(), PriceBook.load(), config.price_entry)
    settling = asyncio.create_task(books.settle_forever())
    tokenizer = Tokenizer(folder)
    codec = ChatCodec.load(folder, tokenizer)
    tenants = Tenants(config)
    await tenants.read(_NoLedger())
    api = Api(
        config,
        limits=Limits(max_context=model.max_position_embeddings, vocab_size=model.vocab_size),
        tokenizer=tokenizer,
        codec=codec,
        structured=StructuredOutput.load(folder, tokenizer, codec.name),
        pilot=Pilot(fleet, Costs(bytes_per_token=1), PrefixDirectory()),
        books=books,
        metrics=Metrics(),
        fleet=fleet,
        tenants=tenants,
    )
    server = uvicorn.Server(uvicorn.Config(api.app(), port=0, log_level="warning", access_log=False))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    pipe.send(server.servers[0].sockets[0].getsockname()[1])
    while await asyncio.to_thread(pipe.recv) is not None:
        pipe.send(time.process_time())
    server.should_exit = True
    await serving
    settling.cancel()
    await fleet.close()


def _member(role: Literal["prefill", "decode"], ports: dict[str, int]) -> WorkerInfo:
    return WorkerInfo(
        worker=f"{role}-0",
        epoch=EPOCH,
        role=role,
        host="127.0.0.1",
        port=ports[role],
        pid=os.getpid(),
        node="here",
    )


@dataclass
class Figures:
    pace: str
    streams: int
    tokens_per_cpu_second: float
    tokens_per_second: float
    first_token_ms: float  # median
    first_token_p99_ms: float


async def _measure(
    port: int, pipe: Connection, pace: str, streams: int, requests: int, num_tokens: int
) -> Figures:
    """`requests` one after another by each of `streams` clients, which begin evenly spread over the time of an answer."""
    latencies: list[float] = []

    async def client(number: int) -> None:
        await asyncio.sleep(STEPS_S[pace] * num_tokens * number / streams)
        for _ in range(requests):
            latencies.append(await _stream(port, num_tokens))

    before, started = _cpu_seconds(pipe), time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(streams)))
    wall, cpu = time.perf_counter() - started, _cpu_seconds(pipe) - before
    total = streams * requests * num_tokens
    latencies.sort()
    return Figures(
        pace=pace,
        streams=streams,
        tokens_per_cpu_second=round(total / cpu),
        tokens_per_second=round(total / wall),
        first_token_ms=round(1000 * statistics.median(latencies), 2),
        first_token_p99_ms=round(1000 * latencies[int(0.99 * (len(latencies) - 1))], 2),
    )


def _cpu_seconds(pipe: Connection) -> float:
    pipe.send("cpu")
    seconds: float = pipe.recv()
    return seconds


async def _stream(port: int, num_tokens: int) -> float:
    """Seconds to the first event with text. Reads bytes only: a client that parsed would cost more than the gateway."""
    body = json.dumps(
        {
            "model": "lightship",
            "messages": [{"role": "user", "content": "Tell me a story about a lighthouse."}],
            "max_tokens": num_tokens,
            "stream": True,
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
    started = time.perf_counter()
    writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
    seen = b""
    while seen.count(b'"delta":{"content"') < 1:
        data = await reader.read(2**16)
        assert data, seen
        seen += data
    first = time.perf_counter() - started
    while data := await reader.read(2**16):
        seen = seen[-100:] + data
    assert b"data: [DONE]" in seen, seen
    writer.close()
    return first


def _measure_all(model: Path, pace: str, streams: list[int], requests: int, num_tokens: int) -> list[Figures]:
    """With processes of their own, for each number of streams."""
    spawn = multiprocessing.get_context("spawn")
    (workers_pipe, workers_end), (gateway_pipe, gateway_end) = spawn.Pipe(), spawn.Pipe()
    vocab_size = ModelConfig.load(model).vocab_size
    workers = spawn.Process(target=_run_workers, args=(workers_end, vocab_size, STEPS_S[pace]))
    workers.start()
    gateway = spawn.Process(target=_run_gateway, args=(gateway_end, model, workers_pipe.recv()))
    gateway.start()
    port = gateway_pipe.recv()
    asyncio.run(_measure(port, gateway_pipe, pace, 4, 2, num_tokens))  # warms it up
    found = [asyncio.run(_measure(port, gateway_pipe, pace, n, requests, num_tokens)) for n in streams]
    for pipe, process in ((gateway_pipe, gateway), (workers_pipe, workers)):
        pipe.send(None)
        process.join()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.bench_gateway", description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="folder whose tokenizer is used")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64], help="at once")
    parser.add_argument("--requests", type=int, default=8, help="on each stream, one after another")
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    arguments = parser.parse_args()
    found = [
        figures
        for pace in STEPS_S
        for figures in _measure_all(
            arguments.model, pace, arguments.streams, arguments.requests, arguments.tokens
        )
    ]
    table = Table("decode steps", "streams", "tokens/s of a core", "tokens/s", "TTFT ms", "TTFT p99 ms")
    for figures in found:
        table.add_row(*map(str, vars(figures).values()))
    Console().print(table)
    print(json.dumps({"gateway": [vars(figures) for figures in found], "tokens": arguments.tokens}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
