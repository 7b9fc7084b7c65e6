"""What must hold before the bytes of a shipment touch the cache."""

from typing import Any

import msgspec
import pytest
import torch
from shipping_sides import LAYOUT, NUM_LAYERS, make_cache, make_ticket

from workers.shipping.outbox import Part
from workers.shipping.protocol import (
    STALE_EPOCH,
    STALE_GENERATION,
    Accepted,
    Fingerprint,
    Kind,
    Refused,
)
from workers.shipping.shipment import Shipment, Verdict, staleness, write

PAGES = [5, 2, 30]


def arrive(
    kind: Kind, *, flip: tuple[int, int] | None = None, **changes: Any
) -> tuple[Shipment, list[Accepted | Refused], list[Verdict]]:
    """Layers 1 and 2 of three pages of a filled cache, under a header with some fields changed. flip: a byte, and bits of it."""
    cache = make_cache(filled=1)
    pages = cache.latent if kind == "latent" else cache.index
    payload = cache.ops.pack_pages(pages, (1, 3), PAGES)
    if flip is not None:
        payload[flip[0]] ^= flip[1]
    part = Part(make_ticket(epoch=4, generation=6), kind, (1, 3), [0, 1, 2], PAGES)
    header = part.header(9, prefill_epoch=3, fingerprint=Fingerprint.of(LAYOUT, NUM_LAYERS))
    assert header.payload_bytes == payload.numel()
    answers: list[Accepted | Refused] = []
    verdicts: list[Verdict] = []
    header = msgspec.structs.replace(header, **changes)
    return (
        Shipment(header, payload, 3, lambda _, verdict: verdicts.append(verdict), answers.append),
        answers,
        verdicts,
    )


def stale(shipment: Shipment) -> str | None:
    return staleness(shipment, generation_of=lambda page: 6, epoch=4)


@pytest.mark.parametrize("kind", ["latent", "index"])
def test_right_pages_are_written_where_the_ticket_said(kind: Kind) -> None:
    shipment, answers, verdicts = arrive(kind)
    assert stale(shipment) is None
    cache = make_cache()
    write(shipment, cache)
    (verdict,) = verdicts
    assert verdict.wait() == []
    source, expected = make_cache(filled=1), make_cache()
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
def test_stale_shipment_is_known_before_anything_is_written(changes: dict[str, Any], expected: str) -> None:
    shipment, answers, verdicts = arrive("latent", **changes)
    assert stale(shipment) == expected
    assert not verdicts
    shipment.refuse(expected)
    assert answers == [Refused(9, expected)]


@pytest.mark.parametrize(
    ("byte", "page"), [(0, 0), (3 * LAYOUT.index_page_bytes, 3), (-49, 5), (-1, 5), (-48, 0)]
)
@pytest.mark.parametrize("bit", [1, 128])
def test_any_flipped_bit_is_found_and_its_page_not_written(byte: int, page: int, bit: int) -> None:
    """The last 48 bytes are the checksums."""
    shipment, _, verdicts = arrive("index", flip=(byte, bit))
    cache = make_cache()
    write(shipment, cache)
    assert verdicts[0].wait() == [page]
    layer, index = divmod(page, 3)
    assert not cache.index[1 + layer, shipment.header.page_ids[index]].any()
    assert cache.index[1:, shipment.header.page_ids].any(2).sum() == 5
