"""Reads DeepSeek-V3.2-Exp's tool calls out of a streamed answer.

  <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"p": "text"}<｜tool▁call▁end｜>...<｜tool▁calls▁end｜>

All the names are tokens of their own. Arguments are streamed as the model writes them; no arguments are `{}`. A missing end
of a call is read as if it were there. Any other text between the tokens, and a token in the wrong place, is content.
"""

import re
from collections.abc import Callable, Mapping

from cluster.chat_encoding import CALL_BEGIN, CALL_END, CALL_SEPARATOR, CALLS_BEGIN, CALLS_END
from cluster.reply_parser import Parsed, Sink, marks_of, new_call_id


class ExpParser:
    def __init__(self, *, new_id: Callable[[], str] = new_call_id) -> None:
        self._marks = marks_of([CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, CALL_SEPARATOR])
        self._names = {character: name for name, character in self._marks.items()}
        self._split = re.compile("([" + "".join(self._names) + "])")
        self._sink = Sink(self._marks, new_id)
        self._name: list[str] | None = None  # of the call that is being opened
        self._in_block = False
        self._is_open = False  # arguments are being read
        self._has_arguments = False

    @property
    def marks(self) -> Mapping[str, str]:
        return self._marks

    def push(self, text: str) -> Parsed:
        for index, part in enumerate(self._split.split(text)):
            if index % 2:
                self._take_mark(part)
            elif part:
                self._take_text(part)
        return self._sink.take()

    def finish(self, *, cut: bool) -> Parsed:
        if not cut:
            self._give_up_name()
            self._close_call()
        return self._sink.take()

    def _take_text(self, text: str) -> None:
        if self._name is not None:
            self._name.append(text)
        elif self._is_open:
            self._has_arguments |= not text.isspace()
            self._sink.arguments(text)
        else:
            self._sink.content(text)

    def _take_mark(self, mark: str) -> None:
        token = self._names[mark]
        if token == CALL_SEPARATOR and self._name is not None and "".join(self._name).strip():
            self._sink.call("".join(self._name).strip())
            self._name, self._is_open, self._has_arguments = None, True, False
            return
        self._give_up_name()
        if not self._fits(token):
            self._take_text(mark)
            return
        self._close_call()
        self._sink.after_markup()
        self._in_block = token != CALLS_END
        if token == CALL_BEGIN:
            self._name = []

    def _fits(self, token: str) -> bool:
        """Whether it can stand here."""
        if token == CALLS_BEGIN:
            return not self._in_block
        return (
            token == CALL_BEGIN
            or token == CALL_END
            and self._is_open
            or token == CALLS_END
            and self._in_block
        )

    def _give_up_name(self) -> None:
        """It was none: no separator followed."""
        if self._name is not None:
            self._sink.content(self._marks[CALL_BEGIN] + "".join(self._name))
            self._name = None

    def _close_call(self) -> None:
        if self._is_open and not self._has_arguments:
            self._sink.arguments("{}")
        self._is_open = False
