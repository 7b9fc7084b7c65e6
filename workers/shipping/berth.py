"""The receiving half of one pair: from a prefill worker's connection to the shipments it brings.

Three threads. The reading thread greets the peer and reads what it says; the payload thread posts a receive for every header and
waits for the bytes, so that a receive which hangs holds up nothing else; the verdict thread waits for the GPU that verifies them,
so that no engine does. Knows nothing of other prefill workers.
"""

import contextlib
import logging
import queue
import socket
import threading
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from workers.cpu_threads import use_threads
from workers.shipping.counters import Counters
from workers.shipping.link import Link, LinkLost
from workers.shipping.pair import DECODE_RANK, Pair, backend_for, gpu_of
from workers.shipping.protocol import (
    CORRUPT,
    Abandon,
    Accepted,
    Commit,
    Committed,
    Header,
    Hello,
    Identity,
    LinkConfig,
    Message,
    Refused,
    Rejected,
    Welcome,
    header_error,
    hello_error,
)
from workers.shipping.shipment import Shipment, Verdict

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """What all berths of a decode worker share.

    admit(berth, hello): the reason to reject a peer whose hello was in order; None if it may stay.
    deliver: takes what came. verified: takes a shipment again whose pages were written and are right. lost(berth, hello): the link of an admitted peer is broken. ended: so are all its threads.
    """

    identity: Identity
    store: tuple[str, int]
    device: torch.device
    config: LinkConfig
    counters: Counters
    admit: Callable[["Berth", Hello], str | None]
    deliver: Callable[[Shipment | Commit | Abandon], None]
    verified: Callable[[Shipment], None]
    lost: Callable[["Berth", Hello], None]
    ended: Callable[["Berth"], None]


class Berth:
    """`paired`: shipments can come, or could until the link broke."""

    def __init__(self, site: Site, connection: socket.socket) -> None:
        self.paired = False
        self._site = site
        self._link = Link(connection, site.config)
        self._headers: queue.SimpleQueue[Header | None] = queue.SimpleQueue()
        self._posted: deque[tuple[Header, torch.Tensor, dist.Work]] = deque()  # receives; the oldest first
        self._verdicts: queue.SimpleQueue[tuple[Shipment, Verdict] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="berth", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, reason: str) -> None:
        """Ends link and threads, soon; `join` waits for that."""
        self._link.close(reason)

    def join(self) -> None:
        self._thread.join()

    # The reading thread.

    def _run(self) -> None:
        try:
            hello = self._greet()
        except OSError as error:
            log.warning("%s turned a connection away: %s", self._site.identity.worker_id, error)
        else:
            self._serve(hello)
        self._link.dispose()
        self._site.ended(self)

    def _greet(self) -> Hello:
        hello = self._link.receive()
        if not isinstance(hello, Hello):
            raise LinkLost("the first message is not a hello")
        reason = hello_error(hello, self._site.identity) or self._site.admit(self, hello)
        if reason is not None:
            self._link.send(Rejected(reason))
            raise LinkLost(f"rejected {hello.prefill_worker}: {reason}")
        return hello

    def _serve(self, hello: Hello) -> None:
        try:
            pair = self._meet(hello)
        except (OSError, RuntimeError) as error:
            log.warning(
                "%s cannot pair with %s: %s", self._site.identity.worker_id, hello.prefill_worker, error
            )
            self._site.lost(self, hello)
        else:
            self._read(hello, pair)

    def _meet(self, hello: Hello) -> Pair:
        site = self._site
        backend, key = backend_for(gpu_of(site.device), hello.gpu), uuid.uuid4().hex
        self._link.send(Welcome(site.store[1], key, backend))
        return Pair(
            backend=backend,
            rank=DECODE_RANK,
            store=site.store,
            key=key,
            address=self._link.address,
            device=site.device,
            timeout_s=site.config.pair_timeout_s,
        )

    def _read(self, hello: Hello, pair: Pair) -> None:
        """Until the link breaks."""
        payloads = threading.Thread(target=self._receive, args=(hello, pair), name="payloads", daemon=True)
        verdicts = threading.Thread(target=self._judge, name="verdicts", daemon=True)
        payloads.start()
        verdicts.start()
        self.paired = True
        self._site.counters.add(pairs_made=1)
        try:
            while True:
                self._hear(self._link.receive())
        except OSError as error:
            self._link.close(str(error))
            log.warning("%s lost %s: %s", self._site.identity.worker_id, hello.prefill_worker, error)
        self._site.counters.add(pairs_lost=1)
        self._site.lost(self, hello)
        self._headers.put(None)
        pair.abort()
        payloads.join()
        self._posted.clear()  # not before the abort: until then NCCL may write there
        self._verdicts.put(None)
        verdicts.join()

    def _hear(self, message: Message) -> None:
        if isinstance(message, Header):
            error = header_error(message, self._site.identity.fingerprint)
            if error is not None:
                raise LinkLost(f"an impossible header: {error}")
            self._headers.put(message)
        elif isinstance(message, Commit):
            self._site.deliver(message)
            self._link.send(Committed(message.request_id))
        elif isinstance(message, Abandon):
            self._site.deliver(message)

    # The payload thread.

    def _receive(self, hello: Hello, pair: Pair) -> None:
        use_threads(1)
        posted = self._posted
        try:
            while True:
                while not posted or not self._headers.empty():
                    header = self._headers.get()
                    if header is None:
                        return
                    posted.append((header, *pair.receive(header.payload_bytes, header.shipment_id)))
                header, payload, work = posted[0]
                pair.wait(work, self._site.config.payload_timeout_s)
                if self._link.closed:
                    return  # an aborted receive looks like a finished one
                posted.popleft()
                with torch.cuda.stream(pair.stream):
                    payload = payload.to(self._site.device)
                answer = partial(self._answer, header)
                self._site.deliver(Shipment(header, payload, hello.prefill_epoch, self._await, answer))
        except RuntimeError as error:
            self._link.close(f"a payload did not come: {error}")

    def _await(self, shipment: Shipment, verdict: Verdict) -> None:
        """On the thread that has the shipment written."""
        self._verdicts.put((shipment, verdict))

    # The verdict thread.

    def _judge(self) -> None:
        while (item := self._verdicts.get()) is not None:
            shipment, verdict = item
            wrong = verdict.wait()
            if wrong:
                header = shipment.header
                places = [
                    (header.layer_start + number // len(header.page_ids), number % len(header.page_ids))
                    for number in wrong
                ]
                log.warning(
                    "request %s: %s pages (layer, number) arrived corrupt: %s",
                    header.request_id,
                    header.kind,
                    places,
                )
                shipment.refuse(CORRUPT)
            else:
                self._site.verified(shipment)

    def _answer(self, header: Header, answer: Accepted | Refused) -> None:
        """On whichever thread accepts or refuses the shipment."""
        if isinstance(answer, Refused):
            self._site.counters.add(refused_shipments=1, refused_pages=len(header.page_ids))
        else:
            self._site.counters.add(landed_bytes=header.nbytes)
        with contextlib.suppress(OSError):  # the reading thread notices
            self._link.send(answer)
