"""The bodies of /tokenize and /detokenize, in vLLM's names. Knows nothing of HTTP or of workers."""

from typing import Annotated

import msgspec
from msgspec import UNSET, Struct, UnsetType

from cluster.bodies import convert, decode, invalid, pick
from cluster.chat_codec import ChatCodec
from cluster.chat_encoding import Message, check_fields
from cluster.schemas import Name, TokenId, read_messages
from cluster.tokenizer import Tokenizer
from cluster.tools import Tools, check_tools


class TokenizeRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Either a raw prompt or a chat."""

    model: Name
    prompt: Name | None = None
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)] | None = None
    thinking: bool = False  # with messages: whether the model is to reason before it answers
    tools: Tools = []  # with messages
    return_token_strs: bool = False


class DetokenizeRequest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model: Name
    tokens: list[TokenId]


class Tokenized(Struct, frozen=True, kw_only=True):
    count: int
    max_model_len: int  # tokens of prompt and answer
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET


class Detokenized(Struct, frozen=True, kw_only=True):
    prompt: str


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Raises InvalidRequest."""
    fields = read_messages(pick(decode(body), TokenizeRequest, {}, frozenset()))
    request = convert(fields, TokenizeRequest)
    if (request.prompt is None) == (request.messages is None):
        raise invalid("prompt", "either prompt or messages is required")
    check_fields(request.messages or [])
    check_tools(request.tools, None)
    return request


def parse_detokenize(body: bytes, vocab_size: int) -> DetokenizeRequest:
    """Raises InvalidRequest."""
    request = convert(pick(decode(body), DetokenizeRequest, {}, frozenset()), DetokenizeRequest)
    for index, token in enumerate(request.tokens):
        if token >= vocab_size:
            raise invalid(f"tokens[{index}]", f"token ids must be below {vocab_size}")
    return request


def tokenize(request: TokenizeRequest, tokenizer: Tokenizer, codec: ChatCodec, max_context: int) -> Tokenized:
    """The ids that a request with this prompt or chat would begin with."""
    if request.messages is not None:
        tokens = codec.encode(request.messages, thinking=request.thinking, tools=request.tools).tokens
    else:
        tokens = tokenizer.encode_prompt(request.prompt or "")
    names = [tokenizer.token_bytes(token).decode(errors="replace") for token in tokens]
    return Tokenized(
        count=len(tokens),
        max_model_len=max_context,
        tokens=tokens,
        token_strs=names if request.return_token_strs else UNSET,
    )
