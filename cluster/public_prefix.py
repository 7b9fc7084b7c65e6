"""How much of a prompt is the operator's own text, whose cached pages all tenants may share.

Only full pages that lie wholly inside a configured prefix are public, so that no page which a tenant has a token in is ever
named so. The gateway counts them, and workers are told how many: both name pages with `workers.page_hash`. Knows nothing of
HTTP or of who asks.
"""

from collections.abc import Sequence
from typing import Self

from cluster.chat_codec import ChatCodec
from cluster.chat_encoding import Message
from cluster.config import PublicPrefixConfig
from cluster.errors import InvalidRequest
from cluster.tokenizer import Tokenizer
from kernels.layout import PAGE_SIZE


class PublicPrefixes:
    def __init__(self, prefixes: Sequence[Sequence[int]]) -> None:
        self._prefixes = [list(prefix) for prefix in prefixes]

    @classmethod
    def load(cls, configs: Sequence[PublicPrefixConfig], tokenizer: Tokenizer, codec: ChatCodec) -> Self:
        """Raises ValueError where one cannot be written in the model's format, or has no full page."""
        prefixes = []
        for number, config in enumerate(configs):
            try:
                found = _tokens(config, tokenizer, codec)
            except InvalidRequest as error:
                raise ValueError(f"public_prefixes[{number}]: {error}") from None
            longest = max(map(len, found))
            if longest < PAGE_SIZE:
                raise ValueError(
                    f"public_prefixes[{number}] has {longest} tokens: only whole pages of {PAGE_SIZE} are shared"
                )
            prefixes += found
        return cls(prefixes)

    def num_pages(self, prompt: Sequence[int]) -> int:
        """How many of the prompt's leading full pages are public."""
        return max((_pages_in_common(prefix, prompt) for prefix in self._prefixes), default=0)


def _tokens(config: PublicPrefixConfig, tokenizer: Tokenizer, codec: ChatCodec) -> list[list[int]]:
    """One prefix as every kind of request writes it."""
    if config.tokens is not None:
        return [config.tokens]
    assert config.file is None, "files are read before the service starts"
    messages = config.messages or [Message(role="system", content=config.text)]
    chats = [_chat(messages, codec, thinking=thinking) for thinking in (False, True)]
    return chats if config.text is None else [tokenizer.encode_prompt(config.text), *chats]


def _chat(messages: Sequence[Message], codec: ChatCodec, *, thinking: bool) -> list[int]:
    """The tokens that every chat which begins with these messages begins with."""
    if messages[-1].role in ("user", "tool"):
        return codec.encode(messages, thinking=thinking).tokens
    one, other = (
        codec.encode([*messages, Message(role="user", content=text)], thinking=thinking).tokens
        for text in "ab"
    )
    return one[: next(i for i in range(len(one)) if one[i] != other[i])]


def _pages_in_common(prefix: Sequence[int], prompt: Sequence[int]) -> int:
    most = min(len(prefix), len(prompt)) // PAGE_SIZE
    pages = (slice(PAGE_SIZE * i, PAGE_SIZE * (i + 1)) for i in range(most))
    return next((i for i, page in enumerate(pages) if prefix[page] != prompt[page]), most)
