"""The chat format of one checkpoint: messages to token ids, and a parser for the reply.

V3.2 and V3.2-Exp have one architecture and one config.json; what they can be told apart by is the chat template. V3.2-Exp has
one, V3.2 has none (a folder `encoding` instead). `chat_encoding` in the configuration decides where that is not enough.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

from cluster import chat_encoding_exp, chat_encoding_v32
from cluster.chat_encoding import CALLS, CALLS_BEGIN, DSML, TURNS, ChatFormat, Message, opens_thought
from cluster.reply_parser import ReplyParser
from cluster.reply_parser_exp import ExpParser
from cluster.reply_parser_v32 import V32Parser
from cluster.tokenizer import Tokenizer
from cluster.tools import ResponseFormat, Tool

_RENDER = {"v3.2": chat_encoding_v32.render, "v3.2-exp": chat_encoding_exp.render}
_TOKENS = {"v3.2": TURNS, "v3.2-exp": (*TURNS, *CALLS)}
_HINT = "set chat_encoding to v3.2 or v3.2-exp"


class Prompt(NamedTuple):
    tokens: list[int]
    thinking: bool  # the reply begins with reasoning


class ChatCodec:
    def __init__(self, tokenizer: Tokenizer, name: ChatFormat) -> None:
        """Raises ValueError where the tokenizer lacks a token of the format."""
        for token in _TOKENS[name]:
            if token not in tokenizer.special_ids:
                raise ValueError(f"the chat format {name} needs a token {token}, which the tokenizer has not")
        self.name = name
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer, name: ChatFormat | None = None) -> Self:
        """name None: by what is in the checkpoint. Raises ValueError."""
        return cls(tokenizer, name or chat_format_of(folder))

    def encode(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool,
        tools: Sequence[Tool] = (),
        response_format: ResponseFormat | None = None,
    ) -> Prompt:
        """Raises InvalidRequest naming messages[i] where the order cannot be written in the model's format."""
        pieces = _RENDER[self.name](messages, thinking=thinking, tools=tools, response_format=response_format)
        return Prompt(self._tokenizer.encode(pieces), opens_thought(pieces))

    def parser(self) -> ReplyParser:
        """Of one reply to a prompt with tools."""
        if self.name == "v3.2":
            return V32Parser(marked=DSML in self._tokenizer.special_ids)
        return ExpParser()


def chat_format_of(folder: Path) -> ChatFormat:
    """Raises ValueError where the checkpoint has a chat template of another kind, or cannot be read."""
    if (folder / "encoding" / "encoding_dsv32.py").exists():
        return "v3.2"
    template = _template(folder)
    if template is None or DSML in template:
        return "v3.2"
    if CALLS_BEGIN in template:
        return "v3.2-exp"
    raise ValueError(f"{folder}: its chat template is neither V3.2's nor V3.2-Exp's; {_HINT}")


def _template(folder: Path) -> str | None:
    """Of a file of its own, or of tokenizer_config.json."""
    for file in (folder / "chat_template.jinja", folder / "assets" / "chat_template.jinja"):
        if file.exists():
            return file.read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}; {_HINT}") from None
    template = config.get("chat_template")
    return (
        None if template is None else json.dumps(template, ensure_ascii=False)
    )  # a text, or several by name
