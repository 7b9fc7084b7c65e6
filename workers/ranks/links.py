"""A follower's links: the shipper of a prefill rank, the landing of a decode rank. The leader says what to ship and to expect.

Pages are read and written on the follower's own thread, between its steps. Knows nothing of what requests are for.
"""

from collections.abc import Callable

from kernels.layout import PAGE_SIZE
from workers.messages import Ticket
from workers.paged_cache import PagedCache
from workers.ranks.messages import (
    AbandonLanded,
    CommitLanded,
    Expect,
    Forget,
    PagesLanded,
    Peers,
    Ship,
    ShipAbandon,
    ShipCommit,
    ShipEnded,
    ShipPages,
    ToFollower,
    ToLeader,
    rank_name,
)
from workers.shipping.receiver import Landing, Shipment, staleness, write
from workers.shipping.sender import Shipper

Tell = Callable[[ToLeader], None]


class NoLinks:
    """Of an engine that ships nothing."""

    port = 0

    def handle(self, message: ToFollower) -> None:
        raise ValueError(f"nobody here takes {message}")

    def peers(self) -> list[tuple[str, int]]:
        return []

    def counters(self) -> dict[str, float]:
        return {}


class PrefillLinks:
    """Every rank of a prefill worker has every page; this one ships those that it is told to."""

    port = 0

    def __init__(self, ship: Ship, rank: int, num_ranks: int, cache: PagedCache, tell: Tell) -> None:
        self._num_ranks = num_ranks
        self._shipper = Shipper(
            worker_id=rank_name(ship.worker_id, rank),
            epoch=ship.epoch,
            secret=ship.secret,
            cache=cache,
            on_done=lambda request_id: tell(ShipEnded(request_id, None)),
            on_failed=lambda request_id, reason: tell(ShipEnded(request_id, reason)),
        )
        self.peers = self._shipper.peers
        self.counters = self._shipper.counters

    def handle(self, message: ToFollower) -> None:
        if isinstance(message, Peers):
            self._shipper.set_peers(message.landings)
        elif isinstance(message, ShipPages):
            self._shipper.ship(message.ticket, message.page_indices, message.page_ids)
        elif isinstance(message, ShipCommit):
            self._shipper.commit(message.ticket, message.token, message.finish, self._num_ranks)
        elif isinstance(message, ShipAbandon):
            self._shipper.abandon(message.ticket)


class DecodeLinks:
    """`post` runs a function on the thread that writes pages."""

    def __init__(
        self,
        ship: Ship,
        rank: int,
        cache: PagedCache,
        tell: Tell,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._cache = cache
        self._epoch = ship.epoch
        self._tell = tell
        self._expected: dict[str, _Expected] = {}
        self._landing = Landing(
            worker_id=rank_name(ship.worker_id, rank),
            epoch=ship.epoch,
            host=ship.host,
            secret=ship.secret,
            cache=cache,
        )
        self._landing.on_shipment = lambda shipment: post(lambda: self._land(shipment))
        self._landing.on_verified = lambda shipment: post(lambda: self._verified(shipment))
        self._landing.on_commit = lambda commit: tell(CommitLanded(commit))
        self._landing.on_abandon = lambda request_id: tell(AbandonLanded(request_id))
        self._landing.start()
        self.port = self._landing.port
        self.peers = self._landing.peers
        self.counters = self._landing.counters

    def handle(self, message: ToFollower) -> None:
        if isinstance(message, Expect):
            self._expected[message.ticket.request_id] = _Expected(message.ticket, self._cache)
        elif isinstance(message, Forget):
            self._expected.pop(message.request_id, None)

    def _land(self, shipment: Shipment) -> None:
        if shipment.passes(self._objection(shipment)):
            write(shipment, self._cache)

    def _verified(self, shipment: Shipment) -> None:
        """Its pages are written and right; they count unless the leader has forgotten their request meanwhile."""
        if not shipment.passes(self._objection(shipment)):
            return
        expected = self._expected[shipment.request_id]
        expected.landed(shipment)
        if not expected.missing:
            del self._expected[shipment.request_id]
        # Before the answer: what the sender says next must not overtake it.
        self._tell(PagesLanded(shipment.request_id, shipment.page_indices, shipment.num_layers))
        shipment.accept()

    def _objection(self, shipment: Shipment) -> str | None:
        expected = self._expected.get(shipment.request_id)
        if expected is None:
            return "no such request is landing here"
        return expected.objection(shipment, self._epoch)


class _Expected:
    """Pages of a ticket that have not landed. missing: page index -> layers x kinds."""

    def __init__(self, ticket: Ticket, cache: PagedCache) -> None:
        parts = 2 * cache.latent.shape[0]  # latents and index keys of every layer
        self.missing = dict.fromkeys(range(ticket.num_resident_tokens // PAGE_SIZE, len(ticket.pages)), parts)
        self._pages = ticket.pages
        self._generations = dict(zip(ticket.pages, ticket.generations, strict=True))

    def objection(self, shipment: Shipment, epoch: int) -> str | None:
        """The reason not to take it, if there is one."""
        places = zip(shipment.page_indices, shipment.header.page_ids, strict=True)
        if not all(index in self.missing and self._pages[index] == page for index, page in places):
            return "pages that the ticket does not name, or that have landed already"
        return staleness(shipment, generation_of=self._generations.__getitem__, epoch=epoch)

    def landed(self, shipment: Shipment) -> None:
        for index in shipment.page_indices:
            self.missing[index] -= shipment.num_layers
            if not self.missing[index]:
                del self.missing[index]
