"""The landings of a decode worker's ranks as one: each rank lands the pages of its own requests. Knows nothing of engines."""

from collections.abc import Callable

from workers.messages import Ticket
from workers.ranks.leader import Followers
from workers.ranks.messages import (
    AbandonLanded,
    CommitLanded,
    Expect,
    Forget,
    PagesLanded,
    ToLeader,
)
from workers.shipping.receiver import Commit, Landing, Shipment


class Landings:
    """Rank 0's landing and those of the followers, of which only the news comes here. Callbacks come on threads of the links.

    on_shipment, on_verified: pages for rank 0, as of workers.shipping.receiver.Landing
    on_landed(request_id, page_indices, num_layers): pages that another rank has written
    """

    def __init__(self, own: Landing, followers: Followers | None) -> None:
        self.on_shipment: Callable[[Shipment], None] = lambda shipment: None
        self.on_verified: Callable[[Shipment], None] = lambda shipment: None
        self.on_landed: Callable[[str, list[int], int], None] = lambda request_id, indices, layers: None
        self.on_commit: Callable[[Commit], None] = lambda commit: None
        self.on_abandon: Callable[[str], None] = lambda request_id: None
        self._own = own
        self._followers = followers
        own.on_shipment = lambda shipment: self.on_shipment(shipment)
        own.on_verified = lambda shipment: self.on_verified(shipment)
        own.on_commit = lambda commit: self.on_commit(commit)
        own.on_abandon = lambda request_id: self.on_abandon(request_id)
        if followers is not None:
            followers.on_message = self._hear

    def expect(self, rank: int, ticket: Ticket) -> None:
        """The rank's pages that the ticket names may be written. Rank 0 asks its caller of every shipment instead."""
        if rank and self._followers is not None:
            self._followers.send(rank, Expect(ticket))

    def forget(self, rank: int, request_id: str) -> None:
        """Before the pages become another's."""
        if rank and self._followers is not None:
            self._followers.send(rank, Forget(request_id))

    def peers(self) -> list[tuple[str, int]]:
        """The prefill workers, with their epochs, that can ship to rank 0; whether to all ranks, they know themselves."""
        return self._own.peers()

    def counters(self) -> dict[str, float]:
        """Totals of all ranks."""
        totals = self._own.counters()
        if self._followers is not None:
            for rank in range(1, self._followers.count + 1):
                for name, value in self._followers.alive(rank).counters.items():
                    totals[name] += value
        return totals

    def close(self) -> None:
        """Ends rank 0's links; those of the others end with their processes."""
        self._own.close()

    def _hear(self, rank: int, message: ToLeader) -> None:
        if isinstance(message, PagesLanded):
            self.on_landed(message.request_id, message.page_indices, message.num_layers)
        elif isinstance(message, CommitLanded):
            self.on_commit(message.commit)
        elif isinstance(message, AbandonLanded):
            self.on_abandon(message.request_id)
