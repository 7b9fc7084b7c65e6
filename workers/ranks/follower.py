"""A rank that follows: a process with a share of the model, its own caches, and the leader's steps to run.

It ends when the leader's connection does, whatever it is doing. Knows nothing of requests beyond what a step says.
"""

import logging
import os
import queue
import socket
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from workers.cpu_threads import use_threads
from workers.group import Group, join_group
from workers.ranks.messages import Alive, Failed, Hello, Loaded, Record, Setup, Step, ToFollower, Wire
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
    assert isinstance(setup, Setup)
    wire.socket.settimeout(None)
    steps: queue.SimpleQueue[Step | Record] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(wire, steps), name="leader", daemon=True).start()
    threading.Thread(target=_beat, args=(wire,), name="heartbeat", daemon=True).start()
    try:
        _Follower(rank, host, setup).run(wire, steps)
    except BaseException as error:
        log.exception("rank %d died", rank)
        wire.send(Failed(f"{type(error).__name__}: {error}"))
        os._exit(1)


def _listen(wire: Wire, steps: "queue.SimpleQueue[Step | Record]") -> None:
    try:
        while True:
            message = wire.receive()
            assert isinstance(message, Step | Record)
            steps.put(message)
    except OSError:
        os._exit(0)  # the leader has gone; the main thread may be stuck in a collective


def _beat(wire: Wire) -> None:
    try:
        while True:
            wire.send(Alive())
            threading.Event().wait(HEARTBEAT_S)
    except OSError:
        return  # the listening thread notices too


class _Follower:
    def __init__(self, rank: int, host: str, setup: Setup) -> None:
        config = setup.config
        if config.threads is not None:
            use_threads(config.threads)
        device = torch.device(config.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._group = join_ranks(
            store_at(host, setup.store_port),
            rank=rank,
            size=config.ranks,
            shares_rows=setup.shares_rows,
            device=device,
            address=host,
        )
        self._shard: Shard = load_shard(Path(setup.model), config, self._group)
        self._mirror = Mirror()

    def run(self, wire: Wire, steps: "queue.SimpleQueue[Step | Record]") -> None:
        wire.send(Loaded())
        while True:
            message = steps.get()
            if isinstance(message, Step):
                self._step(message)
            else:
                self._shard.runner.record()

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
