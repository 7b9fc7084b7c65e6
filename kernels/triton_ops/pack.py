"""Packs, verifies and unpacks pages on a GPU at the speed of its memory, bit for bit as `kernels.reference.pack` does.

A program takes one page of one layer into registers: every load is under way before the first is needed, each byte is read once and
written once, and the checksum is added up in between, so that a page which is wrong is never written. Only page ids come from the
host, once each, whatever the number of layers. Knows nothing of connections or requests.
"""

import math
from array import array

import torch
import triton
import triton.language as tl

from kernels.reference.pack import check_payload, multipliers, payload_bytes

WORDS_PER_THREAD = 32  # of a page, rounded up to a power of two


def checksums(pages: torch.Tensor) -> torch.Tensor:
    """As kernels.reference.checksums."""
    sums = torch.empty(len(pages), dtype=torch.int64, device=pages.device)
    if len(pages):
        words = pages.view(torch.int32)
        _checksum_kernel[(len(pages),)](
            words, multipliers(words.shape[1], words.device), sums, **_tile(words.shape[1])
        )
    return sums


def pack_pages(pages: torch.Tensor, layers: tuple[int, int], page_ids: list[int]) -> torch.Tensor:
    """As kernels.reference.pack_pages."""
    page_words = math.prod(pages.shape[2:]) // 4
    payload = torch.empty(payload_bytes(pages, layers, page_ids), dtype=torch.uint8, device=pages.device)
    if payload.numel():
        _pack_kernel[(len(page_ids), layers[1] - layers[0])](
            pages.view(torch.int32),
            _to_device(page_ids, pages.device),
            multipliers(page_words, pages.device),
            payload.view(torch.int32),
            layers[0],
            pages.shape[1],
            **_tile(page_words),
        )
    return payload


def unpack_pages(
    payload: torch.Tensor, pages: torch.Tensor, layers: tuple[int, int], page_ids: list[int]
) -> torch.Tensor:
    """As kernels.reference.unpack_pages. The host waits for nothing."""
    check_payload(payload, pages, layers, page_ids)
    num_layers, page_words = layers[1] - layers[0], math.prod(pages.shape[2:]) // 4
    wrong = torch.empty(num_layers * len(page_ids), dtype=torch.bool, device=pages.device)
    if payload.numel():
        _unpack_kernel[(len(page_ids), num_layers)](
            payload.view(torch.int32),
            _to_device(page_ids, pages.device),
            multipliers(page_words, pages.device),
            pages.view(torch.int32),
            wrong,
            layers[0],
            pages.shape[1],
            **_tile(page_words),
        )
    return wrong


def _tile(page_words: int) -> dict[str, int]:
    tile_words = triton.next_power_of_2(page_words)
    num_warps = min(32, max(1, tile_words // (32 * WORDS_PER_THREAD)))
    return {"PAGE_WORDS": page_words, "TILE_WORDS": tile_words, "num_warps": num_warps}


def _to_device(page_ids: list[int], device: torch.device) -> torch.Tensor:
    """Waits for nothing: CUDA takes memory that is not pinned into a buffer of its own before it returns. By way of an array it
    takes the host half of the time that `torch.tensor` and pinned memory take."""
    return torch.frombuffer(array("i", page_ids), dtype=torch.int32).to(device, non_blocking=True)


@triton.jit
def _load_page(words_ptr, multipliers_ptr, PAGE_WORDS: tl.constexpr, TILE_WORDS: tl.constexpr):
    """-> the page's words, int32 [TILE_WORDS], and its checksum."""
    at = tl.arange(0, TILE_WORDS)
    words = tl.load(words_ptr + at, at < PAGE_WORDS, other=0, eviction_policy="evict_first")
    factors = tl.load(multipliers_ptr + at, at < PAGE_WORDS, other=0, eviction_policy="evict_last")
    return words, tl.sum(words.to(tl.int64) * factors.to(tl.int64), 0)


@triton.jit
def _checksum_kernel(
    words_ptr, multipliers_ptr, sums_ptr, PAGE_WORDS: tl.constexpr, TILE_WORDS: tl.constexpr
):
    number = tl.program_id(0)
    _, total = _load_page(
        words_ptr + number.to(tl.int64) * PAGE_WORDS, multipliers_ptr, PAGE_WORDS, TILE_WORDS
    )
    tl.store(sums_ptr + number, total)


@triton.jit
def _places(page_ids_ptr, first_layer, num_pages, PAGE_WORDS: tl.constexpr):
    """-> of this program the page's number in the payload, its first word in all layers' pages, and in the payload."""
    index, layer = tl.program_id(0), tl.program_id(1)
    number = layer.to(tl.int64) * tl.num_programs(0) + index
    page = (first_layer + layer).to(tl.int64) * num_pages + tl.load(page_ids_ptr + index)
    return number, page * PAGE_WORDS, number * PAGE_WORDS


@triton.jit
def _sums_of(payload_ptr, PAGE_WORDS: tl.constexpr):
    """Where the checksums begin, behind all pages of the grid."""
    num_words = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * PAGE_WORDS
    return (payload_ptr + num_words).to(tl.pointer_type(tl.int64))


@triton.jit(do_not_specialize=["first_layer", "num_pages"])
def _pack_kernel(
    pages_ptr,
    page_ids_ptr,
    multipliers_ptr,
    payload_ptr,
    first_layer,
    num_pages,
    PAGE_WORDS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
):
    """Grid: page of the payload x layer."""
    number, page, packed = _places(page_ids_ptr, first_layer, num_pages, PAGE_WORDS)
    words, total = _load_page(pages_ptr + page, multipliers_ptr, PAGE_WORDS, TILE_WORDS)
    at = tl.arange(0, TILE_WORDS)
    tl.store(payload_ptr + packed + at, words, at < PAGE_WORDS)
    tl.store(_sums_of(payload_ptr, PAGE_WORDS) + number, total)


@triton.jit(do_not_specialize=["first_layer", "num_pages"])
def _unpack_kernel(
    payload_ptr,
    page_ids_ptr,
    multipliers_ptr,
    pages_ptr,
    wrong_ptr,
    first_layer,
    num_pages,
    PAGE_WORDS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
):
    """Grid: page of the payload x layer."""
    number, page, packed = _places(page_ids_ptr, first_layer, num_pages, PAGE_WORDS)
    expected = tl.load(_sums_of(payload_ptr, PAGE_WORDS) + number)
    words, total = _load_page(payload_ptr + packed, multipliers_ptr, PAGE_WORDS, TILE_WORDS)
    right = total == expected
    at = tl.arange(0, TILE_WORDS)
    tl.store(pages_ptr + page + at, words, (at < PAGE_WORDS) & right)
    tl.store(wrong_ptr + number, ~right)
