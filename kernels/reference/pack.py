"""Pages as one buffer with a checksum each, to be shipped to another worker. Knows nothing of connections or requests.

Pages are uint8 [L, P, ...], all layers of one kind. `layers` is (start, stop). A buffer holds, layer after layer, the pages in the
order of `page_ids`.
"""

import functools
import math

import torch

_WORD_BYTES = 4


def checksums(pages: torch.Tensor) -> torch.Tensor:
    """pages uint8 [n, page_bytes] -> int64 [n]: the sum modulo 2^64 of 32-bit words times odd 64-bit numbers, one a position.

    A change within one word is always found. Any other, moved words included, is missed with a chance of about 2^-32.
    """
    words = pages.contiguous().view(torch.int32)
    return (words * _multipliers(words.shape[1], words.device)).sum(1)


def pack_pages(
    pages: torch.Tensor, layers: tuple[int, int], page_ids: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the buffer, uint8, contiguous, and the checksums int64 [(stop - start) * len(page_ids)], layer after layer."""
    start, stop = layers
    ids = torch.tensor(page_ids, dtype=torch.int64, device=pages.device)
    packed = pages[start:stop].index_select(1, ids).flatten(2).flatten(0, 1)
    return packed.flatten(), checksums(packed)


def unpack_pages(
    buffer: torch.Tensor,
    checksums: torch.Tensor,
    pages: torch.Tensor,
    layers: tuple[int, int],
    page_ids: list[int],
) -> list[tuple[int, int]]:
    """Verifies every page of the buffer, then writes those that are right. Returns the (layer, index in page_ids) of the others.

    ValueError if the buffer or the checksums are not as long as the pages they are for.
    """
    start, stop = layers
    count = (stop - start) * len(page_ids)
    page_bytes = math.prod(pages.shape[2:])
    if buffer.numel() != count * page_bytes:
        raise ValueError(f"buffer has {buffer.numel()} bytes, but {count} pages take {count * page_bytes}")
    if checksums.numel() != count:
        raise ValueError(f"checksums holds {checksums.numel()} numbers for {count} pages")
    packed = buffer.view(count, page_bytes)
    right = globals()["checksums"](packed) == checksums.to(packed.device)
    where = [(layer, index) for layer in range(start, stop) for index in range(len(page_ids))]
    good = right.tolist()
    for (layer, index), page, is_good in zip(where, packed, good, strict=True):
        if is_good:
            pages[layer, page_ids[index]] = page.view(pages.shape[2:])
    return [place for place, is_good in zip(where, good, strict=True) if not is_good]


@functools.cache
def _multipliers(count: int, device: torch.device) -> torch.Tensor:
    """Odd pseudo-random int64 [count], the same everywhere: splitmix64 of the position."""
    values = []
    for position in range(1, count + 1):
        z = (position * 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        z = (z ^ (z >> 31)) | 1
        values.append(z - 2**64 if z >= 2**63 else z)
    return torch.tensor(values, dtype=torch.int64, device=device)
