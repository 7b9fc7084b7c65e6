"""Log-probabilities in OpenAI's two shapes. Knows nothing of how the tokens came about."""

import codecs
from collections.abc import Sequence

from msgspec import Struct

from cluster.tokenizer import Tokenizer
from workers.request import TokenLogprobs

LOWEST_LOGPROB = -9999.0  # stands for -inf, which JSON cannot write; as in vLLM


class TopLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    content: list[ChatLogprob]


class CompletionLogprobs(Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]  # characters of the reply before the token


class ChatLogprobsWriter:
    """Workers' log-probabilities in the shape of /v1/chat/completions."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def write(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> ChatLogprobs:
        return ChatLogprobs([self._entry(*pair) for pair in zip(tokens, logprobs, strict=True)])

    def _entry(self, token: int, logprobs: TokenLogprobs) -> ChatLogprob:
        best = [TopLogprob(*self._named(*pair)) for pair in logprobs.top]
        return ChatLogprob(*self._named(token, logprobs.logprob), best)

    def _named(self, token: int, logprob: float) -> tuple[str, float, list[int]]:
        spelled = self._tokenizer.token_bytes(token)
        return _name(spelled), max(logprob, LOWEST_LOGPROB), list(spelled)


class CompletionLogprobsWriter:
    """Workers' log-probabilities in the shape of /v1/completions. Counts the characters of one reply."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        pairs = list(zip(tokens, logprobs, strict=True))
        return CompletionLogprobs(
            tokens=[self._name(token) for token in tokens],
            token_logprobs=[max(entry.logprob, LOWEST_LOGPROB) for entry in logprobs],
            top_logprobs=[self._top(token, entry) for token, entry in pairs],
            text_offset=[self._advance(token) for token in tokens],
        )

    def _top(self, token: int, logprobs: TokenLogprobs) -> dict[str, float]:
        """The best, and the sampled one where it is not among them."""
        return {
            self._name(t): max(logprob, LOWEST_LOGPROB)
            for t, logprob in [*logprobs.top, (token, logprobs.logprob)]
        }

    def _name(self, token: int) -> str:
        return _name(self._tokenizer.token_bytes(token))

    def _advance(self, token: int) -> int:
        before = self._offset
        self._offset += len(self._characters.decode(self._tokenizer.text_bytes(token)))
        return before


def _name(spelled: bytes) -> str:
    """A token's text; bytes that are no text are spelled out, as OpenAI does, so that names stay distinct."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
