"""The operator's own text is computed once for all tenants; behind it each tenant finds its own pages only."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process_gateway import Gateway, running_gateway

from cluster.chat_codec import ChatCodec
from cluster.chat_encoding import Message
from cluster.config import ClusterConfig, PublicPrefixConfig, TenantConfig
from cluster.key_store import hash_of
from cluster.public_prefix import PublicPrefixes
from cluster.tokenizer import Tokenizer
from workers.tiny import write_tiny

TEXT = "You are the assistant of a library. Be brief, name the shelf, and never guess a title. " * 12
OWN = "Where do I find the books on lighthouses, and which of them is the oldest? " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny(folder, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def gateway(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    config = ClusterConfig(
        tenants=[TenantConfig(name=name, keys=[hash_of(name)]) for name in "abcd"],
        public_prefixes=[PublicPrefixConfig(text=TEXT)],
    )
    with running_gateway(model, tmp_path_factory.mktemp("gateway"), config) as running:
        yield running


def _post(gateway: Gateway, tenant: str, path: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(
        f"{gateway.url}{path}",
        json={"model": "lightship", "max_tokens": 4, "temperature": 0, "ignore_eos": True, **body},
        headers={"authorization": f"Bearer {tenant}"},
        timeout=60,
    )
    assert answer.status_code == 200
    return answer.json()  # type: ignore[no-any-return]


def _chat(gateway: Gateway, tenant: str, system: str = TEXT, own: str = OWN) -> tuple[int, str]:
    """Hit tokens, and what was answered."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": own}]
    reply = _post(gateway, tenant, "/v1/chat/completions", messages=messages)
    return reply["usage"]["prompt_cache_hit_tokens"], reply["choices"][0]["message"]["content"]


def test_another_tenant_finds_the_public_pages_and_none_beyond(gateway: Gateway, model: Path) -> None:
    tokens = len(Tokenizer(model).encode_prompt(TEXT))
    public = tokens // 64 * 64
    assert public >= 192
    first, answer = _chat(gateway, "a")
    assert first == 0
    again, same = _chat(gateway, "a")
    assert again > public, "its own pages too"
    other, alike = _chat(gateway, "b")
    assert other == public, "the same tokens behind the prefix are another tenant's"
    assert answer == same == alike
    assert _chat(gateway, "b") == (again, answer)
    raw = _post(gateway, "c", "/v1/completions", prompt=TEXT + OWN)
    assert raw["usage"]["prompt_cache_hit_tokens"] == public, "a raw prompt begins alike"
    usage = raw["usage"]
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]


def test_a_text_that_leaves_the_prefix_is_public_up_to_that_page(gateway: Gateway) -> None:
    """What a tenant writes in the middle of the prefix, and all behind it, is its own."""
    changed = TEXT[: len(TEXT) // 2] + " Speak French. " + TEXT[len(TEXT) // 2 :]
    _chat(gateway, "a")
    of_a, _ = _chat(gateway, "a", changed)
    assert 0 < of_a < _chat(gateway, "d")[0]
    assert _chat(gateway, "b", changed)[0] == of_a
    assert _chat(gateway, "a", changed)[0] > of_a


TOKENS = st.lists(st.integers(0, 1), max_size=300)


@given(st.lists(TOKENS, max_size=3), TOKENS)
def test_public_pages_are_full_and_equal_to_a_prefix(prefixes: list[list[int]], prompt: list[int]) -> None:
    end = 64 * PublicPrefixes(prefixes).num_pages(prompt)
    assert end <= len(prompt)
    assert end == 0 or any(prompt[:end] == prefix[:end] and len(prefix) >= end for prefix in prefixes)
    assert not any(
        len(prefix) >= end + 64 <= len(prompt) and prompt[: end + 64] == prefix[: end + 64]
        for prefix in prefixes
    )


def test_ways_to_name_a_prefix(model: Path) -> None:
    tokenizer = Tokenizer(model)
    codec = ChatCodec.load(model, tokenizer)
    system = Message(role="system", content=TEXT)
    prompt = codec.encode([system, Message(role="user", content="Hi")], thinking=False).tokens
    for config in (
        PublicPrefixConfig(text=TEXT),
        PublicPrefixConfig(messages=[system]),
        PublicPrefixConfig(tokens=prompt[:200]),
    ):
        expected = 3 if config.tokens else len(tokenizer.encode_prompt(TEXT)) // 64
        assert PublicPrefixes.load([config], tokenizer, codec).num_pages(prompt) == expected
    with pytest.raises(ValueError, match=r"public_prefixes\[1\] has \d+ tokens: only whole pages of 64"):
        PublicPrefixes.load([PublicPrefixConfig(text=TEXT), PublicPrefixConfig(text="Hi")], tokenizer, codec)
    for wrong in ({}, {"text": "a", "tokens": [1]}):
        with pytest.raises(msgspec.ValidationError, match="exactly one of file, text, messages and tokens"):
            msgspec.convert(wrong, PublicPrefixConfig)
