"""The shippers of a prefill worker's ranks as one: every rank has every page, so each ships a share of them.

A request ends once, when no rank reads its pages any more; it has failed if it failed on one of them. Knows nothing of engines.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from workers.messages import Ticket
from workers.paged_cache import PagedCache
from workers.ranks.leader import Followers
from workers.ranks.messages import (
    Alive,
    Peers,
    ShipAbandon,
    ShipCommit,
    ShipEnded,
    ShipPages,
    ToFollower,
    ToLeader,
    rank_name,
)
from workers.shares import even_runs
from workers.shipping.sender import Shipper

_REMEMBERED_ENDS = 4096  # far more than there can be between an end and the caller's hearing of it


class Peer(NamedTuple):
    """A decode worker: where the landings of its ranks listen, rank 0's first."""

    host: str
    port: int
    epoch: int
    rank_ports: Sequence[int] = ()


@dataclass
class _Open:
    """A request and the ranks that may still read its pages."""

    ticket: Ticket
    ranks: set[int]
    reason: str | None = None


class Shippers:
    """As workers.shipping.sender.Shipper, of one rank or several."""

    def __init__(
        self,
        *,
        worker_id: str,
        epoch: int,
        secret: str,
        cache: PagedCache,
        followers: Followers | None,
        on_done: Callable[[str], None],
        on_failed: Callable[[str, str], None],
    ) -> None:
        self._followers = followers
        self._ranks = range(1 + (followers.count if followers else 0))
        self._on_done = on_done
        self._on_failed = on_failed
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        self._ended_lately: dict[str, None] = {}  # newest last; late commands for them do nothing
        self._landings: dict[
            str, list[tuple[str, int]]
        ] = {}  # decode worker -> names and epochs of its landings
        self._own = Shipper(
            worker_id=worker_id,
            epoch=epoch,
            secret=secret,
            cache=cache,
            on_done=lambda request_id: self._ended(0, request_id, None),
            on_failed=lambda request_id, reason: self._ended(0, request_id, reason),
        )
        if followers is not None:
            followers.on_message = self._hear

    def set_peers(self, peers: dict[str, Peer]) -> None:
        """The decode workers there are."""
        landings: dict[str, tuple[str, int, int]] = {}
        names: dict[str, list[tuple[str, int]]] = {}
        for worker, peer in peers.items():
            ports = (peer.port, *peer.rank_ports)
            mine = {rank_name(worker, rank): (peer.host, port, peer.epoch) for rank, port in enumerate(ports)}
            names[worker] = [(name, peer.epoch) for name in mine]
            landings |= mine
        self._landings = names
        self._own.set_peers(landings)
        for rank in self._ranks[1:]:
            self._tell(rank, Peers(landings))

    def peers(self) -> list[tuple[str, int]]:
        """The decode workers that every rank here can ship to every rank of."""
        reached = set(self._own.peers())
        for rank in self._ranks[1:]:
            reached &= set(self._alive(rank).peers)
        return [names[0] for names in self._landings.values() if reached.issuperset(names)]

    def counters(self) -> dict[str, float]:
        """Totals of all ranks."""
        totals = self._own.counters()
        for rank in self._ranks[1:]:
            for name, value in self._alive(rank).counters.items():
                totals[name] += value
        return totals

    def ship(self, ticket: Ticket, page_indices: Sequence[int], page_ids: Sequence[int]) -> None:
        self._opened(ticket)
        for rank, run in enumerate(even_runs(len(page_ids), len(self._ranks))):
            indices, pages = list(page_indices[run]), list(page_ids[run])
            if pages and rank:
                self._tell(rank, ShipPages(ticket, indices, pages))
            elif pages:
                self._own.ship(ticket, indices, pages)

    def commit(self, ticket: Ticket, token: int, finish: str | None) -> None:
        self._opened(ticket)
        for rank in self._ranks[1:]:
            self._tell(rank, ShipCommit(ticket, token, finish))
        self._own.commit(ticket, token, finish, len(self._ranks))

    def abandon(self, ticket: Ticket) -> None:
        self._opened(ticket)
        for rank in self._ranks[1:]:
            self._tell(rank, ShipAbandon(ticket))
        self._own.abandon(ticket)

    def close(self) -> None:
        """Ends this rank's links; those of the others end with their processes."""
        self._own.close()

    def _opened(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket.request_id not in self._ended_lately:
                self._open.setdefault(ticket.request_id, _Open(ticket, set(self._ranks)))

    def _ended(self, rank: int, request_id: str, reason: str | None) -> None:
        """One rank's last word. The others give the request up too if it failed there."""
        with self._lock:
            request = self._open[request_id]
            request.ranks.discard(rank)
            first_failure = reason is not None and request.reason is None
            if first_failure:
                request.reason = reason
            over = not request.ranks
            if over:
                del self._open[request_id]
                self._ended_lately[request_id] = None
                if len(self._ended_lately) > _REMEMBERED_ENDS:
                    del self._ended_lately[next(iter(self._ended_lately))]
        if over and request.reason is None:
            self._on_done(request_id)
        elif over:
            assert request.reason is not None
            self._on_failed(request_id, request.reason)
        elif first_failure:
            self.abandon(request.ticket)

    def _hear(self, rank: int, message: ToLeader) -> None:
        assert isinstance(message, ShipEnded)
        self._ended(rank, message.request_id, message.reason)

    def _tell(self, rank: int, message: ToFollower) -> None:
        assert self._followers is not None
        self._followers.send(rank, message)

    def _alive(self, rank: int) -> Alive:
        assert self._followers is not None
        return self._followers.alive(rank)
