"""Rank 0's side of a worker of several ranks: starts the followers, tells them each step, and notices when one is gone.

A follower's death or silence is the worker's: whatever the engine thread waits for is broken off and raises.
"""

import contextlib
import logging
import multiprocessing
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from workers.config import EngineConfig
from workers.group import Group
from workers.ranks.follower import JOIN_S, join_ranks, run_follower
from workers.ranks.messages import (
    Alive,
    Failed,
    Hello,
    Loaded,
    Ready,
    Setup,
    Ship,
    ToFollower,
    ToLeader,
    Wire,
)
from workers.shard import config_of

log = logging.getLogger(__name__)

HOST = "127.0.0.1"  # followers are child processes
DEAD_AFTER_S = 5.0  # a follower silent for so long is treated as dead

# torch does not declare it as public.
_TCPStore: Any = dist.TCPStore  # type: ignore[attr-defined]


class RankLost(RuntimeError):
    """A follower is gone: the worker cannot go on."""


class Followers:
    """The processes of ranks 1 and up. Raises RankLost from the constructor on if one of them dies, freezes or fails."""

    def __init__(
        self, model: Path, config: EngineConfig, *, shares_rows: bool, ship: Ship | None = None
    ) -> None:
        self.count = config.ranks - 1
        self.ship_ports: list[int] = []  # of ranks 1 and up, once loaded
        self.on_message: Callable[[int, ToLeader], None] = lambda rank, message: None
        self._alive: dict[int, Alive] = {}
        self._ports: dict[int, int] = {}
        self._lost: str | None = None
        self._closing = False
        self._lock = threading.Lock()
        self._ready, self._loaded = threading.Semaphore(0), threading.Semaphore(0)
        self._wires: dict[int, Wire] = {}
        self._threads: list[threading.Thread] = []
        self.group = Group()
        listener = socket.create_server((HOST, 0))
        listener.settimeout(JOIN_S)
        secret = secrets.token_hex(16)
        processes = multiprocessing.get_context("spawn")
        arguments = (HOST, listener.getsockname()[1], secret)
        self._processes = [
            processes.Process(target=run_follower, args=(*arguments, rank), name=f"rank-{rank}", daemon=True)
            for rank in range(1, config.ranks)
        ]
        for process in self._processes:
            process.start()
        try:
            self._join(listener, secret, model, config, shares_rows, ship)
        except (OSError, RuntimeError):
            self.close()
            raise
        finally:
            listener.close()

    def wait_until_loaded(self) -> None:
        self._wait_for_all(self._loaded)
        self.ship_ports = [self._ports[rank] for rank in sorted(self._ports)]

    def alive(self, rank: int) -> Alive:
        """What the rank has said last of its links."""
        return self._alive.get(rank, Alive())

    def send(self, rank: int, message: ToFollower) -> None:
        self.check()
        try:
            self._wires[rank].send(message)
        except OSError as error:
            self._lose(rank, str(error))
            self.check()

    def check(self) -> None:
        """Raises RankLost if a follower is gone."""
        if self._lost is not None:
            raise RankLost(self._lost)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """What waits for a follower within fails as RankLost if that is why it fails."""
        try:
            yield
        except RuntimeError as error:
            # The collective may notice before the connection does.
            threading.Event().wait(0.5)
            if self._lost is not None:
                raise RankLost(self._lost) from error
            raise
        self.check()

    def close(self) -> None:
        """Ends the followers. Safe to call twice."""
        self._closing = True
        for wire in self._wires.values():
            wire.hang_up()
        for thread in self._threads:
            thread.join()
        for wire in self._wires.values():
            wire.socket.close()
        for process in self._processes:
            process.join(timeout=2.0)
            if process.is_alive():
                process.kill()
                process.join()

    def _join(
        self,
        listener: socket.socket,
        secret: str,
        model: Path,
        config: EngineConfig,
        shares_rows: bool,
        ship: Ship | None,
    ) -> None:
        for _ in self._processes:
            wire = Wire(listener.accept()[0], ToLeader)
            hello = wire.receive()
            if not isinstance(hello, Hello) or hello.secret != secret:
                raise ConnectionError("a stranger connected instead of a follower")
            self._wires[hello.rank] = wire
        # On the leader's host and in its process: the group depends on nobody else.
        store = _TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=JOIN_S))
        for rank, wire in self._wires.items():
            wire.send(
                Setup(
                    model=str(model),
                    config=config_of(config, rank),
                    shares_rows=shares_rows,
                    store_port=store.port,
                    ship=ship,
                )
            )
        for rank, wire in self._wires.items():
            wire.socket.settimeout(DEAD_AFTER_S)
            thread = threading.Thread(
                target=self._listen, args=(rank, wire), name=f"rank-{rank}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        device = torch.device(config_of(config, 0).device)
        # A group waits far too long for a rank that has died on its way there.
        self._wait_for_all(self._ready)
        with self.watched():
            self.group = join_ranks(
                store, rank=0, size=config.ranks, shares_rows=shares_rows, device=device, address=HOST
            )

    def _wait_for_all(self, said: threading.Semaphore) -> None:
        """Until every follower has said it."""
        for _ in self._processes:
            while not said.acquire(timeout=0.1):
                self.check()
        self.check()

    def _listen(self, rank: int, wire: Wire) -> None:
        try:
            while True:
                message: ToLeader = wire.receive()
                if isinstance(message, Alive):
                    self._alive[rank] = message
                elif isinstance(message, Ready):
                    self._ready.release()
                elif isinstance(message, Loaded):
                    self._ports[rank] = message.ship_port
                    self._loaded.release()
                elif isinstance(message, Failed):
                    self._lose(rank, message.reason)
                    return
                else:
                    self.on_message(rank, message)
        except TimeoutError:
            self._lose(rank, f"silent for {DEAD_AFTER_S:g} s")
        except OSError as error:
            self._lose(rank, str(error))

    def _lose(self, rank: int, why: str) -> None:
        with self._lock:
            if self._closing or self._lost is not None:
                return
            self._lost = f"rank {rank} is gone: {why}"
        log.error("%s", self._lost)
        # Frozen or not: with its process its connections end, and so does every collective that waits for it.
        for process in self._processes:
            process.kill()
        self.group.abort()
