"""Packing for the journey: nothing but the named pages travels, and no byte changes unseen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.layout import CacheLayout
from kernels.reference import checksums, pack_pages, unpack_pages
from kernels.reference.pack import multipliers
from kernels.testing import LAYOUTS

LAYERS, PAGES = 4, 7


def random_pages(*, paged: tuple[int, ...] = (64, 656)) -> torch.Tensor:
    return torch.randint(0, 256, (LAYERS, PAGES, *paged), dtype=torch.uint8)


def wrong(payload: torch.Tensor, target: torch.Tensor, layers: tuple[int, int], ids: list[int]) -> list[int]:
    return unpack_pages(payload, target, layers, ids).nonzero().flatten().tolist()


@pytest.mark.parametrize("paged", [(64, 656), (8448,)])
def test_round_trip_to_other_pages(paged: tuple[int, ...]) -> None:
    source, target = random_pages(paged=paged), random_pages(paged=paged)
    before = target.clone()
    payload = pack_pages(source, (1, 3), [6, 0, 2])
    assert payload.shape == (2 * 3 * (source[0, 0].numel() + 8),)
    assert payload.is_contiguous()
    assert payload.dtype == torch.uint8
    assert wrong(payload, target, (1, 3), [5, 1, 4]) == []
    for sent, landed in zip([6, 0, 2], [5, 1, 4], strict=True):
        assert torch.equal(target[1:3, landed], source[1:3, sent])
        before[1:3, landed] = source[1:3, sent]
    assert torch.equal(target, before)


def test_payload_is_layer_after_layer_and_then_the_checksums() -> None:
    source = random_pages()
    payload = pack_pages(source, (2, 4), [3, 5])
    expected = torch.stack([source[2, 3], source[2, 5], source[3, 3], source[3, 5]])
    assert torch.equal(payload[:-32].view(expected.shape), expected)
    assert torch.equal(payload[-32:].view(torch.int64), checksums(expected.flatten(1)))


@given(st.integers(0, 4 * 41_992 - 1), st.integers(1, 255))
def test_one_changed_byte_anywhere_is_found_and_its_page_not_written(where: int, flip: int) -> None:
    """The last bytes are those of the checksums."""
    source = torch.randint(0, 256, (2, 2, 64, 656), dtype=torch.uint8)
    target = torch.zeros_like(source)
    payload = pack_pages(source, (0, 2), [0, 1])
    payload[where] ^= flip
    number = where // 41_984 if where < 4 * 41_984 else (where - 4 * 41_984) // 8
    assert wrong(payload, target, (0, 2), [0, 1]) == [number]
    layer, index = divmod(number, 2)
    assert not target[layer, index].any()
    target[layer, index] = source[layer, index]
    assert torch.equal(target, source)


@given(st.data())
def test_two_flipped_bits_and_two_exchanged_words_are_found(data: st.DataObject) -> None:
    """The weak spots of a sum of words: changes that could cancel, in the highest bits above all."""
    page = torch.randint(0, 256, (1, 8448), dtype=torch.uint8)
    flipped, exchanged = page.clone(), page.clone()
    first, second = data.draw(st.lists(st.integers(0, 2111), min_size=2, max_size=2, unique=True))
    bit = data.draw(st.integers(0, 31))
    for word in (first, second):
        flipped[0, 4 * word + bit // 8] ^= 1 << bit % 8
    words, other = exchanged.view(torch.int32), page.view(torch.int32)
    words[0, [first, second]] = other[0, [second, first]]
    assert not torch.equal(checksums(page), checksums(flipped))
    assert torch.equal(page, exchanged) or not torch.equal(checksums(page), checksums(exchanged))


def test_no_two_positions_count_the_same() -> None:
    found = multipliers(40_000, torch.device("cpu"))
    assert len(found.unique()) == len(found)
    assert bool((found % 2 == 1).all())
    assert bool((found > 0).all())


def test_moved_rows_are_found() -> None:
    page = random_pages()[:1, 0]
    swapped = page.clone()
    swapped[:, [3, 4]] = page[:, [4, 3]]
    assert not torch.equal(checksums(page.flatten(1)), checksums(swapped.flatten(1)))
    assert not torch.equal(checksums(page.flatten(1)), checksums(page.roll(1, dims=1).flatten(1)))


def test_checksums_are_the_stated_sum() -> None:
    """Written out with Python's integers: two workers of different builds must agree."""
    pages = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 128], [255, 255, 255, 255, 2, 0, 0, 0]], dtype=torch.uint8)

    def multiplier(position: int) -> int:
        z = (position ^ position >> 15) * 0x2C1B3C6D % 2**30
        z = (z ^ z >> 13) * 0x297A2D39 % 2**30
        return 2 * (z ^ z >> 16) + 1

    first, second = multiplier(0), multiplier(1)
    assert (first, second) == (1, 1810168781)
    assert checksums(pages).tolist() == [first - 2**31 * second, -first + 2 * second]


def test_several_bad_pages_are_all_named() -> None:
    source, target = random_pages(), random_pages()
    payload = pack_pages(source, (1, 4), [2, 3])
    payload[-48] ^= 1
    payload[-1] ^= 1
    assert wrong(payload, target, (1, 4), [0, 1]) == [0, 5]
    assert torch.equal(target[2, :2], source[2, 2:4])


def test_what_does_not_fit_is_refused() -> None:
    pages = random_pages()
    payload = pack_pages(pages, (0, 2), [0, 1, 2])
    with pytest.raises(ValueError, match=r"has 251951 bytes, but 6 pages with their checksums take 251952"):
        unpack_pages(payload[:-1], pages, (0, 2), [0, 1, 2])
    with pytest.raises(ValueError, match="a page has 12 bytes"):
        pack_pages(random_pages(paged=(12,)), (0, 1), [0])


def test_no_pages() -> None:
    pages = random_pages()
    payload = pack_pages(pages, (0, 2), [])
    assert payload.numel() == 0
    assert wrong(payload, pages, (0, 2), []) == []


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_pages_of_every_layout_leave_checksums_aligned(layout: CacheLayout) -> None:
    assert layout.latent_page_bytes % 8 == layout.index_page_bytes % 8 == 0
