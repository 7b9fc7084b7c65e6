"""Pages as one buffer with a checksum each, to be shipped to another worker. Knows nothing of connections or requests.

Pages are uint8 [L, P, ...], contiguous, all layers of one kind. `layers` is (start, stop). A buffer holds, layer after layer, the
pages in the order of `page_ids`.
"""

import functools
import math

import torch


def checksums(pages: torch.Tensor) -> torch.Tensor:
    """pages uint8 [n, page_bytes] -> int64 [n]: the sum modulo 2^64 of 32-bit words times odd 64-bit numbers, one a position.

    A change within one word is always found, any other but for a chance of about 2^-32. page_bytes: a multiple of 4.
    """
    words = pages.view(torch.int32)
    factors = multipliers(words.shape[1], words.device)
    if words.is_cuda or not len(words):
        return (words * factors).sum(1)
    return torch.stack([(page * factors).sum() for page in words])  # within a cache: five times faster


def pack_pages(
    pages: torch.Tensor, layers: tuple[int, int], page_ids: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the buffer, uint8, contiguous, and the checksums int64 [(stop - start) * len(page_ids)], layer after layer."""
    packed = as_rows(pages).index_select(0, row_numbers(pages, layers, page_ids))
    return packed.flatten(), checksums(packed)


def unpack_pages(
    buffer: torch.Tensor,
    expected: torch.Tensor,
    pages: torch.Tensor,
    layers: tuple[int, int],
    page_ids: list[int],
) -> torch.Tensor:
    """Verifies every page of the buffer against its expected checksum, then writes those that are right into `pages`.

    Returns which were right, bool [(stop - start) * len(page_ids)], layer after layer, on the device: nothing waits for the host.
    ValueError if buffer or checksums do not fit the pages in number.
    """
    rows, numbers = as_rows(pages), row_numbers(pages, layers, page_ids)
    received = as_received(buffer, expected, rows, len(numbers))
    right = checksums(received) == expected
    rows.index_copy_(0, numbers[right], received[right])
    return right


def as_received(buffer: torch.Tensor, expected: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """The buffer as uint8 [count, page_bytes]. ValueError if it or the checksums are of another number of pages."""
    if buffer.numel() != count * rows.shape[1]:
        raise ValueError(f"buffer has {buffer.numel()} bytes, but {count} pages take {count * rows.shape[1]}")
    if expected.numel() != count:
        raise ValueError(f"there are {expected.numel()} checksums for {count} pages")
    return buffer.view(-1, rows.shape[1])


def as_rows(pages: torch.Tensor) -> torch.Tensor:
    """A view of all layers' pages, uint8 [L x P, page_bytes]."""
    return pages.view(-1, math.prod(pages.shape[2:]))


def row_numbers(pages: torch.Tensor, layers: tuple[int, int], page_ids: list[int]) -> torch.Tensor:
    num_pages = pages.shape[1]
    numbers = [layer * num_pages + page for layer in range(*layers) for page in page_ids]
    return torch.tensor(numbers, dtype=torch.int64, device=pages.device)


@functools.cache
def multipliers(count: int, device: torch.device) -> torch.Tensor:
    """int64 [count], odd, the same on every machine: splitmix64 of the position."""
    numbers = []
    for position in range(1, count + 1):
        z = position * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        odd = (z ^ (z >> 31)) | 1
        numbers.append(odd - 2**64 if odd >= 2**63 else odd)
    return torch.tensor(numbers, dtype=torch.int64, device=device)
