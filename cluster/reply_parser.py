"""What the parsers of both chat formats share: the answer's text comes in, content and tool calls go out. Knows no tokens.

Special tokens must not be confused with the same characters written as plain text. A parser therefore names the special
tokens it wants to know of (`marks`), each with a character that no decoded text contains: a lone surrogate. The text that it
is given has that character where the model wrote the token.

Whatever the text's boundaries cut through, all the deltas together are the same.
"""

import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

_FIRST_MARK = 0xD800


class CallDelta(NamedTuple):
    """What is new of one call; `id` and `name` come once, with the first."""

    number: int  # among the answer's calls, from 0
    id: str = ""
    name: str = ""
    arguments: str = ""


class Parsed(NamedTuple):
    content: str = ""
    calls: tuple[CallDelta, ...] = ()


class ReplyParser(Protocol):
    """Reads one answer."""

    @property
    def marks(self) -> Mapping[str, str]:
        """Characters by the names of the special tokens they stand for."""

    def push(self, text: str) -> Parsed: ...

    def finish(self, *, cut: bool) -> Parsed:
        """What was held back. cut: the answer ended before the model had ended it."""


def joined(calls: Iterable[CallDelta]) -> tuple[CallDelta, ...]:
    """Each call in one piece."""
    whole: dict[int, CallDelta] = {}
    for call in calls:
        old = whole.get(call.number)
        if old is not None:
            call = CallDelta(
                call.number, old.id + call.id, old.name + call.name, old.arguments + call.arguments
            )
        whole[call.number] = call
    return tuple(whole.values())


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def marks_of(names: Iterable[str]) -> dict[str, str]:
    return {name: chr(_FIRST_MARK + number) for number, name in enumerate(names)}


class Sink:
    """Gathers what one push gives. White space after a call is held back until other text follows."""

    def __init__(self, marks: Mapping[str, str], new_id: Callable[[], str]) -> None:
        self._names = {ord(character): name for name, character in marks.items()}
        self._new_id = new_id
        self._content: list[str] = []
        self._calls: list[CallDelta] = []
        self._blank: list[str] | None = None  # held back white space; None: nothing is to be held back
        self._num_calls = 0

    def named(self, text: str) -> str:
        """With the special tokens' names instead of their marks."""
        return text.translate(self._names)

    def content(self, text: str) -> None:
        """Text of the model's that is no markup, or none that can be understood."""
        if self._blank is not None:
            if not text or text.isspace():
                self._blank.append(text)
                return
            self._content += self._blank
            self._blank = None
        self._content.append(self.named(text))

    def after_markup(self) -> None:
        """White space up to here belonged to the markup, and so may what follows."""
        self._blank = []

    def call(self, name: str) -> None:
        self._calls.append(CallDelta(self._num_calls, self._new_id(), name))
        self._num_calls += 1

    def arguments(self, text: str) -> None:
        """Of the last call."""
        if text:
            self._calls.append(CallDelta(self._num_calls - 1, arguments=self.named(text)))

    def take(self) -> Parsed:
        """What has come since the last time."""
        parsed = Parsed("".join(self._content), joined(self._calls))
        self._content, self._calls = [], []
        return parsed
