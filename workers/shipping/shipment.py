"""Pages that have arrived but are not yet anyone's: what must hold before their bytes touch the cache.

Knows nothing of links; whoever brings a shipment passes a function that answers for it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from workers.paged_cache import PagedCache
from workers.shipping.protocol import CORRUPT, STALE_EPOCH, STALE_GENERATION, Accepted, Header, Refused

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Shipment:
    """`payload` is uint8 [header.nbytes], on the host or on the caches' device.

    One of `accept` and `refuse` is called, once, by any thread; neither blocks or raises.
    """

    header: Header
    payload: torch.Tensor
    prefill_epoch: int  # of the worker at the other end of the link: the header must name the same
    answer: Callable[[Accepted | Refused], None]

    @property
    def request_id(self) -> str:
        return self.header.request_id

    @property
    def page_indices(self) -> list[int]:
        return self.header.page_indices

    @property
    def num_layers(self) -> int:
        return self.header.layer_stop - self.header.layer_start

    def accept(self) -> None:
        """The pages were written; the sender will not send them again."""
        self.answer(Accepted(self.header.shipment_id))

    def refuse(self, reason: str) -> None:
        """The pages do not count. The sender sends a CORRUPT shipment once more; any other reason ends the request."""
        self.answer(Refused(self.header.shipment_id, reason))


def verify_and_write(
    shipment: Shipment, cache: PagedCache, *, generation_of: Callable[[int], int], epoch: int
) -> str | None:
    """Writes a shipment's pages if epochs, generations and checksums are right; otherwise returns why they are not.

    generation_of: a page's generation now. epoch: this worker's. For the thread that owns the page pool and the cache.
    """
    header = shipment.header
    if header.decode_epoch != epoch or header.prefill_epoch != shipment.prefill_epoch:
        return STALE_EPOCH
    if [generation_of(page) for page in header.page_ids] != header.generations:
        return STALE_GENERATION
    pages = cache.latent if header.kind == "latent" else cache.index
    payload = shipment.payload.to(pages.device)
    if payload.is_cuda:  # it was allocated on the link's stream and is read on this one
        payload.record_stream(torch.cuda.current_stream(payload.device))
    checksums = torch.tensor(header.checksums, dtype=torch.int64, device=pages.device)
    layers = (header.layer_start, header.layer_stop)
    right = cache.ops.unpack_pages(payload, checksums, pages, layers, header.page_ids)
    if bool(right.all()):
        return None
    places = (~right).view(-1, len(header.page_ids)).nonzero() + torch.tensor(
        (layers[0], 0), device=right.device
    )
    log.warning(
        "request %s: %s pages (layer, number) arrived corrupt: %s",
        header.request_id,
        header.kind,
        places.tolist(),
    )
    return CORRUPT
