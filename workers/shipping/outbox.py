"""What one link still has to send, in which order, and what may leave now.

Pure bookkeeping of the sending half: knows nothing of sockets, threads or tensors.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from workers.messages import Ticket
from workers.shipping.protocol import CORRUPT, Commit, Fingerprint, Header, Kind

KINDS: tuple[Kind, Kind] = ("index", "latent")  # the order in which they leave


@dataclass(frozen=True)
class Part:
    """One shipment's worth of a request: some layers of some pages of one kind."""

    ticket: Ticket
    kind: Kind
    layers: tuple[int, int]  # start, stop
    page_indices: list[int]  # within the request
    page_ids: list[int]  # in the sender's cache; the receiver's are in the ticket
    resent: bool = False

    def header(self, shipment_id: int, *, prefill_epoch: int, fingerprint: Fingerprint) -> Header:
        """Announces this part."""
        num_layers = self.layers[1] - self.layers[0]
        return Header(
            shipment_id=shipment_id,
            request_id=self.ticket.request_id,
            prefill_epoch=prefill_epoch,
            decode_epoch=self.ticket.decode_epoch,
            kind=self.kind,
            layer_start=self.layers[0],
            layer_stop=self.layers[1],
            page_indices=self.page_indices,
            page_ids=[self.ticket.pages[index] for index in self.page_indices],
            generations=[self.ticket.generations[index] for index in self.page_indices],
            nbytes=num_layers * len(self.page_ids) * fingerprint.page_bytes(self.kind),
        )


def split(
    ticket: Ticket,
    page_indices: Sequence[int],
    page_ids: Sequence[int],
    *,
    fingerprint: Fingerprint,
    max_bytes: int,
) -> Iterator[Part]:
    """Cuts pages into parts of at most `max_bytes` (but at least one page of one layer).

    Group of layers by group of layers; of each group the index keys go first, so that a decode worker could begin to
    select before the latents are there. Index keys are small: a part of them covers the layers of several parts of latents, so
    that all parts are about as large.
    """
    runs = dict[Kind, list[slice]]()
    num_layers = dict[Kind, int]()  # of a part
    for kind in KINDS:
        most = max(1, max_bytes // fingerprint.page_bytes(kind))
        runs[kind] = list(_even_runs(len(page_ids), most))
        num_layers[kind] = max(1, most // max((run.stop - run.start for run in runs[kind]), default=1))
    for group in _even_runs(fingerprint.num_layers, max(num_layers.values())):
        for kind in KINDS:
            for layers in _even_runs(group.stop - group.start, num_layers[kind]):
                between = (group.start + layers.start, group.start + layers.stop)
                for run in runs[kind]:
                    yield Part(ticket, kind, between, list(page_indices[run]), list(page_ids[run]))


def _even_runs(total: int, longest: int) -> Iterator[slice]:
    """Cuts 0..total into as few runs of at most `longest` as there can be, all about as long."""
    number = -(-total // longest)
    for index in range(number):
        yield slice(total * index // number, total * (index + 1) // number)


@dataclass
class _Progress:
    unaccepted: int = 0  # parts queued or in flight
    commit: Commit | None = None


class Outbox:
    """The requests of one link. A request is here from its first part or commit until `drop`.

    At most `max_in_flight` parts are sent and not answered. A commit leaves once every part of its request was accepted.
    """

    def __init__(self, max_in_flight: int) -> None:
        self._max_in_flight = max_in_flight
        self._ids = count(1)
        self._queue: deque[Part] = deque()
        self._commits: deque[Commit] = deque()  # may leave now
        self._in_flight: dict[int, Part] = {}
        self._requests: dict[str, _Progress] = {}

    @property
    def requests(self) -> list[str]:
        return list(self._requests)

    def add(self, request_id: str, parts: Iterable[Part]) -> None:
        progress = self._requests.setdefault(request_id, _Progress())
        for part in parts:
            self._queue.append(part)
            progress.unaccepted += 1

    def commit(self, commit: Commit) -> None:
        """No part of the request is added after this."""
        progress = self._requests.setdefault(commit.request_id, _Progress())
        progress.commit = commit
        self._release(progress)

    def next_commit(self) -> Commit | None:
        return self._commits.popleft() if self._commits else None

    def next_part(self) -> tuple[int, Part] | None:
        """The part to send now and its shipment id; None if there is none or too many are in flight."""
        if not self._queue or len(self._in_flight) >= self._max_in_flight:
            return None
        shipment_id, part = next(self._ids), self._queue.popleft()
        self._in_flight[shipment_id] = part
        return shipment_id, part

    def accepted(self, shipment_id: int) -> Part | None:
        """Returns the part; None if no such shipment is in flight."""
        part = self._in_flight.pop(shipment_id, None)
        progress = self._requests.get(part.ticket.request_id) if part else None
        if progress:
            progress.unaccepted -= 1
            self._release(progress)
        return part

    def refused(self, shipment_id: int, reason: str) -> Part | None:
        """Queues a part that was corrupt for the first time once more, in front. Otherwise returns it: its request has failed."""
        part = self._in_flight.pop(shipment_id, None)
        if part is None or part.ticket.request_id not in self._requests:
            return None
        if reason != CORRUPT or part.resent:
            return part
        self._queue.appendleft(replace(part, resent=True))
        return None

    def drop(self, request_id: str) -> bool:
        """Forgets a request: nothing of it leaves any more. False if it was not here."""
        if self._requests.pop(request_id, None) is None:
            return False
        self._queue = deque(part for part in self._queue if part.ticket.request_id != request_id)
        self._commits = deque(commit for commit in self._commits if commit.request_id != request_id)
        return True

    def _release(self, progress: _Progress) -> None:
        if progress.commit is not None and not progress.unaccepted:
            self._commits.append(progress.commit)
