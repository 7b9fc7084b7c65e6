"""The sending half of one pair: stays paired with one decode worker, packs pages and sends them.

Two threads. The pairing thread connects and reads what the peer says; when the link breaks it tries again, until `stop`.
The lane thread does everything else. It alone reads pages and ends requests, so that no page of a request is read after
its end was told. Knows nothing of other decode workers.
"""

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from workers.cpu_threads import use_threads
from workers.messages import Ticket
from workers.paged_cache import PagedCache
from workers.shipping.counters import Counters
from workers.shipping.link import Link, LinkLost
from workers.shipping.outbox import Outbox, Part, split
from workers.shipping.pair import PREFILL_RANK, Pair, gpu_of
from workers.shipping.protocol import (
    Abandon,
    Accepted,
    Commit,
    Committed,
    Fingerprint,
    Header,
    Hello,
    LinkConfig,
    Message,
    Refused,
    Rejected,
    Welcome,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """What all lanes of a prefill worker share.

    finish(request_id, reason): tells the end of a request; None is success. corrupt(header, payload): a test's hand in
    the pages of a payload, whose checksums lie behind them.
    """

    worker_id: str
    epoch: int
    secret: str
    cache: PagedCache
    fingerprint: Fingerprint
    config: LinkConfig
    counters: Counters
    finish: Callable[[str, str | None], None]
    corrupt: Callable[[Header, torch.Tensor], None] | None

    @property
    def device(self) -> torch.device:
        return self.cache.latent.device


@dataclass(frozen=True)
class Destination:
    """A decode worker's landing."""

    worker_id: str
    host: str
    port: int
    epoch: int


class Lane:
    """`post` runs a command on the lane thread; `add`, `commit` and `abandon` are the commands there are."""

    def __init__(self, origin: Origin, destination: Destination) -> None:
        self.destination = destination
        self.paired = False
        self._origin = origin
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outbox = Outbox(origin.config.max_in_flight)
        self._in_flight: dict[int, dist.Work] = {}  # holds the payloads until they are answered
        self._busy_since = 0.0
        self._link: Link | None = None
        self._pair: Pair | None = None
        self._stopped = False
        self._stopping = threading.Event()
        self._newest_link: Link | None = None  # the pairing thread's
        name = f"{origin.worker_id}-{destination.worker_id}"
        self._threads = [
            threading.Thread(target=self._run, name=f"lane-{name}", daemon=True),
            threading.Thread(target=self._keep_paired, name=f"pairing-{name}", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def post(self, command: Callable[[], None]) -> None:
        self._inbox.put(command)

    def stop(self) -> None:
        """Ends every request that was posted and both threads. Returns at once; `join` waits."""
        self._stopping.set()
        if (link := self._newest_link) is not None:
            link.close("this worker let it go")
        self.post(self._stop)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    # Commands: on the lane thread.

    def add(
        self,
        ticket: Ticket,
        page_indices: Sequence[int],
        page_ids: Sequence[int],
    ) -> None:
        """Queues all layers of these pages, which hold their final bytes by now."""
        if self._pair is None:
            self._fail(ticket.request_id, "not paired")
            return
        max_bytes = min(self._origin.config.max_shipment_bytes, self._pair.max_message_bytes)
        parts = split(
            ticket, page_indices, page_ids, fingerprint=self._origin.fingerprint, max_bytes=max_bytes
        )
        self._outbox.add(ticket.request_id, parts)

    def commit(self, commit: Commit) -> None:
        if self._pair is None:
            self._fail(commit.request_id, "not paired")
        else:
            self._outbox.commit(commit)

    def abandon(self, request_id: str) -> None:
        self._fail(request_id, "abandoned")

    # The lane thread.

    def _run(self) -> None:
        use_threads(1)
        try:
            while not self._stopped:
                self._inbox.get()()
                while self._inbox.empty() and self._send_next():
                    pass
        finally:
            self._lost("this worker let it go")

    def _stop(self) -> None:
        self._stopped = True

    def _send_next(self) -> bool:
        """Sends one message, with its payload if it has one. False if nothing may leave now."""
        link, pair = self._link, self._pair
        if link is None or pair is None:
            return False
        try:
            if (commit := self._outbox.next_commit()) is not None:
                self._say(link, commit)
            elif (numbered := self._outbox.next_part()) is not None:
                self._ship(link, pair, *numbered)
            else:
                return False
        except (OSError, RuntimeError) as error:
            link.close(str(error))  # wakes the pairing thread, which pairs again
            self._lost(str(error))
        return True

    def _ship(self, link: Link, pair: Pair, shipment_id: int, part: Part) -> None:
        """On a GPU packing and sending are queued, and the next parts too, as many as may be in flight, while this one is sent."""
        if not self._in_flight:
            self._busy_since = time.monotonic()
        origin = self._origin
        pages = origin.cache.latent if part.kind == "latent" else origin.cache.index
        header = part.header(shipment_id, prefill_epoch=origin.epoch, fingerprint=origin.fingerprint)
        with torch.cuda.stream(pair.stream):
            try:
                packed = origin.cache.ops.pack_pages(pages, part.layers, part.page_ids)
                payload = packed.to(pair.payload_device)
            except RuntimeError as error:  # no memory left for one more copy, say
                self._turned_down(shipment_id, f"cannot pack pages: {error}")
                return
            if origin.corrupt is not None:
                origin.corrupt(header, payload)
        self._say(link, header)
        self._in_flight[shipment_id] = pair.send(payload, shipment_id)
        origin.counters.add(
            shipments=1,
            shipped_bytes=header.nbytes,
            shipped_header_bytes=header.payload_bytes - header.nbytes,
            resent_shipments=int(part.resent),
        )

    def _say(self, link: Link, message: Message) -> None:
        self._origin.counters.add(shipped_header_bytes=link.send(message))

    def _hear(self, message: Message) -> None:
        if isinstance(message, Accepted):
            part = self._outbox.accepted(message.shipment_id)
            self._answered(message.shipment_id)
            if (
                part is not None
                and part.kind == "latent"
                and part.layers[1] == self._origin.fingerprint.num_layers
            ):
                self._origin.counters.add(shipped_pages=len(part.page_ids))
        elif isinstance(message, Refused):
            self._answered(message.shipment_id)
            self._turned_down(message.shipment_id, message.reason)
        elif isinstance(message, Committed) and self._outbox.drop(message.request_id):
            self._origin.finish(message.request_id, None)

    def _turned_down(self, shipment_id: int, reason: str) -> None:
        failed = self._outbox.refused(shipment_id, reason)
        if failed is not None:
            self._fail(failed.ticket.request_id, reason)

    def _answered(self, shipment_id: int) -> None:
        """The peer has the whole payload: its memory may go."""
        if self._in_flight.pop(shipment_id, None) is not None and not self._in_flight:
            self._origin.counters.add(ship_seconds=time.monotonic() - self._busy_since)

    def _fail(self, request_id: str, why: str) -> None:
        """Ends a request here and, if the link is up, there."""
        self._outbox.drop(request_id)
        if self._pair is not None:
            self._pair.settle()  # from now on its pages may not be read
        if self._link is not None:
            with contextlib.suppress(OSError):  # the pairing thread will notice
                self._say(self._link, Abandon(request_id))
        self._origin.finish(request_id, f"decode worker {self.destination.worker_id}: {why}")

    def _made(self, link: Link, pair: Pair) -> None:
        self._link, self._pair, self.paired = link, pair, True
        self._origin.counters.add(pairs_made=1)
        log.info("%s paired with %s", self._origin.worker_id, self.destination.worker_id)

    def _lost(self, why: str) -> None:
        """Ends every request of the pair, if there is one. Payloads under way are copies, and simply dropped."""
        if self._pair is None:
            return
        log.warning("%s lost %s: %s", self._origin.worker_id, self.destination.worker_id, why)
        self._pair.settle()
        self._link, self._pair, self.paired = None, None, False
        self._origin.counters.add(pairs_lost=1)
        self._in_flight.clear()
        outbox, self._outbox = self._outbox, Outbox(self._origin.config.max_in_flight)
        for request_id in outbox.requests:
            self._fail(request_id, f"the link was lost: {why}")

    # The pairing thread.

    def _keep_paired(self) -> None:
        config = self._origin.config
        delay, told = config.retry_s, ""
        while not self._stopping.is_set():
            try:
                link, pair = self._meet()
            except (OSError, RuntimeError) as error:
                if str(error) != told:
                    told = str(error)
                    log.warning(
                        "%s cannot pair with %s: %s", self._origin.worker_id, self.destination.worker_id, told
                    )
                self._stopping.wait(delay)
                delay = min(2 * delay, config.max_retry_s)
            else:
                self._listen(link, pair)
                delay, told = config.retry_s, ""
                self._stopping.wait(delay)

    def _meet(self) -> tuple[Link, Pair]:
        origin, to = self._origin, self.destination
        connection = socket.create_connection((to.host, to.port), timeout=origin.config.dead_after_s)
        link = self._newest_link = Link(connection, origin.config)
        try:
            if self._stopping.is_set():
                raise LinkLost("stopping")
            link.send(
                Hello(
                    prefill_worker=origin.worker_id,
                    prefill_epoch=origin.epoch,
                    decode_worker=to.worker_id,
                    decode_epoch=to.epoch,
                    secret=origin.secret,
                    fingerprint=origin.fingerprint,
                    gpu=gpu_of(origin.device),
                )
            )
            answer = link.receive()
            if not isinstance(answer, Welcome):
                raise LinkLost(answer.reason if isinstance(answer, Rejected) else f"not a welcome: {answer}")
            pair = Pair(
                backend=answer.backend,
                rank=PREFILL_RANK,
                store=(to.host, answer.store_port),
                key=answer.key,
                address=link.address,
                device=origin.device,
                timeout_s=origin.config.pair_timeout_s,
            )
        except (OSError, RuntimeError):
            link.dispose()
            raise
        return link, pair

    def _listen(self, link: Link, pair: Pair) -> None:
        """Until the link breaks."""
        self.post(partial(self._made, link, pair))
        try:
            while True:
                self.post(partial(self._hear, link.receive()))
        except OSError as error:
            self.post(partial(self._lost, str(error)))
        pair.abort()
        link.dispose()
