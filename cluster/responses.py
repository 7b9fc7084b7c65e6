"""The bodies and server-sent events that answer a request, in OpenAI's shapes. Knows nothing of how the tokens came about."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from msgspec import UNSET, Struct, UnsetType

from cluster.explanation import Routing
from cluster.logprobs import ChatLogprobs, CompletionLogprobs
from cluster.output import Delta
from cluster.prices import dollars
from cluster.reply_parser import CallDelta
from cluster.tools import FunctionCall, ToolCall

DONE = b"data: [DONE]\n\n"

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

    @classmethod
    def total(cls, parts: Sequence["Usage"]) -> "Usage":
        """Of several choices: each tells what it alone added, so that a prompt counts once."""
        return cls.of(
            hit_tokens=sum(part.prompt_cache_hit_tokens for part in parts),
            miss_tokens=sum(part.prompt_cache_miss_tokens for part in parts),
            output_tokens=sum(part.completion_tokens for part in parts),
            reasoning_tokens=sum(part.completion_tokens_details.reasoning_tokens for part in parts),
            cost_nanodollars=sum(part.cost_nanodollars for part in parts),
        )


class Timing(Struct, frozen=True, kw_only=True):
    """Seconds. `first_token` is the gateway's: from the whole body read to its first token; the others lie within it,
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


class FunctionDelta(Struct, frozen=True, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class ToolCallDelta(Struct, frozen=True, kw_only=True):
    """What is new of one call; all but its index and arguments come once, with the first."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta

    @classmethod
    def of(cls, call: CallDelta) -> "ToolCallDelta":
        function = FunctionDelta(name=call.name or UNSET, arguments=call.arguments)
        kind = "function" if call.id else UNSET
        return cls(index=call.number, id=call.id or UNSET, type=kind, function=function)


class ChatDelta(Struct, frozen=True, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatMessage(Struct, frozen=True, kw_only=True):
    role: str = "assistant"
    content: str | None  # None: nothing but calls
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET

    @classmethod
    def of(cls, delta: Delta) -> "ChatMessage":
        """The message of which `delta` is all."""
        calls = [
            ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in delta.calls
        ]
        return cls(
            content=delta.content or (None if calls else ""),
            reasoning_content=delta.reasoning or UNSET,
            tool_calls=calls or UNSET,
        )


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
    routing: list[Routing] | UnsetType = UNSET


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


class Whole(NamedTuple):
    """One choice of an answer that is not streamed."""

    delta: Delta  # all of it
    finish_reason: str
    logprobs: ChatLogprobs | CompletionLogprobs | None = None


class Reply:
    """One answer's identity. With `include_usage` each chunk has a `usage`: null, except in the one that brings it."""

    kind: str
    chunk_kind: str

    def __init__(self, *, id: str, model: str, created: int, include_usage: bool = False) -> None:
        self.id = id
        self._model = model
        self._created = created
        self._include_usage = include_usage

    def start(self, index: int = 0) -> bytes:
        """What comes before the first text of a choice; may be nothing."""
        raise NotImplementedError

    def delta(
        self, delta: Delta, logprobs: ChatLogprobs | CompletionLogprobs | None = None, index: int = 0
    ) -> bytes:
        """An event of text."""
        raise NotImplementedError

    def end(self, finish_reason: str, debug: Debug | UnsetType = UNSET, index: int = 0) -> bytes:
        """The last event of a choice."""
        raise NotImplementedError

    def whole(
        self,
        choices: Sequence[Whole],
        usage: Usage,
        timing: Timing,
        debug: Debug | UnsetType = UNSET,
        routing: list[Routing] | UnsetType = UNSET,
    ) -> bytes:
        """The body of an answer that is not streamed."""
        written = [self._choice(index, whole) for index, whole in enumerate(choices)]
        body = self._body(self.kind, written, usage=usage, timing=timing, debug=debug, routing=routing)
        return encode(body)

    def progress(self, progress: PromptProgress) -> bytes:
        """An event while the prompt is being read, where the client asked for it."""
        return self._event([], prompt_progress=progress)

    def usage(
        self,
        usage: Usage,
        timing: Timing,
        debug: Debug | UnsetType = UNSET,
        routing: list[Routing] | UnsetType = UNSET,
    ) -> bytes:
        """The event after the last token, where the client asked for it."""
        body = self._body(self.chunk_kind, [], usage=usage, timing=timing, debug=debug, routing=routing)
        return sse(encode(body))

    def routing(self, routing: list[Routing]) -> bytes:
        """The event after the last token, where the client asked for it and not for the usage."""
        return sse(encode(self._body(self.chunk_kind, [], usage=UNSET, routing=routing)))

    def _choice(self, index: int, whole: Whole) -> ChatChoice | CompletionChoice:
        raise NotImplementedError

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

    def _body(
        self,
        kind: str,
        choices: Sequence[ChatChoice | ChatChunkChoice | CompletionChoice],
        *,
        usage: Usage | None | UnsetType,
        timing: Timing | UnsetType = UNSET,
        prompt_progress: PromptProgress | UnsetType = UNSET,
        debug: Debug | UnsetType = UNSET,
        routing: list[Routing] | UnsetType = UNSET,
    ) -> Body:
        return Body(
            id=self.id,
            object=kind,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            timing=timing,
            prompt_progress=prompt_progress,
            debug=debug,
            routing=routing,
        )


class ChatReply(Reply):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def start(self, index: int = 0) -> bytes:
        """Who speaks."""
        return self._event([ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))])

    def delta(
        self, delta: Delta, logprobs: ChatLogprobs | CompletionLogprobs | None = None, index: int = 0
    ) -> bytes:
        """The end of the reasoning and the beginning of the answer may share one event."""
        text = ChatDelta(
            content=delta.content or UNSET,
            reasoning_content=delta.reasoning or UNSET,
            tool_calls=[ToolCallDelta.of(call) for call in delta.calls] or UNSET,
        )
        return self._event([ChatChunkChoice(index=index, delta=text, logprobs=logprobs)])  # type: ignore[arg-type]

    def end(self, finish_reason: str, debug: Debug | UnsetType = UNSET, index: int = 0) -> bytes:
        choice = ChatChunkChoice(index=index, delta=ChatDelta(), finish_reason=finish_reason)
        return self._event([choice], debug=debug)

    def _choice(self, index: int, whole: Whole) -> ChatChoice:
        delta, finish_reason, logprobs = whole
        return ChatChoice(
            index=index,
            message=ChatMessage.of(delta),
            logprobs=logprobs,  # type: ignore[arg-type]
            finish_reason=finish_reason,
        )


class CompletionReply(Reply):
    kind = chunk_kind = "text_completion"

    def start(self, index: int = 0) -> bytes:
        return b""

    def delta(
        self, delta: Delta, logprobs: ChatLogprobs | CompletionLogprobs | None = None, index: int = 0
    ) -> bytes:
        return self._event([CompletionChoice(index=index, text=delta.content, logprobs=logprobs)])  # type: ignore[arg-type]

    def end(self, finish_reason: str, debug: Debug | UnsetType = UNSET, index: int = 0) -> bytes:
        return self._event([CompletionChoice(index=index, text="", finish_reason=finish_reason)], debug=debug)

    def _choice(self, index: int, whole: Whole) -> CompletionChoice:
        delta, finish_reason, logprobs = whole
        return CompletionChoice(
            index=index,
            text=delta.content,
            logprobs=logprobs,  # type: ignore[arg-type]
            finish_reason=finish_reason,
        )


def encode(body: Struct) -> bytes:
    return msgspec.json.encode(body)


def sse(body: bytes) -> bytes:
    """One server-sent event of a JSON body."""
    if not body.isascii():
        for character, escape in LINE_ENDS.items():
            body = body.replace(character.encode(), escape)
    return b"data: " + body + b"\n\n"
