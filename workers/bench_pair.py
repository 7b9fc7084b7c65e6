"""The questions of the benchmark that take several processes: prefill -> ship -> decode of one request, and one rank against two.

A prefill and a decode worker are started as a cluster starts them, each a process with GPUs of its own, and asked over their
doors as a gateway asks. On one GPU they share it, each a host of its own to NCCL, which then joins them over the network.
"""

import contextlib
import multiprocessing
import os
import random
import socket
import statistics
import struct
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import torch

from kernels.layout import PAGE_SIZE, CacheLayout
from workers.bench_bed import SEED, write_slice
from workers.config import EngineConfig
from workers.engine import Engine
from workers.messages import (
    Failed,
    Frame,
    Hello,
    Landed,
    Load,
    Prefill,
    Reserve,
    Ticketed,
    Tokens,
    Update,
    pack,
)
from workers.ranks.shippers import Peer
from workers.request import Request, SamplingParams
from workers.start import Role, make_engine, start_worker

HOST, SECRET = "127.0.0.1", "bench"
OUTPUT_TOKENS = 16  # decoded after the first
DECODE_STEPS = 20
START_S, ANSWER_S = 600.0, 600.0
LAYOUT = CacheLayout(latent_dim=512, rope_dim=64, index_dim=128)  # the tiny model's, too
Result = dict[str, Any]
_LENGTH = struct.Struct(">I")
_frames = msgspec.msgpack.Decoder(Frame)


def shipped(config: EngineConfig, *, layers: int, small: bool, lengths: list[int]) -> list[Result]:
    """For each prompt: TTFT, how much later the decode worker could go on, and whether it went on as one plain engine does.

    ttft_ms:    request sent to first token, which the prefill worker samples
    exposed_ms: first token to everything landed and verified; the rest of the shipping happened while the prompt was read
    equal:      its tokens are those of one engine that reads and writes
    """
    results: list[Result] = []
    outputs: list[list[int]] = []
    config = _with_room(config, layers, max(lengths))
    transport, decode_config = "Gloo" if config.device == "cpu" else "NCCL, one GPU", config
    if torch.cuda.device_count() > 1:
        transport, decode_config = "NCCL", msgspec.structs.replace(config, device="cuda:1")
    with (
        _slice(layers, small) as folder,
        _worker("decode", folder, decode_config) as decode,
        _worker("prefill", folder, config, {"decode-0": decode.peer}) as prefill,
    ):
        prefill.wait_for_pair()
        for length in sorted(lengths):
            _request(prefill, decode, _prompt(length, 0))  # warms what a length needs
            result, tokens = _request(prefill, decode, _prompt(length, 1))
            results.append({"tokens": length, "transport": transport} | result)
            outputs.append(tokens)
    with _slice(layers, small) as folder:
        engine, _ = make_engine(folder, config)
        for result, tokens in zip(results, outputs, strict=True):
            request = _engine_request("alone", _prompt(result["tokens"], 1), 1 + OUTPUT_TOKENS)
            engine.add(request)
            _drain(engine)
            result["equal"] = request.tokens[result["tokens"] :] == tokens
        engine.close()
    return results


def ranks(
    config: EngineConfig, *, layers: int, small: bool, length: int, contexts: list[int], batch: int
) -> list[Result]:
    """Prefill of one prompt, and decode steps of a batch at each context, by one rank and by two. ValueError with one GPU.

    equal: what follows the prompt is the same
    """
    if torch.cuda.device_count() == 1:
        raise ValueError("two ranks need two GPUs, and there is one")
    prefills, decodes = [], []
    with _slice(layers, small) as folder:
        for count in (1, 2):
            reading = msgspec.structs.replace(_with_room(config, layers, length), ranks=count)
            prefills.append(_time_prefill(folder, reading, length))
            # Of the decode ranks each has pages for its own requests.
            room = _with_room(config, layers, batch * max(contexts) // count)
            decodes.append(_time_decode(folder, msgspec.structs.replace(room, ranks=count), contexts, batch))
    (one, tokens), (two, tokens_of_two) = prefills
    prefill = _compared("prefill", length, 1, one, two) | {"equal": tokens == tokens_of_two}
    decode = [
        _compared("decode", context, batch, *seconds) | {"equal": None}
        for context, *seconds in zip(contexts, *decodes, strict=True)
    ]
    return [prefill, *decode]


def _compared(step: str, tokens: int, batch: int, one: float, two: float) -> Result:
    """Seconds of one rank and of two."""
    sizes = {"step": step, "tokens": tokens, "batch": batch}
    return sizes | {"one_rank_ms": one * 1e3, "two_ranks_ms": two * 1e3, "speedup": one / two}


def land(engine: Engine, context: int, batch: int) -> list[Request]:
    """Requests whose prompts have landed, whatever the caches hold, and that decode from the next step on."""
    requests = [
        _engine_request(f"{number} of {context}", [number + 1] * context, 2 * PAGE_SIZE)
        for number in range(batch)
    ]
    for number, request in enumerate(requests):
        if not engine.reserve(request):
            raise RuntimeError(f"no room for {batch} requests of {context} tokens")
        for index in range(len(request.pages)):
            engine.landed(request.id, index)
        # Not the same token for all: equal rows would choose the same experts.
        engine.join(request.id, 2 + number)
    return requests


def _time_prefill(folder: Path, config: EngineConfig, length: int) -> tuple[float, list[int]]:
    engine, _ = make_engine(folder, config)
    try:
        seconds, tokens = [], list[int]()
        for number in (0, 1):  # the first compiles
            request = _engine_request(f"prompt-{number}", _prompt(length, number), 4)
            engine.add(request)
            started = time.perf_counter()
            while not request.num_output_tokens:
                engine.step()
            seconds.append(time.perf_counter() - started)
            _drain(engine)
            tokens = request.tokens[length:]
        return seconds[-1], tokens
    finally:
        engine.close()


def _time_decode(folder: Path, config: EngineConfig, contexts: list[int], batch: int) -> list[float]:
    """Seconds of a step at each context."""
    engine, _ = make_engine(folder, config, role="decode")
    try:
        found = []
        for context in contexts:
            requests = land(engine, context, batch)
            found.append(statistics.median(engine.step().seconds for _ in range(DECODE_STEPS)))
            for request in requests:
                engine.abort(request.id)
        return found
    finally:
        engine.close()


class _Door:
    """A worker process, as a gateway sees it."""

    def __init__(self, port: int, peer: Peer) -> None:
        self.peer = peer
        self.load = Load()
        self._socket = socket.create_connection((HOST, port), timeout=ANSWER_S)
        self._buffer = b""
        self._updates = deque[tuple[float, Update]]()
        self.send(Hello(gateway="bench", secret=SECRET))

    def send(self, message: object) -> None:
        self._socket.sendall(pack(message))

    def read_frame(self) -> None:
        frame = _frames.decode(self._read(_LENGTH.unpack(self._read(_LENGTH.size))[0]))
        self.load = frame.load
        now = time.perf_counter()
        self._updates.extend((now, update) for update in frame.updates)

    def wait_for(self, kind: type[Update]) -> tuple[float, Any]:
        """The next update of that kind, and when it came. RuntimeError if the request fails instead."""
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            while self._updates:
                came_at, update = self._updates.popleft()
                if isinstance(update, Failed):
                    raise RuntimeError(f"the request failed: {update.reason}")
                if isinstance(update, kind):
                    return came_at, update
            self.read_frame()
        raise TimeoutError(f"no {kind.__name__} within {ANSWER_S:g} s")

    def wait_for_pair(self) -> None:
        deadline = time.monotonic() + ANSWER_S
        while not self.load.peers:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the workers did not pair within {ANSWER_S:g} s")
            self.read_frame()

    def close(self) -> None:
        self._socket.close()

    def _read(self, count: int) -> bytes:
        while len(self._buffer) < count:
            received = self._socket.recv(2**20)
            if not received:
                raise ConnectionError("the worker has closed the connection")
            self._buffer += received
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data


def _request(prefill: _Door, decode: _Door, prompt: list[int]) -> tuple[Result, list[int]]:
    common: dict[str, Any] = {
        "request_id": f"request-{random.getrandbits(60):x}",
        "tokens": prompt,
        "num_prompt_tokens": len(prompt),
        "sampling": SamplingParams(max_tokens=1 + OUTPUT_TOKENS, temperature=0.0, ignore_eos=True),
        "namespace": b"bench",
    }
    shipped_before = _shipped_bytes(prefill)
    started = time.perf_counter()
    decode.send(Reserve(**common))
    _, ticketed = decode.wait_for(Ticketed)
    prefill.send(Prefill(**common, ticket=ticketed.ticket))
    first_at, first = prefill.wait_for(Tokens)
    landed_at, _ = decode.wait_for(Landed)
    tokens, last_at = list(first.tokens), landed_at
    while len(tokens) < 1 + OUTPUT_TOKENS:
        last_at, update = decode.wait_for(Tokens)
        tokens += update.tokens
    num_bytes = _shipped_bytes(prefill) - shipped_before
    ttft, exposed = first_at - started, max(0.0, landed_at - first_at)
    return {
        "ttft_ms": ttft * 1e3,
        "exposed_ms": exposed * 1e3,
        "exposed_of_ttft": exposed / ttft,
        "bytes": num_bytes,
        "bytes_per_token": num_bytes / (-(-len(prompt) // PAGE_SIZE) * PAGE_SIZE),
        "step_ms": (last_at - landed_at) * 1e3 / OUTPUT_TOKENS,
    }, tokens


def _shipped_bytes(prefill: _Door) -> int:
    for _ in range(2):  # the frame at hand may be older than the last shipment
        prefill.read_frame()
    return int(prefill.load.counters.get("shipped_bytes", 0))


@contextlib.contextmanager
def _worker(
    role: Role, folder: Path, config: EngineConfig, peers: dict[str, Peer] | None = None
) -> Iterator[_Door]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(role, folder, config, peers or {}, theirs)
    )
    process.start()
    try:
        if not ours.poll(START_S):
            raise TimeoutError(f"the {role} worker did not start within {START_S:g} s")
        door = _Door(*ours.recv())
        yield door
        door.close()
    finally:
        with contextlib.suppress(OSError):
            ours.send(None)
        process.join(20)
        process.kill()


def _serve(
    role: Role, folder: Path, config: EngineConfig, peers: dict[str, Peer], parent: Connection
) -> None:
    if torch.cuda.device_count() == 1:
        os.environ["NCCL_HOSTID"] = role
    worker = start_worker(
        role=role,
        model=folder,
        engine_config=config,
        worker_id=f"{role}-0",
        epoch=1,
        host=HOST,
        secret=SECRET,
    )
    worker.set_peers(peers)
    parent.send((worker.server.port, Peer(worker.ship_host, worker.ship_port, 1, list(worker.rank_ports))))
    with contextlib.suppress(EOFError):
        parent.recv()  # until the parent has seen enough, or is gone
    worker.stop()


@contextlib.contextmanager
def _slice(layers: int, small: bool) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        write_slice(folder, small=small, layers=layers)
        yield Path(folder)


def _with_room(config: EngineConfig, layers: int, tokens: int) -> EngineConfig:
    """Caches for two prompts of so many tokens and their answers."""
    spare = 4 * PAGE_SIZE * config.max_running
    token_bytes = LAYOUT.page_bytes // PAGE_SIZE * layers
    return msgspec.structs.replace(
        config, cache_bytes=(2 * tokens + spare) * token_bytes, max_context=tokens + 4 * PAGE_SIZE
    )


def _prompt(length: int, number: int) -> list[int]:
    generator = random.Random(f"{SEED} {length} {number}")
    return [generator.randrange(10, 500) for _ in range(length)]


def _engine_request(request_id: str, tokens: list[int], max_tokens: int) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Request(request_id, list(tokens), len(tokens), sampling, namespace=request_id.encode())


def _drain(engine: Engine) -> None:
    while engine.has_work():
        engine.step()
