"""What a gateway and a worker say to each other over their one TCP connection.

Each message is a 4-byte big-endian length and a msgpack body. A worker answers with frames only: one per engine step,
holding every update of that gateway, and one at least every HEARTBEAT_S, so that silence means a frozen worker.
"""

import asyncio
import struct

import msgspec

from workers.request import SamplingParams, TokenLogprobs

PROTOCOL_VERSION = 4
HEARTBEAT_S = 0.2
MAX_MESSAGE_BYTES = 64 * 2**20
_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """A decode worker's promise of pages for a prompt: where a prefill worker may ship to."""

    decode_worker: str
    decode_epoch: int
    request_id: str
    pages: list[int]  # every page of the prompt, in order
    generations: list[int]
    num_resident_tokens: int  # leading tokens the decode worker already holds; not shipped again


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    gateway: str
    secret: str
    version: int = PROTOCOL_VERSION


class Submit(msgspec.Struct, frozen=True, kw_only=True):
    request_id: str  # unique for each attempt
    tokens: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    namespace: bytes
    num_public_pages: int = 0  # leading ones that every namespace shares


class Reserve(Submit, frozen=True, tag="reserve", kw_only=True):
    """To a decode worker: hold pages for this prompt, answer with a ticket, go on once the caches have landed."""

    selected_pages: bool = False  # whether the last update is to say which pages the indexer selected


class Prefill(Submit, frozen=True, tag="prefill", kw_only=True):
    """To a prefill worker: compute the prompt, ship it to the ticket's pages, sample one token."""

    ticket: Ticket
    progress: bool = False  # whether to report how far the prompt has been read


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str


ToWorker = Hello | Reserve | Prefill | Abort


class Ticketed(msgspec.Struct, frozen=True, tag="ticketed"):
    request_id: str
    ticket: Ticket


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """After a step of a prefill worker, where asked for: how many tokens of the prompt have their caches there."""

    request_id: str
    num_computed_tokens: int
    num_cached_tokens: int  # of them, found in this worker's prefix cache


class Tokens(msgspec.Struct, frozen=True, tag="tokens", kw_only=True):
    """New output tokens. `start` is the output index of the first, so that none is lost and none comes twice."""

    request_id: str
    start: int
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish: str | None = None  # "stop" or "length"
    selected_pages: list[list[int]] | None = None  # with the last update of a decode worker, where asked for
    num_cached_tokens: int | None = (
        None  # with the first update: prompt tokens found in this worker's prefix cache
    )
    queued_s: float = 0.0  # with the first update: time before the first step
    prefill_s: float = 0.0  # with the first update of a prefill worker: first step to first token
    decode_s: float = 0.0  # with the first update of a decode worker: caches landed to its first token


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The request is over on this worker. `retry`: another attempt may succeed (a lost peer, a refused page)."""

    request_id: str
    reason: str
    retry: bool
    grammar: bool = False  # its grammar cannot be followed, here or elsewhere


class Landed(msgspec.Struct, frozen=True, tag="landed"):
    """Every page has arrived and was verified; the request has joined the running batch of the decode worker."""

    request_id: str


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How busy a worker is and what it has done since it started."""

    waiting: int = 0
    running: int = 0
    max_running: int = 0  # at once
    queued_tokens: int = 0  # prompt tokens still to be computed
    free_pages: int = 0
    cached_pages: int = 0
    held_pages: int = 0
    seconds_per_token: float = 0.0  # prefill: moving average
    step_seconds: float = 0.0  # decode: moving average; 0 when idle
    draining: bool = False  # takes no more requests, ends those it has, and goes
    peers: list[tuple[str, int]] = []  # (worker, epoch) of the counterparts it is paired with
    counters: dict[str, float] = {}  # names in cluster.metrics: shipped_bytes, refused_pages, ...


Update = Ticketed | Progress | Tokens | Failed | Landed


class Frame(msgspec.Struct, frozen=True):
    worker: str
    epoch: int
    load: Load
    updates: list[Update] = []


def pack(message: object) -> bytes:
    """A message with its length in front."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


async def read_body(reader: asyncio.StreamReader) -> bytes:
    """The next message's body. Raises asyncio.IncompleteReadError at the end and ConnectionError on an absurd length."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > MAX_MESSAGE_BYTES:
        raise ConnectionError(f"a message of {length} bytes; the limit is {MAX_MESSAGE_BYTES}")
    return await reader.readexactly(length)
