"""Pages that have arrived but are not yet anyone's: what must hold before they count.

Knows nothing of links; whoever brings a shipment passes functions that judge and answer for it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from workers.paged_cache import PagedCache
from workers.shipping.protocol import STALE_EPOCH, STALE_GENERATION, Accepted, Header, Refused


@dataclass(frozen=True)
class Verdict:
    """Which pages of a shipment were wrong, bool on the host, once `known` has happened; None: it has."""

    wrong: torch.Tensor
    known: torch.cuda.Event | None

    def wait(self) -> list[int]:
        """The numbers of the wrong pages within the payload, which were not written. Blocks this thread, not the device."""
        if self.known is not None:
            self.known.synchronize()
        return self.wrong.nonzero().flatten().tolist()


@dataclass(frozen=True, eq=False)
class Shipment:
    """`payload` is uint8 [header.payload_bytes] on the caches' device.

    It is refused, or written by `write`, after which `judge` waits for the verdict elsewhere and has it refused or accepted. One
    of `accept` and `refuse` is called, once, by any thread; neither blocks or raises.
    """

    header: Header
    payload: torch.Tensor
    prefill_epoch: int  # of the worker at the other end of the link: the header must name the same
    judge: Callable[["Shipment", Verdict], None]
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
        """The pages were verified and written; the sender will not send them again."""
        self.answer(Accepted(self.header.shipment_id))

    def refuse(self, reason: str) -> None:
        """The pages do not count. The sender sends a CORRUPT shipment once more; any other reason ends the request."""
        self.answer(Refused(self.header.shipment_id, reason))

    def passes(self, objection: str | None) -> bool:
        """Refuses it for the objection, if there is one; True if there is none."""
        if objection is not None:
            self.refuse(objection)
        return objection is None


def staleness(shipment: Shipment, *, generation_of: Callable[[int], int], epoch: int) -> str | None:
    """Why a shipment is of another time, None if it is not. generation_of: a page's generation now. epoch: this worker's."""
    header = shipment.header
    if header.decode_epoch != epoch or header.prefill_epoch != shipment.prefill_epoch:
        return STALE_EPOCH
    if [generation_of(page) for page in header.page_ids] != header.generations:
        return STALE_GENERATION
    return None


def write(shipment: Shipment, cache: PagedCache) -> None:
    """Has a shipment's pages verified and those that are right written, and its judge told when the verdict will be known.

    For the thread that owns the page pool and the cache. On a GPU it waits for nothing: all is queued on this thread's stream, before
    anything that later reads the pages or gives them to someone else.
    """
    header, payload = shipment.header, shipment.payload
    pages = cache.latent if header.kind == "latent" else cache.index
    with torch.cuda.device_of(pages):
        wrong = cache.ops.unpack_pages(
            payload, pages, (header.layer_start, header.layer_stop), header.page_ids
        )
        shipment.judge(shipment, _verdict(wrong, payload))


def _verdict(wrong: torch.Tensor, payload: torch.Tensor) -> Verdict:
    if not wrong.is_cuda:
        return Verdict(wrong, None)
    stream = torch.cuda.current_stream()
    payload.record_stream(stream)  # it was allocated on the link's
    on_host = torch.empty(wrong.shape, dtype=wrong.dtype, pin_memory=True).copy_(wrong, non_blocking=True)
    known = torch.cuda.Event(blocking=True)
    known.record(stream)
    return Verdict(on_host, known)


def warm(cache: PagedCache) -> None:
    """Loads the kernels of shipping: loaded for the first time while a receive is pending, they could block behind it."""
    if not cache.latent.is_cuda:
        return
    with torch.cuda.device_of(cache.latent):
        for pages in (cache.latent, cache.index):
            page = torch.zeros_like(pages[:1, :1])
            payload = cache.ops.pack_pages(page, (0, 1), [0])
            _verdict(cache.ops.unpack_pages(payload, page, (0, 1), [0]), payload).wait()
