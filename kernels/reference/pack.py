"""Pages as one buffer with a checksum each, to be shipped to another worker. Knows nothing of connections or requests.

Pages are uint8 [L, P, ...], contiguous, all layers of one kind; a page has a multiple of 8 bytes. `layers` is (start, stop). A payload is
what travels: layer after layer the pages in the order of `page_ids`, then their checksums in the same order, 8 bytes each.
"""

import functools
import math

import torch

from kernels.layout import CHECKSUM_BYTES

_BITS = 30  # of a multiplier, but for the last one, which is set
_MASK = 2**_BITS - 1


def checksums(pages: torch.Tensor) -> torch.Tensor:
    """pages uint8 [n, page_bytes] -> int64 [n]: the sum modulo 2^64 of signed 32-bit words times odd 31-bit numbers, another for
    each position.

    Always found are a change within one word, two flipped bits and two words that changed places; anything else but for a chance
    of about 2^-60.
    """
    words = pages.view(torch.int32)
    factors = multipliers(words.shape[1], words.device).to(torch.int64)
    if words.is_cuda or not len(words):
        return (words * factors).sum(1)
    return torch.stack([(page * factors).sum() for page in words])  # within a cache: five times faster


def pack_pages(pages: torch.Tensor, layers: tuple[int, int], page_ids: list[int]) -> torch.Tensor:
    """-> the payload, uint8 [payload_bytes(...)]."""
    packed = _as_rows(pages).index_select(0, _row_numbers(pages, layers, page_ids))
    payload = pages.new_empty(payload_bytes(pages, layers, page_ids))
    payload[: packed.numel()] = packed.flatten()
    payload[packed.numel() :] = checksums(packed).view(torch.uint8)
    return payload


def unpack_pages(
    payload: torch.Tensor, pages: torch.Tensor, layers: tuple[int, int], page_ids: list[int]
) -> torch.Tensor:
    """Verifies every page of a payload against its checksum and writes those that are right into `pages`.

    -> bool [(stop - start) * len(page_ids)], in the payload's order: whether the page is wrong. Nobody waits for it here.
    payload: on the pages' device. ValueError if it does not fit them in number.
    """
    check_payload(payload, pages, layers, page_ids)
    rows, numbers = _as_rows(pages), _row_numbers(pages, layers, page_ids)
    end = len(numbers) * rows.shape[1]
    received, expected = payload[:end].view(-1, rows.shape[1]), payload[end:].view(torch.int64)
    wrong = checksums(received) != expected
    if rows.is_cuda:
        # Wrong pages get what is there already: to leave them out, the host would have to know them.
        kept = torch.where(wrong.unsqueeze(1), rows.index_select(0, numbers), received)
        rows.index_copy_(0, numbers, kept)
    else:
        for index in (~wrong).nonzero().flatten().tolist():
            rows[numbers[index]] = received[index]
    return wrong


def payload_bytes(pages: torch.Tensor, layers: tuple[int, int], page_ids: list[int]) -> int:
    """ValueError if the checksums behind the pages would not be aligned."""
    page_bytes = math.prod(pages.shape[2:])
    if page_bytes % CHECKSUM_BYTES:
        raise ValueError(f"a page has {page_bytes} bytes; a payload needs a multiple of {CHECKSUM_BYTES}")
    return (layers[1] - layers[0]) * len(page_ids) * (page_bytes + CHECKSUM_BYTES)


def check_payload(
    payload: torch.Tensor, pages: torch.Tensor, layers: tuple[int, int], page_ids: list[int]
) -> None:
    """ValueError if the payload does not fit the pages in number."""
    expected = payload_bytes(pages, layers, page_ids)
    if payload.numel() != expected:
        count = (layers[1] - layers[0]) * len(page_ids)
        raise ValueError(
            f"the payload has {payload.numel()} bytes, but {count} pages with their checksums take {expected}"
        )


@functools.cache
def multipliers(count: int, device: torch.device) -> torch.Tensor:
    """int32 [count], odd and all different, the same on every machine: the position's bits, mixed so that each can be undone."""
    return torch.tensor(
        [2 * _mix(position) + 1 for position in range(count)], dtype=torch.int32, device=device
    )


def _mix(number: int) -> int:
    for shift, factor in ((15, 0x2C1B3C6D), (13, 0x297A2D39)):
        number = (number ^ (number >> shift)) * factor & _MASK
    return number ^ (number >> 16)


def _as_rows(pages: torch.Tensor) -> torch.Tensor:
    """A view of all layers' pages, uint8 [L x P, page_bytes]."""
    return pages.view(-1, math.prod(pages.shape[2:]))


def _row_numbers(pages: torch.Tensor, layers: tuple[int, int], page_ids: list[int]) -> torch.Tensor:
    num_pages = pages.shape[1]
    numbers = [layer * num_pages + page for layer in range(*layers) for page in page_ids]
    return torch.tensor(numbers, dtype=torch.int64, device=pages.device)
