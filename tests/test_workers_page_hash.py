"""Page hashes: the chain as specified, incremental equal to from scratch, namespaces apart."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from workers.page_hash import page_hashes

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=260)


def slow_page_hashes(namespace: bytes, tokens: list[int]) -> list[bytes]:
    hashes, parent = [], hashlib.blake2b(namespace, digest_size=16).digest()
    for page in range(len(tokens) // 64):
        content = b"".join(t.to_bytes(4, "little", signed=True) for t in tokens[64 * page : 64 * page + 64])
        parent = hashlib.blake2b(parent + content, digest_size=16).digest()
        hashes.append(parent)
    return hashes


@given(st.binary(max_size=40), TOKENS)
def test_hashes_are_the_chain_of_full_pages(namespace: bytes, tokens: list[int]) -> None:
    assert page_hashes(namespace, tokens) == slow_page_hashes(namespace, tokens)


@given(TOKENS, st.integers(0, 260))
def test_incremental_equals_from_scratch(tokens: list[int], seen: int) -> None:
    known = page_hashes(b"tenant", tokens[:seen])
    before = list(known)
    assert page_hashes(b"tenant", tokens, known) == page_hashes(b"tenant", tokens)
    assert known == before


@given(st.binary(max_size=8), st.binary(max_size=8))
def test_namespaces_share_no_hash(one: bytes, other: bytes) -> None:
    tokens = [0] * 256
    shared = set(page_hashes(one, tokens)) & set(page_hashes(other, tokens))
    assert bool(shared) == (one == other)


@given(st.binary(max_size=8), st.binary(max_size=8), st.integers(0, 5), TOKENS, st.integers(0, 260))
def test_namespaces_share_the_public_pages_and_none_behind_them(
    one: bytes, other: bytes, num_public_pages: int, tokens: list[int], seen: int
) -> None:
    of_one = page_hashes(one, tokens, num_public_pages=num_public_pages)
    of_other = page_hashes(other, tokens, num_public_pages=num_public_pages)
    assert of_one[:num_public_pages] == of_other[:num_public_pages]
    assert bool(set(of_one[num_public_pages:]) & set(of_other[num_public_pages:])) == (
        one == other and len(of_one) > num_public_pages
    )
    known = page_hashes(one, tokens[:seen], num_public_pages=num_public_pages)
    assert page_hashes(one, tokens, known, num_public_pages) == of_one


@given(st.binary(max_size=8), st.integers(1, 4))
def test_a_public_page_is_found_as_such_only(namespace: bytes, num_public_pages: int) -> None:
    """The same tokens in a request that does not count them as public have other names."""
    tokens = list(range(256))
    public = page_hashes(namespace, tokens, num_public_pages=num_public_pages)
    assert not set(public) & set(page_hashes(namespace, tokens))


@given(st.integers(0, 255))
def test_a_token_changes_its_page_and_all_after_it(position: int) -> None:
    tokens = list(range(256))
    changed = page_hashes(b"", [*tokens[:position], 999, *tokens[position + 1 :]])
    same = [a == b for a, b in zip(page_hashes(b"", tokens), changed, strict=True)]
    assert same == [page < position // 64 for page in range(4)]


def test_the_hash_is_a_fixed_format() -> None:
    """Gateways, workers and the prefix directory may run different versions: these bytes must not change."""
    (only,) = page_hashes(b"tenant-1", list(range(100)))
    assert only.hex() == "6e7c23be693f5e13626d720c2f1af580"
