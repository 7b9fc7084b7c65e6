"""Traces in Mooncake's format: when a request came, how long it and its answer were, and which blocks of 512 tokens it shares.

One JSON object a line: timestamp in ms, input_length and output_length in tokens, hash_ids of the prompt's blocks of 512 tokens, the last
one perhaps in part. Equal ids mean equal prefixes. This module reads them, makes them, and turns ids into tokens; it sends nothing.

A made trace has sessions of several turns, each with the earlier turns before it, system prompts that sessions share, some of them often,
and bursts of arrivals. The same seed gives the same trace.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

BLOCK_TOKENS = 512
KEPT_BLOCKS = 1024  # of tokens once made
MINUTE_MS = 60_000
SLOT_MS = 30_000  # a burst is so long

Count = Annotated[int, msgspec.Meta(ge=1)]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a trace."""

    timestamp: Annotated[int, msgspec.Meta(ge=0)]  # ms since the trace began
    input_length: Count
    output_length: Count
    hash_ids: list[int]


def read(path: Path) -> list[Entry]:
    """All lines, by time. Raises ValueError naming the line that is wrong."""
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = msgspec.json.decode(line, type=Entry)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if len(entry.hash_ids) != math.ceil(entry.input_length / BLOCK_TOKENS):
            raise ValueError(
                f"{path}, line {number}: hash_ids has {len(entry.hash_ids)} blocks of {BLOCK_TOKENS} tokens, "
                f"but input_length is {entry.input_length}"
            )
        entries.append(entry)
    if not entries:
        raise ValueError(f"{path}: no requests in it")
    return sorted(entries, key=lambda entry: entry.timestamp)


def write(entries: Iterable[Entry], path: Path) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))


class Prompts:
    """Token ids for blocks' ids: equal where the ids are. From the middle half of the vocabulary: special tokens lie at its ends.

    block_tokens: how many tokens stand for a block; less than BLOCK_TOKENS scales a trace down to a smaller model.
    """

    def __init__(self, *, vocab_size: int, seed: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self._vocab_size = vocab_size
        self._seed = seed
        self._block_tokens = block_tokens
        self._block = lru_cache(KEPT_BLOCKS)(self._make_block)

    def lengths(self, entry: Entry) -> tuple[int, int]:
        """Tokens of the prompt and of the answer, scaled."""
        scale = self._block_tokens / BLOCK_TOKENS
        return max(1, round(entry.input_length * scale)), max(1, round(entry.output_length * scale))

    def tokens(self, entry: Entry) -> list[int]:
        num_input, _ = self.lengths(entry)
        return [token for block in entry.hash_ids for token in self._block(block)][:num_input]

    def _make_block(self, block: int) -> list[int]:
        random = np.random.default_rng([self._seed, block % 2**63])
        ids: list[int] = random.integers(
            self._vocab_size // 4, self._vocab_size * 3 // 4, self._block_tokens
        ).tolist()
        return ids


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a made trace is like. Lengths are medians of log-normal distributions, in tokens."""

    minutes: float = 10.0
    sessions_per_minute: float = 6.0
    turns: float = 3.0  # of a session, on average
    think_s: float = 15.0  # between an answer and the next turn, on average
    first_input: int = 700  # what a session begins with, after its system prompt
    next_input: int = 150  # what each further turn adds
    output: int = 120
    spread: float = 0.6  # sigma of the logarithms
    system_prompts: int = 4
    system_blocks: tuple[int, int] = (1, 3)  # least and most blocks of a system prompt
    burst_share: float = 0.15  # of the time
    burst_factor: float = 4.0  # how much faster sessions come in them
    max_input: int = 8192  # a session ends before its prompt is longer
    second_per_output_token: float = 0.02  # a user reads an answer at this pace before thinking


def make(shape: Shape, seed: int) -> list[Entry]:
    """A trace, by time."""
    random = np.random.default_rng([seed])
    systems = [
        _System(number, int(random.integers(*shape.system_blocks, endpoint=True)))
        for number in range(shape.system_prompts)
    ]
    weights = 1 / np.arange(1, shape.system_prompts + 1)  # Zipf: a few are used by most
    drafts: list[_Draft] = []
    for session, start_ms in enumerate(_arrivals(shape, random)):
        system = systems[int(random.choice(len(systems), p=weights / weights.sum()))]
        drafts += _session(shape, random, session, start_ms, system)
    drafts.sort(key=lambda draft: draft.timestamp)
    ids: dict[tuple[int, ...], int] = {}
    return [
        Entry(
            timestamp=draft.timestamp,
            input_length=draft.input_length,
            output_length=draft.output_length,
            hash_ids=[ids.setdefault(block, len(ids)) for block in draft.blocks],
        )
        for draft in drafts
    ]


@dataclass(frozen=True)
class _System:
    number: int
    blocks: int


@dataclass(frozen=True)
class _Draft:
    """A request whose blocks are still named by where they come from."""

    timestamp: int
    input_length: int
    output_length: int
    blocks: Sequence[tuple[int, ...]]


def _arrivals(shape: Shape, random: np.random.Generator) -> list[int]:
    """When sessions begin, in ms: Poisson, whose rate is the same on average however bursty it is."""
    num_slots = math.ceil(shape.minutes * MINUTE_MS / SLOT_MS)
    in_burst = random.permutation(num_slots) < round(shape.burst_share * num_slots)
    factors = np.where(in_burst, shape.burst_factor, 1.0)
    means = factors / factors.mean() * shape.sessions_per_minute * SLOT_MS / MINUTE_MS
    times: list[int] = []
    for slot, count in enumerate(random.poisson(means)):
        times += (slot * SLOT_MS + random.integers(0, SLOT_MS, count)).tolist()
    return sorted(time for time in times if time < shape.minutes * MINUTE_MS)


def _session(
    shape: Shape, random: np.random.Generator, session: int, start_ms: int, system: _System
) -> list[_Draft]:
    turns = int(random.geometric(1 / shape.turns))
    at, length, drafts = float(start_ms), system.blocks * BLOCK_TOKENS, []
    for turn in range(turns):
        length += _length(random, shape.next_input if turn else shape.first_input, shape.spread)
        output = _length(random, shape.output, shape.spread)
        if length > shape.max_input or at >= shape.minutes * MINUTE_MS:
            break
        drafts.append(_Draft(int(at), length, output, _blocks(session, system, length)))
        length += output
        at += 1000 * (output * shape.second_per_output_token + random.exponential(shape.think_s))
    return drafts


def _blocks(session: int, system: _System, length: int) -> list[tuple[int, ...]]:
    """A full block of a session is the same in all its later turns; one in part is another block than the full one."""
    full, rest = divmod(length, BLOCK_TOKENS)
    blocks: list[tuple[int, ...]] = [(0, system.number, index) for index in range(min(system.blocks, full))]
    blocks += [(1, session, index) for index in range(len(blocks), full)]
    return [*blocks, (2, session, full, rest)] if rest else blocks


def _length(random: np.random.Generator, median: int, spread: float) -> int:
    return max(1, round(random.lognormal(math.log(median), spread)))
