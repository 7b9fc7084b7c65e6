"""Packing for the journey: nothing but the named pages travels, and no byte changes unseen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.layout import CacheLayout
from kernels.reference import checksums, pack_pages, unpack_pages
from kernels.testing import LAYOUTS

LAYERS, PAGES = 4, 7


def random_pages(*, paged: tuple[int, ...] = (64, 656)) -> torch.Tensor:
    return torch.randint(0, 256, (LAYERS, PAGES, *paged), dtype=torch.uint8)


@pytest.mark.parametrize("paged", [(64, 656), (8448,)])
def test_round_trip_to_other_pages(paged: tuple[int, ...]) -> None:
    source, target = random_pages(paged=paged), random_pages(paged=paged)
    before = target.clone()
    buffer, sums = pack_pages(source, (1, 3), [6, 0, 2])
    assert buffer.shape == (2 * 3 * source[0, 0].numel(),)
    assert buffer.is_contiguous()
    assert buffer.dtype == torch.uint8
    assert sums.dtype == torch.int64
    assert sums.shape == (6,)
    assert unpack_pages(buffer, sums, target, (1, 3), [5, 1, 4]).tolist() == [True] * 6
    for sent, landed in zip([6, 0, 2], [5, 1, 4], strict=True):
        assert torch.equal(target[1:3, landed], source[1:3, sent])
        before[1:3, landed] = source[1:3, sent]
    assert torch.equal(target, before)


def test_buffer_is_layer_after_layer() -> None:
    source = random_pages()
    buffer, sums = pack_pages(source, (2, 4), [3, 5])
    expected = torch.stack([source[2, 3], source[2, 5], source[3, 3], source[3, 5]])
    assert torch.equal(buffer.view(expected.shape), expected)
    assert torch.equal(sums, checksums(expected.flatten(1)))


@given(st.integers(0, 4 * 41_984 - 1), st.integers(1, 255))
def test_one_changed_byte_anywhere_is_found_and_its_page_not_written(where: int, flip: int) -> None:
    source = torch.randint(0, 256, (2, 2, 64, 656), dtype=torch.uint8)
    target = torch.zeros_like(source)
    buffer, sums = pack_pages(source, (0, 2), [0, 1])
    buffer[where] ^= flip
    layer, index = divmod(where // 41_984, 2)
    right = unpack_pages(buffer, sums, target, (0, 2), [0, 1])
    assert (~right).nonzero().tolist() == [[2 * layer + index]]
    assert not target[layer, index].any()
    target[layer, index] = source[layer, index]
    assert torch.equal(target, source)


@given(st.data())
def test_two_changed_bytes_are_found(data: st.DataObject) -> None:
    """The weak spot of a sum of words: changes in their highest bits, which could cancel."""
    page = torch.randint(0, 256, (1, 8448), dtype=torch.uint8)
    changed = page.clone()
    first, second = data.draw(st.lists(st.integers(0, 2111), min_size=2, max_size=2, unique=True))
    for word in (first, second):
        changed[0, 4 * word + 3] ^= 0x80
    assert not torch.equal(checksums(page), checksums(changed))


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
        z = position * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31 | 1

    expected = [multiplier(1) - 2**31 * multiplier(2), -multiplier(1) + 2 * multiplier(2)]
    assert [total % 2**64 for total in checksums(pages).tolist()] == [total % 2**64 for total in expected]


def test_several_bad_pages_are_all_named() -> None:
    source, target = random_pages(), random_pages()
    buffer, sums = pack_pages(source, (1, 4), [2, 3])
    sums[0] += 1
    sums[5] ^= 1
    right = unpack_pages(buffer, sums, target, (1, 4), [0, 1])
    assert right.tolist() == [False, True, True, True, True, False]
    assert torch.equal(target[2, :2], source[2, 2:4])


def test_what_does_not_fit_is_refused() -> None:
    pages = random_pages()
    buffer, sums = pack_pages(pages, (0, 2), [0, 1, 2])
    with pytest.raises(ValueError, match=r"buffer has 251903 bytes, but 6 pages take 251904"):
        unpack_pages(buffer[:-1], sums, pages, (0, 2), [0, 1, 2])
    with pytest.raises(ValueError, match="5 checksums for 6 pages"):
        unpack_pages(buffer, sums[:-1], pages, (0, 2), [0, 1, 2])


def test_no_pages() -> None:
    pages = random_pages()
    buffer, sums = pack_pages(pages, (0, 2), [])
    assert buffer.numel() == sums.numel() == 0
    assert unpack_pages(buffer, sums, pages, (0, 2), []).shape == (0,)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_pages_of_every_layout_are_whole_words(layout: CacheLayout) -> None:
    assert layout.latent_page_bytes % 4 == layout.index_page_bytes % 4 == 0
