"""What must hold on every device: several pairs at once, and the death of a prefill worker with a payload under way.

The devices are parameters, so that the CPU's tests and the GPUs' tell the same story.
"""

import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from shipping_sides import (
    HANG,
    START,
    Prefill,
    Sides,
    assert_all_landed,
    assert_landed,
    be_host,
    make_cache,
    make_ticket,
    processes,
    wait_until,
)

from workers.shipping.pair import Pair
from workers.shipping.protocol import Commit

PAGES_FREE_S = 5.0  # within which a decode worker must know that nothing more will come


def two_prefill_workers_to_one_decode_worker(sides: Sides, from_device: str, to_device: str) -> None:
    child = sides.decode_process(device=to_device)
    prefills = [sides.prefill(worker_id=f"p{n}", seed=n + 1, device=from_device) for n in range(2)]
    tickets = [make_ticket(f"r{n}", 15, above=20 * n) for n in range(2)]
    for prefill in prefills:
        prefill.pair(child)
    wait_until(lambda: len(child.call("peers")) == 2)
    for prefill, ticket in zip(prefills, tickets, strict=True):
        prefill.send(ticket, list(range(15)))
    for prefill, ticket in zip(prefills, tickets, strict=True):
        assert prefill.end() == (ticket.request_id, None)
    landed = [(p.cache, ticket.pages, list(range(15))) for p, ticket in zip(prefills, tickets, strict=True)]
    assert_all_landed(child, landed)


def one_prefill_worker_to_two_decode_workers(sides: Sides, from_device: str, to_device: str) -> None:
    children = [sides.decode_process(device=to_device, worker_id=f"d{n}") for n in range(2)]
    prefill = sides.prefill(device=from_device)
    prefill.shipper.set_peers({f"d{n}": child.where for n, child in enumerate(children)})
    wait_until(lambda: len(prefill.shipper.peers()) == 2)
    tickets = [make_ticket(f"r{n}", 12 + n, decode=f"d{n}") for n in range(2)]
    sources = [list(range(12)), list(range(20, 33))]
    for ticket, pages in zip(tickets, sources, strict=True):
        prefill.send(ticket, pages)
    assert dict(prefill.end() for _ in tickets) == {"r0": None, "r1": None}
    for child, ticket, pages in zip(children, tickets, sources, strict=True):
        assert_landed(child, prefill.cache, ticket, pages)


class OtherWork:
    """What a decode worker goes on doing: small steps, each of which is awaited."""

    def __init__(self, device: str) -> None:
        self.steps = 0
        self._device = device
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "OtherWork":
        self._thread.start()
        self.goes_on()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def goes_on(self) -> None:
        before = self.steps
        wait_until(lambda: self.steps >= before + 20)

    def _run(self) -> None:
        torch.set_num_threads(1)
        x = torch.ones(256, 256, device=self._device)
        stream = torch.cuda.Stream(self._device) if x.is_cuda else None
        with torch.cuda.stream(stream):
            while not self._stop.is_set():
                x = x @ x / 256
                assert float(x[0, 0]) == 1.0
                self.steps += 1


def stuck_prefill_process(
    pipe: Connection, host: str, port: int, epoch: int, stick_at_send: int, device: str
) -> None:
    """Ships one request; after the header of one shipment has left, its payload does not, and the pipe hears of it."""
    be_host(host)
    torch.set_num_threads(1)
    sends = iter(range(1, 1000))
    send = Pair.send

    def sticky(self: Pair, payload: torch.Tensor, tag: int) -> Any:
        if next(sends) == stick_at_send:
            pipe.send("stuck")
            time.sleep(START)
        return send(self, payload, tag)

    prefill = Prefill(epoch=epoch, device=device)
    prefill.shipper.set_peers({"d": ("127.0.0.1", port, 1)})
    wait_until(lambda: bool(prefill.shipper.peers()))
    Pair.send = sticky  # type: ignore[method-assign]
    prefill.send(make_ticket(f"of {epoch}"), list(range(12)))
    pipe.send(prefill.end())
    prefill.shipper.close()


def prefill_worker_killed_in_mid_shipment(sides: Sides, from_device: str, to_device: str) -> None:
    """The decode worker computes all the while, knows within seconds, and the successor ships the same pages."""
    side = sides.decode(device=to_device)

    def start(epoch: int, stick_at_send: int) -> tuple[Any, Connection]:
        ours, theirs = processes.Pipe()
        process = processes.Process(
            target=stuck_prefill_process,
            args=(theirs, sides.child_host, side.port(), epoch, stick_at_send, from_device),
            daemon=True,
        )
        process.start()
        return process, ours

    with OtherWork(to_device) as work:
        victim, pipe = start(1, 4)
        assert pipe.poll(START)
        assert pipe.recv() == "stuck"
        wait_until(lambda: len(side.headers) == 3)
        work.goes_on()
        killed_at = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: ("lost", "p", 1) in side.events)
        assert time.monotonic() - killed_at < PAGES_FREE_S
        work.goes_on()
        assert side.landing.peers() == []

        successor, pipe = start(2, 0)
        assert pipe.poll(START)
        assert pipe.recv() == ("of 2", None)
        work.goes_on()
        successor.join(HANG)
    assert len(side.headers) > 3
    commits = [event for event in side.events if isinstance(event, Commit)]
    assert commits == [Commit("of 2", 1, 12, 7, None)]
    cache, ticket = make_cache(filled=1), make_ticket()
    assert torch.equal(side.cache.latent[:, ticket.pages].cpu(), cache.latent[:, :12])
    assert torch.equal(side.cache.index[:, ticket.pages].cpu(), cache.index[:, :12])
