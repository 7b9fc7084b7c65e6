"""What the chat formats share: messages, their order, and the pieces of a prompt. Knows nothing of HTTP or token ids.

Special tokens come from a format's own template only: a piece says whether it is one, and everything a client wrote is plain
text, so that a client who types `<｜Assistant｜>` cannot open a turn.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from cluster.errors import InvalidRequest, echo
from cluster.tools import ToolCall

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
THINK_END = "</think>"
DSML = (
    "｜DSML｜"  # in tags like <｜DSML｜invoke>; a token of its own in some tokenizers, plain text in others
)
CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
CALLS_END = "<｜tool▁calls▁end｜>"
CALL_BEGIN = "<｜tool▁call▁begin｜>"
CALL_END = "<｜tool▁call▁end｜>"
CALL_SEPARATOR = "<｜tool▁sep｜>"
OUTPUT_BEGIN = "<｜tool▁output▁begin｜>"
OUTPUT_END = "<｜tool▁output▁end｜>"

TURNS = (BOS, EOS, USER, ASSISTANT, THINK, THINK_END)
CALLS = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, CALL_SEPARATOR, OUTPUT_BEGIN, OUTPUT_END)
_SPECIAL = re.compile("(" + "|".join(map(re.escape, (*TURNS, *CALLS, DSML))) + ")")

ChatFormat = Literal["v3.2", "v3.2-exp"]
Role = Literal["system", "developer", "user", "assistant", "tool"]


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One message as OpenAI's clients write it, with DeepSeek's `reasoning_content` and `prefix`."""

    role: Role
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None  # the call that a tool's message answers
    prefix: bool = False  # the last message is the beginning of the reply

    @property
    def text(self) -> str:
        """The content as one text; its parts become lines, as in vLLM."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class Piece(NamedTuple):
    """A stretch of a prompt: a special token's own name, or plain text in which no special token is seen."""

    text: str
    special: bool


def plain(text: str) -> Piece:
    return Piece(text, False)


def template(text: str) -> list[Piece]:
    """A format's own text, in which the names of special tokens are what they say. Never for what a client wrote."""
    parts = _SPECIAL.split(text)  # plain and special in turns
    return [Piece(part, index % 2 == 1) for index, part in enumerate(parts) if part]


def opens_thought(pieces: Sequence[Piece]) -> bool:
    """Whether the reply to this prompt begins with reasoning."""
    return pieces[-1] == Piece(THINK, True)


def to_json(value: Any, param: str) -> str:
    """As Python's json module writes it by default, but for characters beyond ASCII. Raises InvalidRequest naming `param`."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise misplaced(param, "is nested too deeply") from None


def check_fields(messages: Sequence[Message]) -> None:
    """Raises InvalidRequest naming a field of messages[i] that its role requires or does not have."""
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role != "assistant":
            if message.content is None:
                raise misplaced(f"{where}.content", "is required")
            for name in ("reasoning_content", "tool_calls", "prefix"):
                if getattr(message, name):
                    raise misplaced(f"{where}.{name}", "belongs to assistant messages only")
        if message.role == "developer" and not message.text:
            raise misplaced(f"{where}.content", "a developer's message must not be empty")
        if message.role == "tool" and message.tool_call_id is None:
            raise misplaced(f"{where}.tool_call_id", "is required")
        if message.role != "tool" and message.tool_call_id is not None:
            raise misplaced(f"{where}.tool_call_id", "belongs to tool messages only")
        if message.prefix and message.tool_calls:
            raise misplaced(f"{where}.prefix", "is not supported together with tool_calls")


def in_order(messages: Sequence[Message], *, system_anywhere: bool) -> list[Message]:
    """The messages with the results of calls in the order of the calls: the formats write no ids, so the place tells.

    system_anywhere: the format gathers system messages at the beginning, wherever they stand.

    Raises InvalidRequest naming messages[i] where the order cannot be written.
    """
    ordered = list(messages)
    before: Role = "system"
    calls: list[str] = []  # of the last assistant message, as long as its answers come
    answers: dict[str, Message] = {}
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if message.role == "system" and system_anywhere and len(answers) == len(calls):
            continue
        if message.role == "tool":
            if message.tool_call_id not in calls or message.tool_call_id in answers:
                raise misplaced(
                    f"{where}.tool_call_id",
                    f"{echo(message.tool_call_id or '')} is no unanswered call of the assistant's message before",
                )
            answers[message.tool_call_id] = message
            if len(answers) == len(calls):
                ordered[index + 1 - len(calls) : index + 1] = [answers[call] for call in calls]
        elif len(answers) < len(calls):
            raise misplaced(where, f"the call {echo(_first_open(calls, answers))} must be answered first")
        elif message.role == "assistant":
            if before not in ("user", "developer", "tool"):
                raise misplaced(where, "an assistant message must follow a user message or a tool's")
            if message.prefix and index + 1 < len(messages):
                raise misplaced(f"{where}.prefix", "is allowed in the last message only")
            calls, answers = _ids(message, where), {}
        before = message.role
    last = f"messages[{len(messages) - 1}]"
    if len(answers) < len(calls):
        raise misplaced(last, f"the call {echo(_first_open(calls, answers))} must be answered first")
    if before == "system" or before == "assistant" and not messages[-1].prefix:
        raise misplaced(
            last, "the last message must be a user's or a tool's, or an assistant's with prefix true"
        )
    return ordered


def misplaced(param: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {rule}", param=param)


def _ids(message: Message, where: str) -> list[str]:
    ids: list[str] = []
    for number, call in enumerate(message.tool_calls):
        if call.id in ids:
            raise misplaced(f"{where}.tool_calls[{number}].id", f"{echo(call.id)} is there twice")
        ids.append(call.id)
    return ids


def _first_open(calls: list[str], answers: dict[str, Message]) -> str:
    return next(call for call in calls if call not in answers)
