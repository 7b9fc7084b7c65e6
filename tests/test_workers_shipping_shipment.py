"""What must hold before the bytes of a shipment touch the cache."""

from typing import Any

import msgspec
import pytest
import torch
from shipping_sides import LAYOUT, make_cache, make_ticket

from kernels.dispatch import select
from workers.paged_cache import PagedCache
from workers.shipping.outbox import Part
from workers.shipping.protocol import (
    CORRUPT,
    STALE_EPOCH,
    STALE_GENERATION,
    Accepted,
    Kind,
    Refused,
)
from workers.shipping.shipment import Shipment, verify_and_write

PAGES = [5, 2, 30]


def arrive(kind: Kind, **changes: Any) -> tuple[Shipment, list[Accepted | Refused]]:
    """Layers 1 and 2 of three pages of a filled cache, under a header with some fields changed."""
    cache = make_cache(filled=True)
    pages = cache.latent if kind == "latent" else cache.index
    payload, checksums = select().pack_pages(pages, (1, 3), PAGES)
    part = Part(make_ticket(epoch=4, generation=6), kind, (1, 3), [0, 1, 2], PAGES)
    header = part.header(9, prefill_epoch=3, checksums=checksums.tolist(), nbytes=payload.numel())
    answers: list[Accepted | Refused] = []
    return Shipment(msgspec.structs.replace(header, **changes), payload, 3, answers.append), answers


def land(shipment: Shipment) -> tuple[str | None, PagedCache]:
    cache = make_cache()
    return verify_and_write(shipment, cache, generation_of=lambda page: 6, epoch=4), cache


@pytest.mark.parametrize("kind", ["latent", "index"])
def test_right_pages_are_written_where_the_ticket_said(kind: Kind) -> None:
    shipment, answers = arrive(kind)
    reason, cache = land(shipment)
    assert reason is None
    source, expected = make_cache(filled=True), make_cache()
    written = (source.latent, expected.latent) if kind == "latent" else (source.index, expected.index)
    written[1][1:, make_ticket().pages[:3]] = written[0][1:, PAGES]
    assert torch.equal(cache.latent, expected.latent)
    assert torch.equal(cache.index, expected.index)
    assert (shipment.request_id, shipment.page_indices, shipment.num_layers) == ("r", [0, 1, 2], 2)
    shipment.accept()
    assert answers == [Accepted(9)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"decode_epoch": 3}, STALE_EPOCH),
        ({"prefill_epoch": 2}, STALE_EPOCH),
        ({"generations": [6, 6, 5]}, STALE_GENERATION),
        ({"generations": [7, 6, 6]}, STALE_GENERATION),
    ],
)
def test_stale_shipment_writes_nothing(changes: dict[str, Any], expected: str) -> None:
    shipment, answers = arrive("latent", **changes)
    reason, cache = land(shipment)
    assert reason == expected
    assert not cache.latent.any()
    shipment.refuse(reason)
    assert answers == [Refused(9, expected)]


@pytest.mark.parametrize("byte", [0, 3 * LAYOUT.index_page_bytes, -1])
@pytest.mark.parametrize("bit", [1, 128])
def test_any_flipped_bit_is_found(byte: int, bit: int) -> None:
    shipment, _ = arrive("index")
    shipment.payload[byte] ^= bit
    assert land(shipment)[0] == CORRUPT
