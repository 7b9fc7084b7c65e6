"""The decode side of shipping: listens for prefill workers and hands on what they bring.

Whoever owns the page pool refuses a shipment or has it written (`write`), and once it is verified accepts it. Nothing here touches
a page or knows of engines.
"""

import logging
import socket
import threading
from collections.abc import Callable

from workers.paged_cache import PagedCache
from workers.shipping.berth import Berth, Site
from workers.shipping.counters import Counters
from workers.shipping.pair import open_store
from workers.shipping.protocol import Abandon, Commit, Fingerprint, Hello, Identity, LinkConfig
from workers.shipping.shipment import Shipment, staleness, warm, write

__all__ = ["Commit", "Landing", "Shipment", "staleness", "write"]

log = logging.getLogger(__name__)


class Landing:
    """Listens on `host` and, once started, `port`. Set the callbacks before `start`; they come on threads of the links.

    on_shipment: to be refused, or written. on_verified: it was written, every page of it is right, and it is to be answered; wrong
    ones were refused already.
    on_lost(prefill_worker, prefill_epoch): a link broke; what it had not committed will not come over it any more.
    """

    def __init__(
        self,
        *,
        worker_id: str,
        epoch: int,
        host: str,
        secret: str,
        cache: PagedCache,
        config: LinkConfig | None = None,
    ) -> None:
        self.on_shipment: Callable[[Shipment], None] = lambda shipment: shipment.refuse("nobody takes it")
        self.on_verified: Callable[[Shipment], None] = lambda shipment: shipment.accept()
        self.on_commit: Callable[[Commit], None] = lambda commit: None
        self.on_abandon: Callable[[str], None] = lambda request_id: None
        self.on_lost: Callable[[str, int], None] = lambda prefill_worker, prefill_epoch: None
        self.host = host
        self.port = 0
        fingerprint = Fingerprint.of(cache.layout, cache.latent.shape[0])
        self._identity = Identity(worker_id=worker_id, epoch=epoch, secret=secret, fingerprint=fingerprint)
        self._device = cache.latent.device
        warm(cache)
        self._config = config or LinkConfig()
        self._counters = Counters(
            "landed_bytes", "refused_shipments", "refused_pages", "pairs_made", "pairs_lost"
        )
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._berths: set[Berth] = set()  # whose threads run
        self._admitted: dict[str, tuple[Berth, int]] = {}  # prefill worker -> its link and epoch

    def start(self) -> None:
        """Opens the port, and the store at which process groups are made. Raises OSError if it cannot."""
        self._socket = socket.create_server((self.host, 0))
        self.port = self._socket.getsockname()[1]
        # A store of its own: a pair then depends on no third process.
        self._store = open_store(self.host)
        site = Site(
            identity=self._identity,
            store=(self.host, self._store.port),
            device=self._device,
            config=self._config,
            counters=self._counters,
            admit=self._admit,
            deliver=self._deliver,
            verified=lambda shipment: self.on_verified(shipment),
            lost=self._lost,
            ended=self._ended,
        )
        self._thread = threading.Thread(target=self._listen, args=(site,), name="landing", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends every link and thread. May wait as long as a stuck receive takes to time out."""
        self._closing.set()
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept(), which closing alone would not
        self._thread.join()
        self._socket.close()
        with self._lock:
            berths = list(self._berths)
        for berth in berths:
            berth.stop("the decode worker closed")
        for berth in berths:
            berth.join()

    def peers(self) -> list[tuple[str, int]]:
        """The prefill workers, with their epochs, that can ship here at this moment."""
        with self._lock:
            return [(name, epoch) for name, (berth, epoch) in self._admitted.items() if berth.paired]

    def counters(self) -> dict[str, float]:
        """Totals since the start. landed_bytes: payload of accepted shipments. refused_pages: pages of refused ones."""
        return self._counters.snapshot()

    def _listen(self, site: Site) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                if not self._closing.wait(0.1):
                    log.warning("cannot accept a connection: %s", error)
                continue
            berth = Berth(site, connection)
            with self._lock:
                self._berths.add(berth)
            berth.start()

    def _admit(self, berth: Berth, hello: Hello) -> str | None:
        """One link for each prefill worker. A new one ends the old one, whose peer may have gone without a word."""
        name = hello.prefill_worker
        with self._lock:
            old, old_epoch = self._admitted.get(name, (None, 0))
            if old is not None and old_epoch > hello.prefill_epoch:
                return f"{name} of epoch {old_epoch} is connected; this is epoch {hello.prefill_epoch}"
            self._admitted[name] = (berth, hello.prefill_epoch)
        if old is not None:
            old.stop("a newer link took its place")
        return None

    def _deliver(self, arrival: Shipment | Commit | Abandon) -> None:
        if isinstance(arrival, Shipment):
            self.on_shipment(arrival)
        elif isinstance(arrival, Commit):
            self.on_commit(arrival)
        else:
            self.on_abandon(arrival.request_id)

    def _lost(self, berth: Berth, hello: Hello) -> None:
        """The link is broken."""
        with self._lock:
            if self._admitted.get(hello.prefill_worker, (None, 0))[0] is berth:
                del self._admitted[hello.prefill_worker]
        if berth.paired:
            self.on_lost(hello.prefill_worker, hello.prefill_epoch)

    def _ended(self, berth: Berth) -> None:
        """Its threads are ending too."""
        with self._lock:
            self._berths.discard(berth)
