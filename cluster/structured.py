"""Grammars that workers will be able to follow: drafted, then compiled as a worker does, with the same limits.

What fails is refused here, by the name of its field, so that no worker sees it. Knows nothing of HTTP.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from cluster.chat_encoding import ChatFormat
from cluster.errors import InvalidRequest
from cluster.grammars import draft
from cluster.tokenizer import Tokenizer
from cluster.tools import ResponseFormat, Tool, ToolChoice
from workers.grammar import Compiler, GrammarError, load_compiler
from workers.model_config import ModelConfig
from workers.request import Grammar

MAX_CHARS = 256 * 2**10  # of a grammar, which goes to two workers with each request
MAX_REASON_CHARS = 200


class StructuredOutput:
    """For one model."""

    def __init__(self, compiler: Compiler, tokenizer: Tokenizer, chat_format: ChatFormat) -> None:
        self._compiler = compiler
        self._tokenizer = tokenizer
        self._chat_format = chat_format

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer, chat_format: ChatFormat) -> Self:
        """For the checkpoint in `folder`. Raises ValueError."""
        model = ModelConfig.load(folder)
        compiler = load_compiler(folder, vocab_size=model.vocab_size, eos_token_ids=model.eos_token_ids)
        return cls(compiler, tokenizer, chat_format)

    async def grammar(
        self,
        *,
        thinking: bool,
        tools: Sequence[Tool] = (),
        choice: ToolChoice | None = None,
        parallel: bool = True,
        response_format: ResponseFormat | None = None,
    ) -> Grammar | None:
        """What the answer must follow; None: it is free. Raises InvalidRequest naming the field that is at fault.

        A model that thinks does so freely first. The work is done on a thread: a large schema takes up to a second.
        """
        if not tools and response_format is None:
            return None
        text = await asyncio.to_thread(self._checked, tools, choice, parallel, response_format)
        return None if text is None else Grammar(text, self._tokenizer.think_end_id if thinking else None)

    def _checked(
        self,
        tools: Sequence[Tool],
        choice: ToolChoice | None,
        parallel: bool,
        response_format: ResponseFormat | None,
    ) -> str | None:
        found = draft(
            chat_format=self._chat_format,
            markers=self._tokenizer.special_ids,
            tools=tools,
            choice=choice,
            parallel=parallel,
            response_format=response_format,
        )
        if found is None:
            return None
        try:
            self._check(found.text)
        except GrammarError as error:
            for param, part in found.parts:
                self._check_part(param, part)
            param = "tools" if tools else "response_format"
            raise InvalidRequest(f"{param}: {_reason(error)}", param=param) from None
        return found.text

    def _check_part(self, param: str, part: str) -> None:
        try:
            self._check(part)
        except GrammarError as error:
            raise InvalidRequest(f"{param}: {_reason(error)}", param=param) from None

    def _check(self, text: str) -> None:
        if len(text) > MAX_CHARS:
            raise GrammarError(f"takes a grammar of {len(text)} characters; the limit is {MAX_CHARS}")
        self._compiler.check(text)


def _reason(error: GrammarError) -> str:
    reason = str(error)
    if reason.startswith("oneOf"):  # the library names an option of its own
        reason = "oneOf is supported only where no value can match two of its schemas"
    return reason[:MAX_REASON_CHARS]
