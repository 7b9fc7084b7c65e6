"""Both sides of shipping as tests need them: a decode worker, here or in a process of its own, and a prefill worker."""

import contextlib
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from kernels.dispatch import select
from kernels.layout import PAGE_SIZE, CacheLayout
from workers.messages import Ticket
from workers.paged_cache import PagedCache
from workers.shipping.protocol import (
    Header,
    LinkConfig,
)
from workers.shipping.receiver import Landing, Shipment, staleness, write
from workers.shipping.sender import Shipper

HANG = 10.0  # seconds; reached only if something hangs
START = 60.0  # seconds a process may take to start
LAYOUT = CacheLayout(128, 64, 128)
NUM_LAYERS, NUM_PAGES = 3, 40
CONFIG = LinkConfig(max_shipment_bytes=5 * LAYOUT.latent_page_bytes, max_in_flight=3)
QUICK = LinkConfig(heartbeat_s=0.1, dead_after_s=1.5, max_in_flight=3)
SECRET = "a secret"
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch", "workers.shipping.sender", "workers.shipping.receiver"])


def be_host(name: str) -> None:
    """Makes NCCL take this process for a host of its own: two that share a GPU are then joined over the network. "" does not."""
    if name:
        os.environ["NCCL_HOSTID"] = name


def make_cache(num_pages: int = NUM_PAGES, *, filled: int = 0, device: str = "cpu") -> PagedCache:
    """filled: a seed; 0 for zeros. The same seed gives the same bytes on every device."""
    ops = select("triton" if device.startswith("cuda") else "reference")
    cache = PagedCache(LAYOUT, num_layers=NUM_LAYERS, num_pages=num_pages, device=device, ops=ops)
    if filled:
        generator = torch.Generator().manual_seed(filled)
        for pages in (cache.latent, cache.index):
            pages.copy_(torch.randint(0, 256, pages.shape, dtype=torch.uint8, generator=generator))
    return cache


class DecodeSide:
    """What a decode role does with a landing, and what tests make it do wrong."""

    def __init__(self, epoch: int, config: LinkConfig, device: str = "cpu", worker_id: str = "d") -> None:
        self.cache = make_cache(device=device)
        self.events: list[Any] = []
        self.headers: list[Header] = []
        self.held: list[Shipment] = []
        self.generation = 0
        self.behaviour = "accept"
        self.epoch = epoch
        self.landing = Landing(
            worker_id=worker_id, epoch=epoch, host="127.0.0.1", secret=SECRET, cache=self.cache, config=config
        )
        self.landing.on_shipment = self.land
        self.landing.on_commit = self.events.append
        self.landing.on_abandon = lambda request_id: self.events.append(("abandon", request_id))
        self.landing.on_lost = lambda *who: self.events.append(("lost", *who))
        self.landing.start()

    def land(self, shipment: Shipment) -> None:
        self.headers.append(shipment.header)
        if self.behaviour == "die" and len(self.headers) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.behaviour == "hold":
            self.held.append(shipment)
            return
        reason = staleness(shipment, generation_of=lambda page: self.generation, epoch=self.epoch)
        if reason is None:
            write(shipment, self.cache)
        else:
            shipment.refuse(reason)

    def release(self) -> None:
        self.behaviour = "accept"
        for shipment in self.held:
            shipment.refuse("nobody waits for it")

    def set(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def get(self, name: str) -> Any:
        return getattr(self, name)

    def pages(self) -> tuple[bytes, bytes]:
        return page_bytes(self.cache.latent), page_bytes(self.cache.index)

    def port(self) -> int:
        return self.landing.port

    def peers(self) -> list[tuple[str, int]]:
        return self.landing.peers()

    def counters(self) -> dict[str, float]:
        return self.landing.counters()


def page_bytes(pages: torch.Tensor) -> bytes:
    return pages.cpu().numpy().tobytes()


def decode_process(pipe: Connection, host: str, *options: Any) -> None:
    be_host(host)
    torch.set_num_threads(1)
    side = DecodeSide(*options)
    while (call := pipe.recv()) is not None:
        pipe.send(getattr(side, call[0])(*call[1:]))
    side.landing.close()


class Child:
    """A decode worker in a process of its own; calls are those of DecodeSide."""

    def __init__(
        self,
        epoch: int = 1,
        config: LinkConfig = CONFIG,
        device: str = "cpu",
        worker_id: str = "d",
        host: str = "",
    ) -> None:
        self.epoch = epoch
        self._pipe, theirs = processes.Pipe()
        self.process = processes.Process(
            target=decode_process, args=(theirs, host, epoch, config, device, worker_id), daemon=True
        )
        self.process.start()
        theirs.close()
        self.port = self.call("port", within=START)

    def call(self, *what: Any, within: float = HANG) -> Any:
        self._pipe.send(what)
        assert self._pipe.poll(within), "the decode process hangs"
        return self._pipe.recv()

    @property
    def where(self) -> tuple[str, int, int]:
        return "127.0.0.1", self.port, self.epoch

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        if self.process.is_alive():
            self.kill()
        self.process.join()
        self._pipe.close()


class Prefill:
    """The prefill worker of the test's own process. `seed` is that of its pages' bytes."""

    def __init__(self, *, device: str = "cpu", seed: int = 1, **options: Any) -> None:
        self.cache = make_cache(filled=seed, device=device)
        self.ends: queue.Queue[tuple[str, str | None]] = queue.Queue()
        self.shipper = Shipper(
            **{
                "worker_id": "p",
                "epoch": 1,
                "secret": SECRET,
                "cache": self.cache,
                "config": CONFIG,
                "on_done": lambda request_id: self.ends.put((request_id, None)),
                "on_failed": lambda request_id, reason: self.ends.put((request_id, reason)),
            }
            | options
        )

    def pair(self, child: Child) -> None:
        self.shipper.set_peers({"d": child.where})
        wait_until(lambda: self.shipper.peers() == [("d", child.epoch)])

    def send(self, ticket: Ticket, sources: list[int]) -> None:
        self.shipper.ship(ticket, range(len(sources)), sources)
        self.shipper.commit(ticket, 7, None)

    def end(self) -> tuple[str, str | None]:
        return self.ends.get(timeout=HANG)


def make_ticket(
    request_id: str = "r",
    num_pages: int = 12,
    *,
    epoch: int = 1,
    generation: int = 0,
    resident: int = 0,
    decode: str = "d",
    above: int = 0,
) -> Ticket:
    """For the last pages of the cache of `decode`, but for the `above` last ones."""
    pages = [NUM_PAGES - 1 - above - index for index in range(num_pages)]
    return Ticket(decode, epoch, request_id, pages, [generation] * num_pages, resident * PAGE_SIZE)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def assert_landed(
    child: Child, cache: PagedCache, ticket: Ticket, sources: list[int], first: int = 0
) -> None:
    """Exactly the pages of the ticket from `first` on hold the sources' bytes; every other page is untouched."""
    assert_all_landed(child, [(cache, ticket.pages[first:], sources)])


def assert_all_landed(child: Child, landed: list[tuple[PagedCache, list[int], list[int]]]) -> None:
    """Exactly these pages hold the bytes of these caches' sources."""
    expected = make_cache()
    for cache, pages, sources in landed:
        expected.latent[:, pages] = cache.latent[:, sources].cpu()
        expected.index[:, pages] = cache.index[:, sources].cpu()
    assert child.call("pages") == (page_bytes(expected.latent), page_bytes(expected.index))


class Sides:
    """Makes workers and ends them with the test. child_host: the NCCL host that processes are which tests start."""

    def __init__(self, child_host: str = "") -> None:
        self.child_host = child_host
        self._ending = contextlib.ExitStack()

    def __enter__(self) -> "Sides":
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    def decode_process(self, **options: Any) -> Child:
        child = Child(host=self.child_host, **options)
        self._ending.callback(child.stop)
        return child

    def decode(self, config: LinkConfig = CONFIG, device: str = "cpu", worker_id: str = "d") -> DecodeSide:
        side = DecodeSide(1, config, device, worker_id)
        self._ending.callback(side.landing.close)
        return side

    def prefill(self, **options: Any) -> Prefill:
        prefill = Prefill(**options)
        self._ending.callback(prefill.shipper.close)
        return prefill
