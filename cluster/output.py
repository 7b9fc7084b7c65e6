"""The model's tokens as a reader sees them: reasoning, answer, tool calls, stop strings. Knows nothing of HTTP or workers."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cluster.reply_parser import CallDelta, Parsed, ReplyParser, joined
from cluster.tokenizer import Detokenizer, Tokenizer


class Delta(NamedTuple):
    """Newly final text."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallDelta, ...] = ()

    @classmethod
    def joined(cls, deltas: Iterable["Delta"]) -> "Delta":
        """One after another, in one piece."""
        reasoning, content, calls = zip(*deltas, strict=True)
        return cls("".join(reasoning), "".join(content), joined(call for some in calls for call in some))


class Output:
    """One reply, token by token.

    While the model thinks, its text is reasoning, until `</think>`. Stop strings are looked for in the answer only, never
    in the reasoning nor in the first `min_tokens` tokens, and the ids in `stop_token_ids` are no text.

    parser: reads tool calls out of the answer; None: all of it is content. Stop strings are looked for before it reads, and
    special tokens of its markup are no text to them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        thinking: bool,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
        parser: ReplyParser | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._thinking = thinking
        self._parser = parser
        self._reasoning = Detokenizer(tokenizer)
        self._answer = Detokenizer(tokenizer, stop, tokenizer.mark_ids(parser.marks) if parser else {})
        self._stop_token_ids = frozenset(stop_token_ids)
        self._min_tokens = min_tokens
        self.num_tokens = 0  # up to and with the one that completed a stop string
        self.num_reasoning_tokens = 0  # without </think>
        self.has_calls = False  # a tool call has begun

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
        text = "".join(content)
        parsed = self._parser.push(text) if self._parser and text else Parsed(text)
        return self._delta("".join(reasoning), parsed)

    def finish(self, *, cut: bool = False) -> Delta:
        """What was held back, once the last token has been pushed. cut: it was not the model that ended its reply."""
        reasoning, text = self._reasoning.finish(), self._answer.finish()
        if self._parser is None:
            return Delta(reasoning, text)
        pushed, rest = self._parser.push(text), self._parser.finish(cut=cut or self.stopped)
        return self._delta(
            reasoning, Parsed(pushed.content + rest.content, joined(pushed.calls + rest.calls))
        )

    def _delta(self, reasoning: str, parsed: Parsed) -> Delta:
        self.has_calls |= bool(parsed.calls)
        return Delta(reasoning, parsed.content, parsed.calls)
