"""Answers written at random inside a grammar, as a model that knows nothing would write them."""

import functools
from pathlib import Path

import numpy as np
import torch

from cluster.tokenizer import Tokenizer
from workers.grammar import Compiler, Grammars
from workers.request import Grammar, Request, SamplingParams
from workers.sampler import sample
from workers.vocabulary import Vocabulary

CHECKPOINT = Path(__file__).resolve().parent.parent / "demo" / "checkpoint"
EOS, THINK_END = 1, 4
VOCAB_SIZE = 1603  # no multiple of 32, and more than the tokenizer has


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(CHECKPOINT)


@functools.cache
def vocabulary(*, markers: bool = True) -> Vocabulary:
    """The demo's. Without markers: as if the tokenizer had none of tool calls, which are then spelled out."""
    whole = Vocabulary.load(CHECKPOINT)
    if markers:
        return whole
    kept = {name: token for name, token in whole.added.items() if token <= THINK_END}
    gone = set(whole.added.values()) - set(kept.values())
    return Vocabulary([b"" if i in gone else spelled for i, spelled in enumerate(whole.spellings)], kept)


@functools.cache
def compiler(*, markers: bool = True) -> Compiler:
    return Compiler(vocabulary(markers=markers), vocab_size=VOCAB_SIZE, eos_token_ids=(EOS,))


class Walk:
    """Samples from random logits, with an engine's own parts."""

    def __init__(self, seed: int, *, markers: bool = True) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._spellings = vocabulary(markers=markers).spellings
        self._grammars = Grammars(compiler(markers=markers))

    def request(self, grammar: Grammar, output: list[int] | None = None, **sampling: object) -> Request:
        params = SamplingParams(max_tokens=9999, grammar=grammar, **sampling)  # type: ignore[arg-type]
        request = Request("walk", [9, 10, *(output or [])], 2, params, b"")
        self._grammars.begin(request)
        return request

    def allowed(self, request: Request) -> list[int]:
        """The tokens that may come next."""
        masks, failed = self._grammars.masks([request])
        assert masks is not None
        assert not failed, failed
        bits = (masks.bits[0][:, None] >> np.arange(32)) & 1
        return np.flatnonzero(bits).tolist()

    def step(self, request: Request, bias: torch.Tensor) -> int:
        masks, failed = self._grammars.masks([request])
        assert not failed, failed
        logits = torch.randn(1, VOCAB_SIZE, generator=self._generator) + bias
        ((token,), _) = sample(logits, [request], (EOS,), masks)
        request.tokens.append(token)
        return token

    def answer(self, text: str, limit: int = 1500) -> str:
        """The whole answer. Short tokens that end something are a little more likely, so that it comes to its end."""
        bias = torch.zeros(VOCAB_SIZE)
        for ending in (b'"', b"}", b"]", b"<", b"0"):
            bias[self._spellings.index(ending)] = 4.0
        bias[[*range(5, 15), EOS]] = 5.0
        request = self.request(Grammar(text))
        for _ in range(limit):
            if self.step(request, bias) == EOS:
                return self.decode(request.tokens[2:-1])
        raise AssertionError(f"no end: {self.decode(request.tokens[2:])!r}")

    def decode(self, tokens: list[int]) -> str:
        return b"".join(self._spellings[token] for token in tokens).decode()


def follows(text: str, answer: str, *, markers: bool = True) -> bool:
    """Whether the grammar allows this answer, written in the tokenizer's own tokens or byte by byte."""
    matcher = compiler(markers=markers).matcher(Grammar(text))._matcher
    spellings = vocabulary(markers=markers).spellings
    added = vocabulary(markers=markers).added
    tokens: list[int] = []
    while answer:
        marker = next((name for name in added if answer.startswith(name)), "")
        if marker:
            tokens.append(added[marker])
        else:
            tokens += [spellings.index(bytes([byte])) for byte in answer[0].encode()]
        answer = answer[len(marker) or 1 :]
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
