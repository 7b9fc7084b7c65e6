"""Reads DeepSeek-V3.2's tool calls, in DSML, out of a streamed answer.

  "\\n\\n<｜DSML｜function_calls>\\n"                                          up to two line breaks before it are its own
  "<｜DSML｜invoke name="f">\\n"
  "<｜DSML｜parameter name="p" string="true">raw text</｜DSML｜parameter>\\n"   streamed, escaped
  "<｜DSML｜parameter name="q" string="false">[1, 2]</｜DSML｜parameter>\\n"    in one piece: only then is it known to be JSON
  "</｜DSML｜invoke>\\n</｜DSML｜function_calls>"

A missing closing tag of a call is read as if it were there, a value that is not JSON as a string. Any other text between tags,
and a tag that is none of these, is content.
"""

import json
import re
from collections.abc import Callable, Mapping

import msgspec

from cluster.chat_encoding import DSML
from cluster.reply_parser import Parsed, Sink, marks_of, new_call_id

MAX_TAG_CHARS = 1024  # more is no tag
_LINE_BREAKS = 2  # before the first tag


class V32Parser:
    """marked: whether `｜DSML｜` is a token of its own; otherwise it is plain text."""

    def __init__(self, *, marked: bool, new_id: Callable[[], str] = new_call_id) -> None:
        self._marks = marks_of([DSML] if marked else [])
        self._mark = self._marks.get(DSML, DSML)
        self._sink = Sink(self._marks, new_id)
        self._begin = f"<{self._mark}function_calls>"
        self._end = f"</{self._mark}function_calls>"
        self._call_end = f"</{self._mark}invoke>"
        self._value_end = f"</{self._mark}parameter>"
        self._tag_starts = re.compile(f"</?{self._mark}")
        self._call = re.compile(rf'<{self._mark}invoke\s+name="([^"]+)"\s*>')
        self._parameter = re.compile(
            rf'<{self._mark}parameter\s+name="([^"]*)"(?:\s+string="(true|false)")?\s*>'
        )
        self._text = ""  # not yet understood
        self._read = self._read_content
        self._num_parameters: int | None = None  # of the call that is open; None: none is
        self._value: list[str] = []  # of a parameter that is not a string

    @property
    def marks(self) -> Mapping[str, str]:
        return self._marks

    def push(self, text: str) -> Parsed:
        self._text += text
        while self._read():
            pass
        return self._sink.take()

    def finish(self, *, cut: bool) -> Parsed:
        text, self._text = self._text, ""
        if cut and self._mark[0] in text:
            text = ""  # half a tag
        if self._read == self._read_string:
            self._sink.arguments(_escape(text))
        elif self._read == self._read_value:
            self._sink.arguments("".join([*self._value, text]))
        else:
            self._sink.content(text)
            if not cut:
                self._close_call()
        return self._sink.take()

    def _read_content(self) -> bool:
        """Each reader takes what it can from `_text`, and says whether the next one may find more there."""
        before, found, rest = self._text.partition(self._begin)
        if found:
            self._sink.content(before[: _without_line_breaks(before)])
            self._open(rest)
            return True
        kept = len(before) - _overlap(before, self._begin)
        kept = _without_line_breaks(before[:kept])
        self._sink.content(before[:kept])
        self._text = before[kept:]
        return False

    def _open(self, rest: str) -> None:
        self._sink.after_markup()
        self._text = rest
        self._read = self._read_tag

    def _read_tag(self) -> bool:
        found = self._tag_starts.search(self._text)
        if found is None:
            kept = len(self._text) - max(_overlap(self._text, self._begin), _overlap(self._text, self._end))
            self._sink.content(self._text[:kept])
            self._text = self._text[kept:]
            return False
        self._sink.content(self._text[: found.start()])
        self._text = self._text[found.start() :]
        length = _tag_length(self._text[:MAX_TAG_CHARS])
        if length is None and len(self._text) < MAX_TAG_CHARS:
            return False
        if length is None or not self._take_tag(self._text[:length]):
            self._sink.content(self._text[0])
            self._text = self._text[1:]
            return True
        self._text = self._text[length:]
        self._sink.after_markup()
        return True

    def _take_tag(self, tag: str) -> bool:
        """Whether it is one that can stand here."""
        if tag == self._end:
            self._close_call()
            self._read = self._read_content
        elif call := self._call.fullmatch(tag):
            self._close_call()
            self._num_parameters = 0
            self._sink.call(call[1])
        elif self._num_parameters is None:
            return False
        elif tag == self._call_end:
            self._close_call()
        elif parameter := self._parameter.fullmatch(tag):
            self._open_value(parameter[1], is_string=parameter[2] == "true")
        else:
            return False
        return True

    def _open_value(self, name: str, *, is_string: bool) -> None:
        assert self._num_parameters is not None
        before = ", " if self._num_parameters else "{"
        self._num_parameters += 1
        self._sink.arguments(f'{before}"{_escape(name)}": ' + ('"' if is_string else ""))
        self._read = self._read_string if is_string else self._read_value

    def _close_call(self) -> None:
        if self._num_parameters is not None:
            self._sink.arguments("}" if self._num_parameters else "{}")
            self._num_parameters = None

    def _read_string(self) -> bool:
        text, ended = self._take_value()
        self._sink.arguments(_escape(text) + ('"' if ended else ""))
        return ended

    def _read_value(self) -> bool:
        text, ended = self._take_value()
        self._value.append(text)
        if ended:
            value = self._sink.named("".join(self._value))
            self._value = []
            self._sink.arguments(value if _is_json(value) else f'"{_escape(value)}"')
        return ended

    def _take_value(self) -> tuple[str, bool]:
        """Newly final text of a parameter's value, and whether it is the last."""
        text, found, rest = self._text.partition(self._value_end)
        if found:
            self._text = rest
            self._read = self._read_tag
            return text, True
        kept = len(text) - _overlap(text, self._value_end)
        self._text = text[kept:]
        return text[:kept], False


def _overlap(text: str, word: str) -> int:
    """How much of the text's end is a beginning of the word."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)


def _without_line_breaks(text: str) -> int:
    """The length of the text but for the line breaks at its end, at most those that belong to a tag."""
    length = len(text)
    while length and len(text) - length < _LINE_BREAKS and text[length - 1] == "\n":
        length -= 1
    return length


def _tag_length(text: str) -> int | None:
    """Up to the first `>` outside quotes."""
    quoted = False
    for index, character in enumerate(text):
        if character == '"':
            quoted = not quoted
        elif character == ">" and not quoted:
            return index + 1
    return None


def _escape(text: str) -> str:
    """As the inside of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
