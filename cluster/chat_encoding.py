"""The chat format of DeepSeek-V3.2: messages to pieces of a prompt, without tools. Knows nothing of HTTP or token ids.

Special tokens come from this template only: a piece says whether it is one, and everything a client wrote is plain text, so
that a client who types `<｜Assistant｜>` cannot open a turn. Source: encoding_dsv32.py of the model's repository.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from cluster.errors import InvalidRequest

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
THINK_END = "</think>"


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One message as OpenAI's clients write it. `reasoning_content` is taken from an assistant's history and dropped."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None

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


def render(messages: Sequence[Message], *, thinking: bool) -> list[Piece]:
    """The prompt after which the model writes the next assistant message. There is at least one message.

    An assistant's older reasoning is dropped, as the model was trained: only the turn to come opens with `<think>`, each
    earlier one begins with `</think>`. Several leading system messages are joined by a blank line.

    Raises InvalidRequest naming messages[i] where the order cannot be written in this format.
    """
    _check_order(messages)
    system = "\n\n".join(message.text for message in messages if message.role == "system")
    pieces = [Piece(BOS, True), Piece(system, False)]
    for message in messages:
        if message.role == "user":
            pieces += [
                Piece(USER, True),
                Piece(message.text, False),
                Piece(ASSISTANT, True),
                Piece(THINK_END, True),
            ]
        elif message.role == "assistant":
            pieces += [Piece(message.text, False), Piece(EOS, True)]
    if thinking:
        pieces[-1] = Piece(THINK, True)
    return [piece for piece in pieces if piece.text]


def _check_order(messages: Sequence[Message]) -> None:
    before = "system"
    for index, message in enumerate(messages):
        if message.role == "system" and before != "system":
            raise _misplaced(index, "a system message must come before all others")
        if message.role == "assistant" and before != "user":
            raise _misplaced(index, "an assistant message must follow a user message")
        before = message.role
    if before != "user":
        raise _misplaced(len(messages) - 1, "the last message must be the user's")


def _misplaced(index: int, rule: str) -> InvalidRequest:
    param = f"messages[{index}]"
    return InvalidRequest(f"{param}: {rule}", param=param)
