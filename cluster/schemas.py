"""The bodies of /v1/chat/completions and /v1/completions, strictly read. Knows nothing of text encoding or of workers.

A field is known, accepted and without effect (`IGNORED`), accepted with a neutral value only (`*_NEUTRAL`), or refused by
name. A null is an absent field. Whatever is wrong, the error is an InvalidRequest that names the field and the limit.
"""

import secrets
from typing import Annotated, Any, Literal

import msgspec

from cluster.bodies import convert, decode, invalid, pick
from cluster.chat_encoding import Message, check_fields
from cluster.errors import ContextTooLong, InvalidRequest, echo
from cluster.tools import (
    ResponseFormat,
    TextFormat,
    Tool,
    ToolCall,
    ToolChoice,
    Tools,
    check_tools,
    must_call,
)
from workers.request import Grammar, SamplingParams

Name = Annotated[str, msgspec.Meta(min_length=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
TokenId = Annotated[int, msgspec.Meta(ge=0)]
TokenIds = Annotated[list[TokenId], msgspec.Meta(min_length=1)]
Top = Annotated[int, msgspec.Meta(ge=0, le=20)]
Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
Bias = Annotated[float, msgspec.Meta(ge=-100, le=100)]

GREEDY_BELOW = 1e-5  # a temperature so small that dividing by it may overflow; greedy, as in vLLM
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
MAX_CHOICES = 128  # OpenAI's limit of n; here of n times the prompts

IGNORED = frozenset({"user", "metadata", "service_tier", "prompt_cache_key", "safety_identifier"})
# The values besides null with which a field that is not supported changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {"store": (False,)}
CHAT_NEUTRAL = NEUTRAL | {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}
COMPLETION_NEUTRAL = NEUTRAL | {"best_of": (1,), "suffix": ()}
MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}
MESSAGE_IGNORED = frozenset({"name"})
ROLES = ("system", "developer", "user", "assistant", "tool")


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
    min_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0  # vLLM's
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHOICES)] = 1
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
    def num_prompts(self) -> int:
        return 1

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
            raise invalid("stream_options", "is allowed only where stream is true")
        if self.return_progress and not self.stream:
            raise invalid("return_progress", "is allowed only where stream is true")
        if self.n * self.num_prompts > MAX_CHOICES:
            raise invalid(
                "n", f"{self.num_prompts} prompts with n {self.n} are more than {MAX_CHOICES} choices"
            )
        if self.n * self.num_prompts > 1:
            for param, wanted in (
                ("return_progress", self.return_progress),
                ("debug.selected_pages", self.selected_pages),
            ):
                if wanted:
                    raise invalid(param, "is supported only for a single choice")
        if self.max_output is not None and self.min_tokens > self.max_output:
            raise invalid("min_tokens", f"is more than the {self.max_output} tokens wanted for the answer")
        if self.selected_pages and self.stops:
            # A stop string is found in the gateway: the worker does not know then that its last token was the last.
            raise invalid("debug.selected_pages", "is not supported together with stop")
        _check_ids("stop_token_ids", self.stop_token_ids, limits)
        for key in self.logit_bias:
            if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < limits.vocab_size):
                raise invalid("logit_bias", f"{echo(key)} is not a token id below {limits.vocab_size}")

    def sampling(
        self, limits: Limits, num_prompt_tokens: int, grammar: Grammar | None = None
    ) -> SamplingParams:
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
            min_tokens=self.min_tokens,
            logprobs=self.num_logprobs,
            grammar=grammar,
        )


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: Count | None = None  # OpenAI's newer name; it wins over max_tokens
    logprobs: bool = False
    top_logprobs: Top | None = None
    thinking: Thinking | None = None  # DeepSeek's switch
    chat_template_kwargs: TemplateArguments | None = None  # vLLM's
    tools: Tools = []
    tool_choice: ToolChoice | None = None  # None: auto
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None

    @property
    def offered_tools(self) -> list[Tool]:
        """Those that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

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
            raise invalid("top_logprobs", "is allowed only where logprobs is true")
        arguments = self.chat_template_kwargs
        if arguments is not None and arguments.thinking != self.thinks:
            raise invalid("chat_template_kwargs.thinking", "contradicts thinking.type")
        check_fields(self.messages)
        check_tools(self.tools, self.tool_choice)
        is_free = isinstance(self.response_format, TextFormat | None) and not must_call(self.tool_choice)
        if self.messages[-1].prefix and not is_free:
            # A grammar begins with the answer; it would not know of the text before.
            param = f"messages[{len(self.messages) - 1}].prefix"
            raise invalid(param, "is not supported together with response_format or a call that must be made")


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """`parse_completion` makes a list of a single prompt."""

    prompt: Annotated[list[Name | TokenIds], msgspec.Meta(min_length=1)]
    echo: bool = False
    logprobs: Top | None = None

    @property
    def num_prompts(self) -> int:
        return len(self.prompt)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def max_output(self) -> int | None:
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if self.echo and self.logprobs is not None:
            raise invalid("echo", "is not supported together with logprobs")
        for index, prompt in enumerate(self.prompt):
            if isinstance(prompt, list):
                _check_ids(f"prompt[{index}]", prompt, limits)


def parse_chat(body: bytes, limits: Limits) -> ChatRequest:
    """Reads the body of /v1/chat/completions. Raises InvalidRequest."""
    fields = read_messages(pick(decode(body), ChatRequest, CHAT_NEUTRAL, IGNORED))
    request = convert(fields, ChatRequest)
    request.check(limits)
    return request


def parse_completion(body: bytes, limits: Limits) -> CompletionRequest:
    """Reads the body of /v1/completions. Raises InvalidRequest."""
    fields = pick(decode(body), CompletionRequest, COMPLETION_NEUTRAL, IGNORED)
    prompt = fields.get("prompt")
    is_list = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)
    if prompt is not None and not is_list:
        fields["prompt"] = [prompt]
    try:
        request = convert(fields, CompletionRequest)
        request.check(limits)
    except InvalidRequest as error:
        if is_list or error.param is None or not error.param.startswith("prompt[0]"):
            raise
        # The client wrote no list of prompts, so its error names none.
        param = error.param.replace("prompt[0]", "prompt", 1)
        raise InvalidRequest(error.message.replace(error.param, param, 1), param=param) from None
    return request


def read_messages(fields: dict[str, Any]) -> dict[str, Any]:
    """The same fields, with the messages' own fields picked. Raises InvalidRequest."""
    messages = fields.get("messages")
    if not isinstance(messages, list):
        return fields
    read = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    return fields | {"messages": read}


def _message(raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        return raw
    role = raw.get("role")
    if isinstance(role, str) and role not in ROLES:
        raise invalid(f"{where}.role", f"must be one of {', '.join(ROLES)}, not {echo(role)}")
    fields = pick(raw, Message, MESSAGE_NEUTRAL, MESSAGE_IGNORED, f"{where}.")
    if isinstance(calls := fields.get("tool_calls"), list):
        fields["tool_calls"] = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return fields


def _call(raw: Any, where: str) -> Any:
    """A client that put the deltas of a stream together may have kept their index."""
    return pick(raw, ToolCall, {}, frozenset({"index"}), f"{where}.") if isinstance(raw, dict) else raw


def _check_ids(param: str, ids: list[int], limits: Limits) -> None:
    for index, token in enumerate(ids):
        if token >= limits.vocab_size:
            raise invalid(f"{param}[{index}]", f"token ids must be below {limits.vocab_size}")
