"""A rank that follows: a process with a share of the model, its own caches, and the leader's steps to run.

It ends when the leader's connection does, whatever it is doing. Knows nothing of requests beyond what a step says.
"""

import contextlib
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from workers.cpu_threads import use_threads
from workers.group import Group, join_group
from workers.ranks.links import DecodeLinks, NoLinks, PrefillLinks
from workers.ranks.messages import (
    Alive,
    Failed,
    Hello,
    Loaded,
    Ready,
    Record,
    Setup,
    Ship,
    Step,
    ToFollower,
    ToLeader,
    Wire,
)
from workers.ranks.mirror import Mirror, part
from workers.shard import Shard, load_shard

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
JOIN_S = 120.0  # for all ranks to find each other
# A rank that dies or freezes is noticed on its connection; a long step, or a kernel that is compiled, must not look like that.
COLLECTIVE_S = 1800.0

# torch does not declare it as public.
_TCPStore: Any = dist.TCPStore  # type: ignore[attr-defined]


def run_follower(host: str, port: int, secret: str, rank: int) -> None:
    """The whole life of the process. host, port: where the leader listens."""
    wire = Wire(socket.create_connection((host, port), timeout=JOIN_S), ToFollower)
    wire.send(Hello(rank, secret))
    setup = wire.receive()
    wire.socket.settimeout(None)
    follower = _Follower(rank, host, setup, wire)
    threading.Thread(target=follower.listen, name="leader", daemon=True).start()
    threading.Thread(target=follower.beat, name="heartbeat", daemon=True).start()
    try:
        follower.run()
    except BaseException as error:
        log.exception("rank %d died", rank)
        wire.send(Failed(f"{type(error).__name__}: {error}"))
        os._exit(1)


class _Follower:
    """`listen` and `beat` have threads of their own."""

    def __init__(self, rank: int, host: str, setup: Setup, wire: Wire) -> None:
        self._rank = rank
        self._host = host
        self._setup = setup
        self._wire = wire
        self._mirror = Mirror()
        self._links: NoLinks | PrefillLinks | DecodeLinks = NoLinks()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def listen(self) -> None:
        """Until the leader has gone; the main thread may be stuck in a collective then."""
        try:
            while True:
                self._inbox.put(partial(self._handle, self._wire.receive()))
        except OSError:
            os._exit(0)

    def beat(self) -> None:
        while True:
            self._tell(Alive(self._links.peers(), self._links.counters()))
            threading.Event().wait(HEARTBEAT_S)

    def run(self) -> None:
        self._load()
        while True:
            self._inbox.get()()

    def _load(self) -> None:
        config = self._setup.config
        if config.threads is not None:
            use_threads(config.threads)
        device = torch.device(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._tell(Ready())
        self._group = join_ranks(
            store_at(self._host, self._setup.store_port),
            rank=self._rank,
            size=config.ranks,
            shares_rows=self._setup.shares_rows,
            device=device,
            address=self._host,
        )
        self._shard: Shard = load_shard(Path(self._setup.model), config, self._group)
        if self._setup.ship is not None:
            self._links = self._make_links(self._setup.ship)
        self._tell(Loaded(self._links.port))

    def _make_links(self, ship: Ship) -> PrefillLinks | DecodeLinks:
        cache = self._shard.cache
        if self._setup.shares_rows:
            return PrefillLinks(ship, self._rank, self._group.size, cache, self._tell)
        return DecodeLinks(ship, self._rank, cache, self._tell, self._inbox.put)

    def _tell(self, message: ToLeader) -> None:
        with contextlib.suppress(OSError):  # the listening thread notices
            self._wire.send(message)

    def _handle(self, message: ToFollower) -> None:
        if isinstance(message, Step):
            self._step(message)
        elif isinstance(message, Record):
            self._shard.runner.record()
        else:
            self._links.handle(message)

    def _step(self, step: Step) -> None:
        plan = part(self._mirror.plan(step), step.lockstep, spare_page=self._shard.spare_page)
        self._shard.runner.run(plan, self._show if step.shows else None)

    def _show(self, selected: torch.Tensor) -> None:
        self._group.all_gather(selected).wait()


def store_at(host: str, port: int) -> Any:
    return _TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=JOIN_S))


def join_ranks(
    store: Any, *, rank: int, size: int, shares_rows: bool, device: torch.device, address: str
) -> Group:
    return join_group(
        store,
        rank=rank,
        size=size,
        shares_rows=shares_rows,
        device=device,
        address=address,
        timeout_s=COLLECTIVE_S,
    )
