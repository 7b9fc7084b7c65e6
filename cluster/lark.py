"""Grammars in llguidance's Lark-like language, rule by rule. Knows nothing of chats or requests.

The lexer always takes the longest terminal. So alternatives may share a beginning only as far as one of them has a terminal of
its own there: text is written in pieces as long as possible, from one marker to the next.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.json_schema import with_exact_dates

# What may stand between the parts of JSON: a space, or a new line and its indent. A model that is unsure would write space for
# ever.
_WHITESPACE = r" |\n[ \t]{0,32}"
# Without \u: half a surrogate pair is no text. Python's json module would take it, other readers would not.
_JSON_OPTIONS = {"whitespace_pattern": _WHITESPACE, "json_allowed_escapes": 'nrbtf\\"'}


class Lark:
    """A grammar that is being written.

    markers: those of the chat format that are tokens of their own; others are spelled out as text
    """

    def __init__(self, markers: Mapping[str, int]) -> None:
        self._markers = markers
        names = sorted(markers, key=len, reverse=True)
        self._any_marker = re.compile("|".join(map(re.escape, names))) if names else None
        self._lines: list[str] = []
        self._names: dict[str, str] = {}

    def start(self, expression: str) -> str:
        """The whole grammar."""
        return "\n".join([f"start: {expression}", *self._lines, ""])

    def rule(self, expression: str) -> str:
        """The name of a rule for the expression."""
        return self._named("r", expression)

    def terminal(self, expression: str) -> str:
        return self._named("T", expression)

    def choice(self, alternatives: Sequence[str]) -> str:
        return self.rule(" | ".join(alternatives))

    def json(self, schema: Any) -> str:
        """A JSON value that the schema allows. The schema was checked."""
        exact = with_exact_dates(schema if isinstance(schema, dict) else {"allOf": [schema]})
        return self.rule(f"%json {json.dumps(exact | {'x-guidance': _JSON_OPTIONS})}")

    def text(self, text: str) -> str:
        """Exactly this text; markers in it are what the tokenizer makes of them."""
        plain, rest = self.split(text)
        return " ".join(filter(None, [literal(plain), rest]))

    def split(self, text: str) -> tuple[str, str]:
        """The text before the first marker that is a token, and an expression for the rest."""
        found = self._any_marker.search(text) if self._any_marker else None
        if found is None:
            return text, ""
        marker = f"<[{self._markers[found.group()]}]>"
        return text[: found.start()], " ".join(filter(None, [marker, self.text(text[found.end() :])]))

    def until(self, terminal: str, text: str) -> str:
        """What matches the terminal, up to and with the text. The terminal must not match what the text has of a marker."""
        plain, rest = self.split(text)
        head = self.terminal(f"{terminal} {literal(plain)}") if plain else terminal
        return " ".join(filter(None, [head, rest]))

    def without(self, pattern: str, word: str) -> str:
        """A terminal for what the regular expression matches and in which the word does not occur."""
        return self.terminal(rf"/{pattern}/ & ~/(?s:.*){re.escape(word)}(?s:.*)/")

    def _named(self, prefix: str, expression: str) -> str:
        name = self._names.get(expression)
        if name is None:
            name = self._names[expression] = f"{prefix}{len(self._names)}"
            self._lines.append(f"{name}: {expression}")
        return name


def literal(text: str) -> str:
    """Nothing for no text."""
    return json.dumps(text, ensure_ascii=False) if text else ""
