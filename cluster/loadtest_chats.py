"""Conversations for a load test: users who read an answer, think, and ask on. Knows nothing of HTTP.

Each turn carries all earlier ones, answers included, so that a prefix cache shows its worth. Texts are of common words, made from a seed.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.loadtest_report import Record

PATH = "/v1/chat/completions"
TEXT = """
time year people way day man thing woman life child world school state family student group country problem hand part place case week
company system program question work government number night point home water room mother area money story fact month lot right study
book eye job word business issue side kind head house service friend father power hour game line end member law car city
"""
WORDS = TEXT.split()


@dataclass(frozen=True, kw_only=True)
class Chats:
    """How many, how long. Words, seconds."""

    model: str
    users: int
    sessions: int  # of each user, one after another
    turns: int
    system_words: int  # the same for all
    turn_words: int
    output_tokens: int
    think_s: float  # on average
    seed: int

    @property
    def num_requests(self) -> int:
        return self.users * self.sessions * self.turns


# Sends one turn: its number and body; gives back the record and the answer's text.
Ask = Callable[[int, dict[str, Any]], Awaitable[tuple[Record, str]]]


async def talk(chats: Chats, ask: Ask) -> None:
    """All users at once. A session ends with a turn that was cancelled or failed."""
    async with asyncio.TaskGroup() as group:
        for user in range(chats.users):
            group.create_task(_user(chats, user, ask))


async def _user(chats: Chats, user: int, ask: Ask) -> None:
    random = np.random.default_rng([chats.seed, user])
    system = _words(np.random.default_rng([chats.seed]), chats.system_words)
    for session in range(chats.sessions):
        messages = [{"role": "system", "content": system}] if system else []
        for turn in range(chats.turns):
            if session or turn:
                await asyncio.sleep(random.exponential(chats.think_s))
            messages.append({"role": "user", "content": _words(random, chats.turn_words)})
            number = (user * chats.sessions + session) * chats.turns + turn
            record, text = await ask(number, _body(chats, messages, number))
            if not record.completed:
                break
            messages.append({"role": "assistant", "content": text})


def _body(chats: Chats, messages: list[dict[str, str]], number: int) -> dict[str, Any]:
    return {
        "model": chats.model,
        "messages": messages,
        "max_tokens": chats.output_tokens,
        "ignore_eos": True,
        "seed": number,
    }


def _words(random: np.random.Generator, count: int) -> str:
    return " ".join(WORDS[index] for index in random.integers(0, len(WORDS), count))
