"""A worker as a Serve replica: Serve supervises, replaces and scales it; gateways reach it over its own TCP door.

The replica registers with the prefix-cache controller, reports which prefixes it holds, and tells a prefill worker which
decode workers there are. Undecorated: `cluster.app` makes the deployments.
"""

import asyncio
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import ray

from cluster.config import ClusterConfig, is_loopback
from cluster.controller import ACTOR_NAME, NAMESPACE, WorkerInfo
from cluster.figures import BusyMeter, decode_figures, prefill_figures
from workers.page_pool import CacheEvents
from workers.ranks.shippers import Peer
from workers.server import seconds_since_step
from workers.start import RunningWorker, start_worker

log = logging.getLogger(__name__)

REPORT_S = 0.1
CALL_TIMEOUT_S = 5.0
STALL_S = 120.0  # an engine step that takes longer than this counts as a hang


class WorkerReplica:
    """One prefill or decode worker."""

    def __init__(self, role: Literal["prefill", "decode"], config: ClusterConfig, secret: str) -> None:
        self._controller = ray.get_actor(ACTOR_NAME, namespace=NAMESPACE)
        self._epoch = secrets.randbits(63)
        self._id = f"{role}-{secrets.token_hex(4)}"
        assert config.model is not None
        of_role = config.prefill if role == "prefill" else config.decode
        self._drain_s = of_role.drain_s
        self._running: RunningWorker = start_worker(
            role=role,
            model=Path(config.model),
            engine_config=of_role.engine,
            worker_id=self._id,
            epoch=self._epoch,
            # A service for this machine alone keeps its workers' ports from the network too.
            host="127.0.0.1" if is_loopback(config.host) else ray.util.get_node_ip_address(),
            secret=secret,
        )
        self._busy = BusyMeter(time.monotonic())
        self._running.worker.on_orphan = self._orphaned
        self._info = WorkerInfo(
            worker=self._id,
            epoch=self._epoch,
            role=role,
            host=self._running.server.host,
            port=self._running.server.port,
            ship_host=self._running.ship_host,
            ship_port=self._running.ship_port,
            rank_ports=list(self._running.rank_ports),
            pid=os.getpid(),
            node=ray.get_runtime_context().get_node_id(),
        )
        self._stopping = threading.Event()
        self._sequence = 0  # of the last report since registration
        self._spawn(self._report_forever)
        if role == "prefill":
            self._spawn(self._watch_forever)

    def check_health(self) -> None:
        """Serve's health check: raises when the engine thread has died or hangs, and Serve replaces the replica."""
        worker = self._running.worker
        if worker.error is not None:
            raise RuntimeError(f"the engine of {self._id} died: {worker.error!r}")
        if seconds_since_step(worker) > STALL_S:
            raise RuntimeError(f"the engine of {self._id} has not finished a step for {STALL_S:.0f} s")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve hands to the policies of `cluster.scaling`, which want figures of one kind or the other."""
        worker = self._running.worker
        if self._info.role == "decode":
            return asdict(decode_figures(worker.latest_load))
        queued_tokens = await self._controller.queued_tokens.remote()
        busy_share = self._busy.share(worker.busy_seconds, time.monotonic())
        return asdict(prefill_figures(worker.latest_load, queued_tokens, busy_share))

    async def __del__(self) -> None:
        """Serve awaits this when the replica is to go, and goes on to answer meanwhile."""
        if hasattr(self, "_stopping"):  # else it was never whole
            await asyncio.to_thread(self._leave)

    def _leave(self) -> None:
        """Ends what the worker has, as far as the time goes. Gateways take what is left to other workers."""
        if not self._running.drain(self._drain_s):
            log.warning("%s goes after %.0f s with requests in progress", self._id, self._drain_s)
        self._running.stop()
        self._stopping.set()  # not before: a worker that is silent is taken for dead
        try:
            self._call("deregister", self._id, self._epoch)
        except ray.exceptions.RayError as error:
            log.warning("controller unreachable: %s", error)

    def _spawn(self, target: Callable[[], None]) -> None:
        threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def _call(self, method: str, *args: Any) -> Any:
        """A call to the controller; it may have been restarted or be away for a while."""
        return ray.get(getattr(self._controller, method).remote(*args), timeout=CALL_TIMEOUT_S)

    def _report_forever(self) -> None:
        """Tells the controller which page hashes came and went; everything again whenever it asks for that."""
        registered = False
        while not self._stopping.wait(REPORT_S):
            try:
                if not registered:
                    self._call("register", self._info)
                    registered = True
                    self._sequence = 0
                    self._pending = self._running.worker.ask(self._everything)
                else:
                    registered = self._report() != "resync"
            except ray.exceptions.RayError as error:
                log.warning("controller unreachable: %s", error)
                registered = False
                time.sleep(1.0)

    def _report(self) -> str:
        """One report. While a long step keeps the engine thread from answering it is an empty one, as a sign of life."""
        events, reset = CacheEvents([], []), False
        if self._pending.done():
            events = self._pending.result()
            reset = self._sequence == 0
            self._pending = self._running.worker.ask(self._running.worker.engine.pools.drain_events)
        if self._sequence or reset:
            self._sequence += 1
        answer: str = self._call("report", self._id, self._epoch, self._sequence, *events, reset)
        return answer

    def _everything(self) -> CacheEvents:
        pool = self._running.worker.engine.pools
        pool.drain_events()
        return CacheEvents(pool.published(), [])

    def _watch_forever(self) -> None:
        """Keeps a prefill worker linked to every decode worker of the cluster."""
        version = -1
        while not self._stopping.is_set():
            try:
                update = self._call("watch", version, CALL_TIMEOUT_S / 2, False)
            except ray.exceptions.RayError as error:
                log.warning("controller unreachable: %s", error)
                time.sleep(1.0)
                version = -1
                continue
            version = update.version
            self._running.set_peers(
                {
                    m.worker: Peer(m.ship_host, m.ship_port, m.epoch, m.rank_ports)
                    for m in update.members
                    if m.role == "decode"
                }
            )

    def _orphaned(self, attempt: str, num_output_tokens: int) -> None:
        """A gateway died: the ledger settles what its request had emitted."""
        self._controller.orphaned.remote(attempt.rpartition("#")[0], num_output_tokens)
