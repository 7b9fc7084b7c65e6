"""Pages as one buffer with a checksum each, gathered and summed up in one pass. Knows nothing of connections or requests.

A program takes one stretch of a few pages, so that the numbers by which words are multiplied are loaded once for all of
them. Sums are modulo 2^64, in which no order of additions makes a difference.
"""

import torch
import triton
import triton.language as tl

from kernels.reference.pack import as_received, as_rows, multipliers, row_numbers

STRETCH = 2048  # words of 32 bits, at most, that a program takes of a page
PAGES_OF_PROGRAM = 4


def checksums(pages: torch.Tensor) -> torch.Tensor:
    """As kernels.reference.checksums."""
    return _sums(pages, None, None)


def pack_pages(
    pages: torch.Tensor, layers: tuple[int, int], page_ids: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels.reference.pack_pages."""
    rows, numbers = as_rows(pages), row_numbers(pages, layers, page_ids)
    buffer = torch.empty(len(numbers), rows.shape[1], dtype=torch.uint8, device=pages.device)
    return buffer.flatten(), _sums(rows, numbers, buffer)


def unpack_pages(
    buffer: torch.Tensor,
    expected: torch.Tensor,
    pages: torch.Tensor,
    layers: tuple[int, int],
    page_ids: list[int],
) -> torch.Tensor:
    """As kernels.reference.unpack_pages."""
    rows, numbers = as_rows(pages), row_numbers(pages, layers, page_ids)
    received = as_received(buffer, expected, rows, len(numbers))
    right = checksums(received) == expected
    words = received.shape[1] // 4
    if len(numbers):
        _scatter_kernel[_grid(len(numbers), words)](
            received.view(torch.int32),
            rows.view(torch.int32),
            numbers,
            right,
            len(numbers),
            words,
            STRETCH=STRETCH,
            PAGES=PAGES_OF_PROGRAM,
        )
    return right


def _sums(rows: torch.Tensor, numbers: torch.Tensor | None, target: torch.Tensor | None) -> torch.Tensor:
    """Checksums of the rows uint8 [n, page_bytes], or of those that `numbers` names, which are then copied to the target."""
    count, words = len(rows) if numbers is None else len(numbers), rows.shape[1] // 4
    grid = _grid(count, words)
    parts = torch.empty(count, grid[1], dtype=torch.int64, device=rows.device)
    if count:
        _gather_kernel[grid](
            rows.view(torch.int32),
            None if target is None else target.view(torch.int32),
            numbers,
            multipliers(words, rows.device),
            parts,
            count,
            words,
            STRETCH=STRETCH,
            PAGES=PAGES_OF_PROGRAM,
        )
    return parts.sum(1)


def _grid(count: int, words: int) -> tuple[int, int]:
    return triton.cdiv(count, PAGES_OF_PROGRAM), triton.cdiv(words, STRETCH)


@triton.jit
def _gather_kernel(
    source, target, numbers, factors, parts, count, words, STRETCH: tl.constexpr, PAGES: tl.constexpr
):
    stretch = tl.program_id(1)
    word = stretch * STRETCH + tl.arange(0, STRETCH)
    factor = tl.load(factors + word, mask=word < words, other=0)
    for i in range(PAGES):
        index = (tl.program_id(0) * PAGES + i).to(tl.int64)
        if index < count:
            row = index if numbers is None else tl.load(numbers + index)
            value = tl.load(source + row * words + word, mask=word < words, other=0)
            if target is not None:
                tl.store(target + index * words + word, value, mask=word < words)
            total = tl.sum(value.to(tl.int64) * factor, 0)
            tl.store(parts + index * tl.num_programs(1) + stretch, total)


@triton.jit
def _scatter_kernel(source, target, numbers, right, count, words, STRETCH: tl.constexpr, PAGES: tl.constexpr):
    word = tl.program_id(1) * STRETCH + tl.arange(0, STRETCH)
    for i in range(PAGES):
        index = (tl.program_id(0) * PAGES + i).to(tl.int64)
        if tl.load(right + index, mask=index < count, other=False):
            value = tl.load(source + index * words + word, mask=word < words, other=0)
            tl.store(target + tl.load(numbers + index) * words + word, value, mask=word < words)
