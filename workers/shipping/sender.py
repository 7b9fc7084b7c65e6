"""The prefill side of shipping: hands the pages of requests to decode workers, one lane for each.

A request is opened by its first call here and ends exactly once, by on_done or on_failed; from then on none of its pages
is read, so that they may be let go. Nothing here blocks, so an engine thread may call it. Knows nothing of engines.
"""

import os
import queue
import threading
from collections.abc import Callable, Sequence
from itertools import count

import torch

from workers.messages import Ticket
from workers.paged_cache import PagedCache
from workers.shipping.counters import Counters
from workers.shipping.lane import Destination, Lane, Origin
from workers.shipping.protocol import Commit, Fingerprint, Header, LinkConfig
from workers.shipping.shipment import warm

CORRUPT_VARIABLE = "LIGHTSHIP_TEST_CORRUPT_SHIPMENT"
_REMEMBERED_ENDS = 4096  # far more than there can be between an end and the caller's hearing of it


class Shipper:
    """`set_peers` says which decode workers there are. The callbacks come on threads of the links, or on the caller's.

    on_done(request_id): the decode worker has everything and the first token.
    on_failed(request_id, reason): it has not, and never will by this Shipper.
    corrupt(header, payload): for tests, may change a payload before it leaves. Without it the environment variable
    LIGHTSHIP_TEST_CORRUPT_SHIPMENT="index:N" (or "latent:N") flips one byte of the N-th shipment of that kind.
    """

    def __init__(
        self,
        *,
        worker_id: str,
        epoch: int,
        secret: str,
        cache: PagedCache,
        on_done: Callable[[str], None],
        on_failed: Callable[[str, str], None],
        config: LinkConfig | None = None,
        corrupt: Callable[[Header, torch.Tensor], None] | None = None,
    ) -> None:
        self._counters = Counters(
            "shipments",
            "resent_shipments",
            "shipped_bytes",
            "shipped_header_bytes",
            "shipped_pages",
            "ship_seconds",
            "pairs_made",
            "pairs_lost",
        )
        self._origin = Origin(
            worker_id=worker_id,
            epoch=epoch,
            secret=secret,
            cache=cache,
            fingerprint=Fingerprint.of(cache.layout, cache.latent.shape[0]),
            config=config or LinkConfig(),
            counters=self._counters,
            finish=self._finish,
            corrupt=corrupt or _corruption_from_environment(),
        )
        self._on_done = on_done
        self._on_failed = on_failed
        self._lock = threading.Lock()
        self._lanes: dict[str, Lane] = {}
        self._lane_of: dict[str, Lane] = {}  # of the requests that have not ended
        self._ended: dict[str, None] = {}  # newest last
        self._unwritten: queue.SimpleQueue[tuple[torch.cuda.Event, Callable[[], None]] | None] = (
            queue.SimpleQueue()
        )
        self._watcher = threading.Thread(target=self._watch, name=f"written-{worker_id}", daemon=True)
        warm(cache)
        if self._origin.device.type == "cuda":
            self._watcher.start()

    def set_peers(self, peers: dict[str, tuple[str, int, int]]) -> None:
        """Decode worker -> (host, port, epoch). Those left out, or here with another epoch or address, are let go."""
        wanted = {name: Destination(name, *where) for name, where in peers.items()}
        with self._lock:
            for name, lane in list(self._lanes.items()):
                if lane.destination != wanted.get(name):
                    self._lanes.pop(name).stop()
            for name, destination in wanted.items():
                if name not in self._lanes:
                    self._lanes[name] = Lane(self._origin, destination)

    def peers(self) -> list[tuple[str, int]]:
        """The decode workers, with their epochs, that can be shipped to at this moment."""
        with self._lock:
            return [(name, lane.destination.epoch) for name, lane in self._lanes.items() if lane.paired]

    def counters(self) -> dict[str, float]:
        """Totals since the start.

        shipped_bytes: payload, also of what was sent twice; shipped_header_bytes: the checksums, and the other messages but heartbeats.
        shipped_pages: pages whose last layer was accepted. ship_seconds: time with a shipment under way, summed over lanes.
        """
        return self._counters.snapshot()

    def ship(self, ticket: Ticket, page_indices: Sequence[int], page_ids: Sequence[int]) -> None:
        """Sends all layers of these pages: page_indices within the request, page_ids in this worker's cache.

        The pages must stay as they are until the request ends.
        """
        self._post_written(ticket, lambda lane: lane.add(ticket, page_indices, page_ids))

    def commit(self, ticket: Ticket, token: int, finish: str | None, num_commits: int = 1) -> None:
        """After the last `ship`: hands over the first token, and the request with it, once every page was accepted.

        num_commits: how many shippers share the request, each with its own pages and its own commit
        """
        commit = Commit(ticket.request_id, ticket.decode_epoch, len(ticket.pages), token, finish, num_commits)
        self._post_written(ticket, lambda lane: lane.commit(commit))

    def abandon(self, ticket: Ticket) -> None:
        """Gives a request up; it ends with on_failed, unless it just ended otherwise."""
        self._post(ticket, lambda lane: lane.abandon(ticket.request_id))

    def close(self) -> None:
        """Ends every request and thread. May wait as long as a connection takes to time out."""
        if self._watcher.is_alive():
            self._unwritten.put(None)
            self._watcher.join()
        with self._lock:
            lanes = list(self._lanes.values())
            self._lanes.clear()
        for lane in lanes:
            lane.stop()
        for lane in lanes:
            lane.join()

    def _post_written(self, ticket: Ticket, command: Callable[[Lane], None]) -> None:
        """`_post`, on a GPU once what the caller's stream has queued so far is done; in the order of the calls.

        A lane that waited for it would send nothing of other requests meanwhile, and the peer's receive would spin on its GPU.
        """
        device = self._origin.device
        if device.type != "cuda":
            self._post(ticket, command)
            return
        written = torch.cuda.Event(blocking=True)
        written.record(torch.cuda.current_stream(device))
        self._unwritten.put((written, lambda: self._post(ticket, command)))

    def _watch(self) -> None:
        while (item := self._unwritten.get()) is not None:
            written, post = item
            written.synchronize()
            post()

    def _post(self, ticket: Ticket, command: Callable[[Lane], None]) -> None:
        """Has the request's lane run a command, unless the request has ended by then."""
        request_id = ticket.request_id
        with self._lock:
            if request_id in self._ended:
                return
            lane = self._lane_of.get(request_id) or self._lanes.get(ticket.decode_worker)
            if lane is not None and lane.destination.epoch == ticket.decode_epoch:
                self._lane_of[request_id] = lane
                # Within the lock: a lane that is being stopped gets every command before the stop.
                lane.post(lambda: None if self._has_ended(request_id) else command(lane))
                return
        self._finish(
            request_id, f"decode worker {ticket.decode_worker} of epoch {ticket.decode_epoch}: not a peer"
        )

    def _has_ended(self, request_id: str) -> bool:
        with self._lock:
            return request_id in self._ended

    def _finish(self, request_id: str, reason: str | None) -> None:
        with self._lock:
            if request_id in self._ended:
                return
            self._lane_of.pop(request_id, None)
            self._ended[request_id] = None
            if len(self._ended) > _REMEMBERED_ENDS:
                del self._ended[next(iter(self._ended))]
        if reason is None:
            self._on_done(request_id)
        else:
            self._on_failed(request_id, reason)


def _corruption_from_environment() -> Callable[[Header, torch.Tensor], None] | None:
    """Flips one byte of the N-th shipment of a kind, as LIGHTSHIP_TEST_CORRUPT_SHIPMENT="kind:N" asks for."""
    setting = os.environ.get(CORRUPT_VARIABLE)
    if not setting:
        return None
    kind, _, number = setting.partition(":")
    if kind not in ("latent", "index") or not number.isdecimal():
        raise ValueError(f'{CORRUPT_VARIABLE} is {setting!r}, not "index:N" or "latent:N"')
    numbers = count(1)

    def flip(header: Header, payload: torch.Tensor) -> None:
        if header.kind == kind and next(numbers) == int(number):
            payload[header.nbytes // 2] ^= 1

    return flip
