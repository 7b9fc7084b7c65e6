"""The model's tokens as a reader sees them: reasoning, answer, stop strings. Knows nothing of HTTP or of workers."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cluster.tokenizer import Detokenizer, Tokenizer


class Delta(NamedTuple):
    """Newly final text."""

    reasoning: str = ""
    content: str = ""

    @classmethod
    def joined(cls, deltas: Iterable["Delta"]) -> "Delta":
        """One after another, in one piece."""
        return cls(*map("".join, zip(*deltas, strict=True)))


class Output:
    """One reply, token by token.

    While the model thinks, its text is reasoning, until `</think>`. Stop strings are looked for in the answer only, never
    in the reasoning nor in the first `min_tokens` tokens, and the ids in `stop_token_ids` are no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        thinking: bool,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._thinking = thinking
        self._reasoning = Detokenizer(tokenizer)
        self._answer = Detokenizer(tokenizer, stop)
        self._stop_token_ids = frozenset(stop_token_ids)
        self._min_tokens = min_tokens
        self.num_tokens = 0  # up to and with the one that completed a stop string
        self.num_reasoning_tokens = 0  # without </think>

    @property
    def stopped(self) -> bool:
        """A stop string was found: the reply is over and tokens that follow are not part of it."""
        return self._answer.stopped

    def push(self, tokens: Sequence[int]) -> Delta:
        """Takes tokens in order, as many as belong to the reply (see `num_tokens`)."""
        reasoning, content = [], []
        for token in tokens:
            if self.stopped:
                break
            self.num_tokens += 1
            if token in self._stop_token_ids:
                continue
            if not self._thinking:
                content.append(self._answer.push(token, may_stop=self.num_tokens > self._min_tokens))
            elif token == self._tokenizer.think_end_id:
                self._thinking = False
                reasoning.append(self._reasoning.finish())
            else:
                self.num_reasoning_tokens += 1
                reasoning.append(self._reasoning.push(token))
        return Delta("".join(reasoning), "".join(content))

    def finish(self) -> Delta:
        """What was held back, once the last token has been pushed."""
        return Delta(self._reasoning.finish(), self._answer.finish())
