"""The bodies of /v1/chat/completions and /v1/completions, strictly read. Knows nothing of text encoding or of workers.

A field is known, accepted and without effect (`IGNORED`), accepted with a neutral value only (`*_NEUTRAL`), or refused by
name. A null is an absent field. Whatever is wrong, the error is an InvalidRequest that names the field and the limit.
"""

import secrets
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from cluster.chat_encoding import Message
from cluster.errors import ContextTooLong, InvalidRequest, echo
from workers.request import SamplingParams

T = TypeVar("T")
Name = Annotated[str, msgspec.Meta(min_length=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]
Top = Annotated[int, msgspec.Meta(ge=0, le=20)]
Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]

GREEDY_BELOW = 1e-5  # a temperature so small that dividing by it may overflow; greedy, as in vLLM
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
PARAM_CHARS, MESSAGE_CHARS = 100, 300  # an error repeats no more of what a client wrote

IGNORED = frozenset(
    {"user", "metadata", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier"}
)
# The values besides null with which a field that is not supported changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {"n": (1,), "store": (False,)}
CHAT_NEUTRAL = NEUTRAL | {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
COMPLETION_NEUTRAL = NEUTRAL | {"best_of": (1,), "echo": (False,), "suffix": ()}
MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "prefix": (False,),
    "refusal": (),
    "tool_calls": ([],),
}
MESSAGE_IGNORED = frozenset({"name"})


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the served model can take, and the sampling its makers recommend."""

    max_context: int  # tokens of prompt and answer
    vocab_size: int
    temperature: float = 1.0
    top_p: float = 1.0


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted; nothing is ever padded


class Thinking(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    type: Literal["enabled", "disabled"]


class TemplateArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    thinking: bool


class DebugOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    selected_pages: bool = False


class GenerationRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What both kinds of request share: OpenAI's fields, extras of vLLM and llama.cpp, and `debug`."""

    model: Name
    max_tokens: Count | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31)] = 0  # 0 and -1: off
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.01, le=100)] = 1.0
    logit_bias: Annotated[dict[str, Bias], msgspec.Meta(max_length=1024)] = {}
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], msgspec.Meta(max_length=4)] = []
    stop_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=64)] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_progress: bool = False  # llama.cpp's
    debug: DebugOptions | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def selected_pages(self) -> bool:
        """Whether the reply is to say which pages the indexer selected."""
        return self.debug is not None and self.debug.selected_pages

    @property
    def num_logprobs(self) -> int | None:
        """None: none wanted; n: the sampled token's and those of the n best."""
        raise NotImplementedError

    @property
    def max_output(self) -> int | None:
        """Tokens of the answer; None: whatever the context leaves."""
        raise NotImplementedError

    def check(self, limits: Limits) -> None:
        """Raises InvalidRequest for what no single field shows."""
        if self.stream_options is not None and not self.stream:
            raise _invalid("stream_options", "is allowed only where stream is true")
        if self.return_progress and not self.stream:
            raise _invalid("return_progress", "is allowed only where stream is true")
        if self.selected_pages and self.stops:
            # A stop string is found in the gateway: the worker does not know then that its last token was the last.
            raise _invalid("debug.selected_pages", "is not supported together with stop")
        _check_ids("stop_token_ids", self.stop_token_ids, limits)
        for key in self.logit_bias:
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < limits.vocab_size):
                raise _invalid("logit_bias", f"{echo(key)} is not a token id below {limits.vocab_size}")

    def sampling(self, limits: Limits, num_prompt_tokens: int) -> SamplingParams:
        """Everything a worker needs; a seed is drawn where none was given. Raises ContextTooLong."""
        room = limits.max_context - num_prompt_tokens
        max_tokens = room if self.max_output is None else self.max_output
        if room < max(1, max_tokens):
            raise ContextTooLong(
                f"the prompt has {num_prompt_tokens} tokens and {max(1, max_tokens)} are wanted for the answer, "
                f"but the context holds {limits.max_context}"
            )
        temperature = limits.temperature if self.temperature is None else self.temperature
        return SamplingParams(
            max_tokens=max_tokens,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            temperature=0.0 if temperature < GREEDY_BELOW else temperature,
            top_p=limits.top_p if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias={int(key): bias for key, bias in self.logit_bias.items()},
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=self.num_logprobs,
        )


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: Count | None = None  # OpenAI's newer name; it wins over max_tokens
    logprobs: bool = False
    top_logprobs: Top | None = None
    thinking: Thinking | None = None  # DeepSeek's switch
    chat_template_kwargs: TemplateArguments | None = None  # vLLM's

    @property
    def thinks(self) -> bool:
        """Whether the model is to reason before it answers; off unless asked for."""
        if self.thinking is not None:
            return self.thinking.type == "enabled"
        return self.chat_template_kwargs is not None and self.chat_template_kwargs.thinking

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def max_output(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if self.top_logprobs is not None and not self.logprobs:
            raise _invalid("top_logprobs", "is allowed only where logprobs is true")
        arguments = self.chat_template_kwargs
        if arguments is not None and arguments.thinking != self.thinks:
            raise _invalid("chat_template_kwargs.thinking", "contradicts thinking.type")
        for index, message in enumerate(self.messages):
            if message.role != "assistant" and message.content is None:
                raise _invalid(f"messages[{index}].content", "is required")
            if message.role != "assistant" and message.reasoning_content is not None:
                raise _invalid(f"messages[{index}].reasoning_content", "belongs to assistant messages only")


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    prompt: Name | Annotated[list[TokenId], msgspec.Meta(min_length=1)]
    logprobs: Top | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def max_output(self) -> int | None:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if isinstance(self.prompt, list):
            _check_ids("prompt", self.prompt, limits)


def parse_chat(body: bytes, limits: Limits) -> ChatRequest:
    """Reads the body of /v1/chat/completions. Raises InvalidRequest."""
    fields = _pick(_decode(body), ChatRequest, CHAT_NEUTRAL, IGNORED)
    if isinstance(messages := fields.get("messages"), list):
        fields["messages"] = [
            _message(message, f"messages[{index}]") for index, message in enumerate(messages)
        ]
    request = _convert(fields, ChatRequest)
    request.check(limits)
    return request


def parse_completion(body: bytes, limits: Limits) -> CompletionRequest:
    """Reads the body of /v1/completions. A list of one prompt is that prompt. Raises InvalidRequest."""
    fields = _pick(_decode(body), CompletionRequest, COMPLETION_NEUTRAL, IGNORED)
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise _invalid("prompt", "a list of several prompts is not supported")
        fields["prompt"] = prompt[0]
    request = _convert(fields, CompletionRequest)
    request.check(limits)
    return request


def _decode(body: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not valid UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is not valid JSON: it is nested too deeply") from None
    except msgspec.DecodeError as error:
        sentence = str(error).removeprefix("JSON is malformed: ")
        raise InvalidRequest(f"the body is not valid JSON: {sentence}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    return value


def _pick(
    raw: dict[str, Any],
    struct: type[msgspec.Struct],
    neutral: dict[str, tuple[Any, ...]],
    ignored: frozenset[str],
    prefix: str = "",
) -> dict[str, Any]:
    """The fields of `struct` that are set. Refuses by name what would have to have an effect but cannot."""
    fields = {}
    for name, value in raw.items():
        if name in struct.__struct_fields__:
            if value is not None:
                fields[name] = value
        elif name in neutral:
            if value is not None and not any(_same(value, allowed) for allowed in neutral[name]):
                only = " or ".join(msgspec.json.encode(allowed).decode() for allowed in neutral[name])
                raise _invalid(
                    prefix + name, f"is not supported other than {only}" if only else "is not supported"
                )
        elif name not in ignored:
            raise _invalid(prefix + name, "is not a field that is known here")
    return fields


def _message(raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        return raw
    role = raw.get("role")
    if role in ("developer", "tool", "function"):
        raise _invalid(f"{where}.role", f"{role} is not supported")
    if isinstance(role, str) and role not in ("system", "user", "assistant"):
        raise _invalid(f"{where}.role", f"must be system, user or assistant, not {echo(role)}")
    return _pick(raw, Message, MESSAGE_NEUTRAL, MESSAGE_IGNORED, f"{where}.")


def _same(value: Any, allowed: Any) -> bool:
    return type(value) is type(allowed) and value == allowed  # True == 1


def _convert(fields: dict[str, Any], to: type[T]) -> T:
    try:
        return msgspec.convert(fields, to)
    except msgspec.ValidationError as error:
        sentence, _, where = str(error).partition(" - at ")
    path = where.strip("`").removeprefix("key` in `").removeprefix("$").removeprefix(".")
    sentence, missing, name = sentence.partition("Object missing required field ")
    if missing:
        path, sentence = ".".join(filter(None, [path, name.strip("`")])), "is required"
    raise _invalid(path, sentence.replace(" | null", ""))


def _check_ids(param: str, ids: list[int], limits: Limits) -> None:
    for index, token in enumerate(ids):
        if token >= limits.vocab_size:
            raise _invalid(f"{param}[{index}]", f"token ids must be below {limits.vocab_size}")


def _invalid(param: str, sentence: str) -> InvalidRequest:
    param = param[:PARAM_CHARS]
    return InvalidRequest(f"{param}: {sentence}"[:MESSAGE_CHARS], param=param)
