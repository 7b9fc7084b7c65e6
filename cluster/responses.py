"""The bodies and server-sent events that answer a request, in OpenAI's shapes. Knows nothing of how the tokens came about."""

import codecs
from collections.abc import Sequence

import msgspec
from msgspec import UNSET, Struct, UnsetType

from cluster.output import Delta
from cluster.prices import dollars
from cluster.tokenizer import Tokenizer
from workers.request import TokenLogprobs

DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0  # stands for -inf, which JSON cannot write; as in vLLM

# Line ends to Unicode but not to JSON; some clients split a stream at them.
LINE_ENDS = {"\x85": rb"\u0085", "\u2028": rb"\u2028", "\u2029": rb"\u2029"}


class PromptDetails(Struct, frozen=True):
    cached_tokens: int


class CompletionDetails(Struct, frozen=True):
    reasoning_tokens: int


class Usage(Struct, frozen=True, kw_only=True):
    """OpenAI's fields, DeepSeek's two cache fields, and what the request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    cost: str  # dollars, exact
    cost_nanodollars: int

    @classmethod
    def of(
        cls,
        *,
        hit_tokens: int,
        miss_tokens: int,
        output_tokens: int,
        reasoning_tokens: int,
        cost_nanodollars: int,
    ) -> "Usage":
        prompt_tokens = hit_tokens + miss_tokens
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=output_tokens,
            total_tokens=prompt_tokens + output_tokens,
            prompt_cache_hit_tokens=hit_tokens,
            prompt_cache_miss_tokens=miss_tokens,
            prompt_tokens_details=PromptDetails(hit_tokens),
            completion_tokens_details=CompletionDetails(reasoning_tokens),
            cost=dollars(cost_nanodollars).removeprefix("$"),
            cost_nanodollars=cost_nanodollars,
        )


class Timing(Struct, frozen=True, kw_only=True):
    """Seconds. `first_token` is the gateway's: from the request's arrival to its first token; the others lie within it,
    except for `ship`, which goes on while the first token is already on its way to the client."""

    queue: float
    prefill: float
    ship: float
    first_token: float


class PromptProgress(Struct, frozen=True, kw_only=True):
    """Tokens of the prompt; in llama.cpp's names."""

    total: int
    cache: int  # found in the prefix cache
    processed: int  # read so far, these included


class Debug(Struct, frozen=True, kw_only=True):
    """What only those get who ask for it by name."""

    selected_pages: list[list[int]]  # [layers][pages]: tokens that the indexer selected of each


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


class ChatDelta(Struct, frozen=True, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChatMessage(Struct, frozen=True, kw_only=True):
    role: str = "assistant"
    content: str
    reasoning_content: str | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True, kw_only=True):
    index: int = 0
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChoice(Struct, frozen=True, kw_only=True):
    index: int = 0
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str


class CompletionChoice(Struct, frozen=True, kw_only=True):
    index: int = 0
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Body(Struct, frozen=True, kw_only=True):
    """Every answer and every chunk of one."""

    id: str
    object: str
    created: int  # seconds since the epoch
    model: str
    choices: Sequence[ChatChoice | ChatChunkChoice | CompletionChoice]
    usage: Usage | None | UnsetType = UNSET
    timing: Timing | UnsetType = UNSET
    prompt_progress: PromptProgress | UnsetType = UNSET
    debug: Debug | UnsetType = UNSET


class ModelCard(Struct, frozen=True, kw_only=True):
    """One entry of /v1/models, with what a client needs for prompts of token ids."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "lightship"
    max_model_len: int  # tokens of prompt and answer
    vocab_size: int


class ModelList(Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[ModelCard]


class Reply:
    """One answer's identity. With `include_usage` each chunk has a `usage`: null, except in the one that brings it."""

    kind: str
    chunk_kind: str

    def __init__(self, *, id: str, model: str, created: int, include_usage: bool = False) -> None:
        self._id = id
        self._model = model
        self._created = created
        self._include_usage = include_usage

    def progress(self, progress: PromptProgress) -> bytes:
        """An event while the prompt is being read, where the client asked for it."""
        return self._event([], prompt_progress=progress)

    def usage(self, usage: Usage, timing: Timing, debug: Debug | UnsetType = UNSET) -> bytes:
        """The event after the last token, where the client asked for it."""
        return sse(encode(self._body(self.chunk_kind, [], usage=usage, timing=timing, debug=debug)))

    def _event(
        self,
        choices: Sequence[ChatChunkChoice | CompletionChoice],
        *,
        prompt_progress: PromptProgress | UnsetType = UNSET,
        debug: Debug | UnsetType = UNSET,
    ) -> bytes:
        usage = None if self._include_usage else UNSET
        body = self._body(self.chunk_kind, choices, usage=usage, prompt_progress=prompt_progress, debug=debug)
        return sse(encode(body))

    def _whole(
        self, choice: ChatChoice | CompletionChoice, usage: Usage, timing: Timing, debug: Debug | UnsetType
    ) -> bytes:
        return encode(self._body(self.kind, [choice], usage=usage, timing=timing, debug=debug))

    def _body(
        self,
        kind: str,
        choices: Sequence[ChatChoice | ChatChunkChoice | CompletionChoice],
        *,
        usage: Usage | None | UnsetType,
        timing: Timing | UnsetType = UNSET,
        prompt_progress: PromptProgress | UnsetType = UNSET,
        debug: Debug | UnsetType = UNSET,
    ) -> Body:
        return Body(
            id=self._id,
            object=kind,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            timing=timing,
            prompt_progress=prompt_progress,
            debug=debug,
        )


class ChatReply(Reply):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def start(self) -> bytes:
        """The first event: who speaks."""
        return self._event([ChatChunkChoice(delta=ChatDelta(role="assistant", content=""))])

    def delta(self, delta: Delta, logprobs: ChatLogprobs | None = None) -> bytes:
        """An event of text; the end of the reasoning and the beginning of the answer may share one."""
        text = ChatDelta(content=delta.content or UNSET, reasoning_content=delta.reasoning or UNSET)
        return self._event([ChatChunkChoice(delta=text, logprobs=logprobs)])

    def end(self, finish_reason: str, debug: Debug | UnsetType = UNSET) -> bytes:
        return self._event([ChatChunkChoice(delta=ChatDelta(), finish_reason=finish_reason)], debug=debug)

    def whole(
        self,
        delta: Delta,
        finish_reason: str,
        usage: Usage,
        timing: Timing,
        logprobs: ChatLogprobs | None = None,
        debug: Debug | UnsetType = UNSET,
    ) -> bytes:
        """The body of an answer that is not streamed."""
        message = ChatMessage(content=delta.content, reasoning_content=delta.reasoning or UNSET)
        choice = ChatChoice(message=message, logprobs=logprobs, finish_reason=finish_reason)
        return self._whole(choice, usage, timing, debug)


class CompletionReply(Reply):
    kind = chunk_kind = "text_completion"

    def delta(self, delta: Delta, logprobs: CompletionLogprobs | None = None) -> bytes:
        return self._event([CompletionChoice(text=delta.content, logprobs=logprobs)])

    def end(self, finish_reason: str, debug: Debug | UnsetType = UNSET) -> bytes:
        return self._event([CompletionChoice(text="", finish_reason=finish_reason)], debug=debug)

    def whole(
        self,
        delta: Delta,
        finish_reason: str,
        usage: Usage,
        timing: Timing,
        logprobs: CompletionLogprobs | None = None,
        debug: Debug | UnsetType = UNSET,
    ) -> bytes:
        """The body of an answer that is not streamed."""
        choice = CompletionChoice(text=delta.content, logprobs=logprobs, finish_reason=finish_reason)
        return self._whole(choice, usage, timing, debug)


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


def encode(body: Struct) -> bytes:
    return msgspec.json.encode(body)


def sse(body: bytes) -> bytes:
    """One server-sent event of a JSON body."""
    for character, escape in LINE_ENDS.items():
        body = body.replace(character.encode(), escape)
    return b"data: " + body + b"\n\n"


def _name(spelled: bytes) -> str:
    """A token's text; bytes that are no text are spelled out, as OpenAI does, so that names stay distinct."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
