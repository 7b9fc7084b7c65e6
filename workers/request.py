"""A request as the engine sees it: token ids, sampling parameters, pages. Knows nothing of text, tenants or prices."""

import enum
from dataclasses import dataclass, field
from typing import Any

import msgspec


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What an answer must follow, in llguidance's Lark-like language. Checked by the gateway."""

    text: str
    after: int | None = None  # the token behind which it begins; None: at once


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen. Validated by the gateway; `seed` is always set there."""

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0  # before so many nothing ends the answer: neither EOS nor stop_token_ids
    logprobs: int | None = None  # None: none; n: the sampled token's and the n best
    grammar: Grammar | None = None

    @property
    def eos_ends(self) -> bool:
        """A grammar has an end, and only EOS can follow it."""
        return self.grammar is not None or not self.ignore_eos


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities under the model's own distribution, before penalties, bias and temperature."""

    logprob: float
    top: list[tuple[int, float]]  # (token id, logprob), best first, lowest id on ties


class Status(enum.Enum):
    WAITING = "waiting"  # holds no pages; a preempted request is just a waiting one
    RUNNING = "running"
    LANDING = "landing"  # holds pages that a prefill worker is filling; not scheduled
    FINISHED = "finished"  # not scheduled; holds pages only while `hold_pages`


@dataclass(eq=False)
class Request:
    """One request in one engine.

    `tokens` is the prompt and what has been generated; the first `num_prompt_tokens` are the client's prompt, so that a
    request resumed elsewhere arrives with output already in it. num_computed_tokens catches up with len(tokens).
    """

    id: str
    tokens: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    namespace: bytes  # seeds the page hashes: requests share pages only inside one namespace
    num_public_pages: int = 0  # leading ones that all namespaces share
    hold_pages: bool = False  # prefill role: pages stay held after the end until Engine.release
    one_token: bool = False  # prefill role: finish (reason "prefilled") after one sampled token
    page_counts: Any = (
        None  # decode role, where asked for: a PageCounts of the runner's, of which nothing is known here
    )
    matcher: Any = None  # where there is a grammar: the future of a Matcher of workers.grammar
    status: Status = Status.WAITING
    rank: int = 0  # whose pages it has; set by the scheduler
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None  # found in the prefix cache here when first scheduled or reserved
    pages: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of the full pages of `tokens`, chained
    arrival: int = 0  # set by the scheduler: oldest first
    finish_reason: str | None = None  # "stop", "length", "prefilled" (one_token) or "abort"

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens
