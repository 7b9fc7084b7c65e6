"""The prefix-cache controller: who is there, who holds which prefix, and the ledger's one writer.

It lies off the request path. Workers report to it, gateways follow it with `watch`, and when it dies routing goes on with
what they last heard. A restarted one knows nobody: workers that report are told to "resync", register again and send all
they hold; a gateway whose version it does not know gets everything. Only the ledger's file outlives it.

Undecorated and without Ray: `cluster.app` makes it one named detached actor. All methods run on one event loop; nothing
runs between calls, so silent workers and overdue orphans are looked for whenever somebody calls.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar, TypeVarTuple

import msgspec

from cluster.key_store import KeyList, KeyStore
from cluster.ledger import DayTotals, Ledger, Totals
from cluster.prefix_directory import PageChange, PrefixDirectory
from cluster.records import LedgerUnavailable, Opening, Record, Settled, Settlement

log = logging.getLogger(__name__)

ACTOR_NAME = "prefix-cache-controller"
NAMESPACE = "lightship"  # of the actor in Ray
WORKER_SILENCE_S = 5.0  # a worker that has not reported for so long is dropped
QUEUE_S = 5.0  # how long a gateway's word on its queue counts
GATHER_S = 3.0  # how long a new controller lets workers come (back) before it says who is there
ORPHAN_GRACE_S = 10.0  # how long a gateway that was taken for dead may still settle a request itself
MAX_LOGGED_PAGES = 2**18  # page changes kept for followers; one that is further behind gets everything anew
LOOK_S = 1.0  # how often a waiting `watch` looks for silent workers
MAX_BATCH = 512  # ledger records in one transaction

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A member: where gateways reach it, and for a decode worker where prefill workers do."""

    worker: str
    epoch: int
    role: Literal["prefill", "decode"]
    host: str
    port: int
    ship_host: str | None = None
    ship_port: int | None = None
    rank_ports: list[int] = []  # the same of ranks 1 and up
    pid: int
    node: str


class WatchUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """What a follower needs to be up to date. `members` are all there are, by id."""

    version: int
    members: list[WorkerInfo]
    changes: list[PageChange]


class PrefixCacheController:
    """See the module. `secret` is what gateways and workers prove themselves with; it must outlive a restart, so it is given."""

    def __init__(
        self,
        ledger_url: str,
        secret: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._secret = secret
        self._clock = clock
        self._wall_clock = wall_clock
        self._started_at = self._looked_at = clock()
        self._members: dict[str, WorkerInfo] = {}
        self._reports: dict[str, tuple[int, float]] = {}  # worker -> (last sequence number, when)
        self._queues: dict[str, tuple[int, float]] = {}  # gateway -> (prompt tokens that wait, when)
        self._directory = PrefixDirectory()
        # Versions of another incarnation must not look like ours.
        self._version = self._members_version = secrets.randbits(30) << 32
        self._log: deque[tuple[int, PageChange]] = deque()
        self._log_start = self._version  # the log holds every page change after this version
        self._num_logged_pages = 0
        self._changed = asyncio.Event()
        self._writer = _LedgerWriter(ledger_url)
        self._ledger_url = ledger_url
        self._keys: KeyStore | None = None
        self._orphans: dict[str, tuple[int, float]] = {}  # request id -> (output tokens, when to settle)
        self._settling: set[asyncio.Task[None]] = set()

    async def secret(self) -> str:
        return self._secret

    async def register(self, info: WorkerInfo) -> None:
        """A worker is there. The same incarnation may say so again; another one takes its place."""
        self._look_around()
        known = self._members.get(info.worker)
        if known == info:
            return
        self._members[info.worker] = info
        self._reports[info.worker] = 0, self._clock()
        self._change_pages(PageChange(info.worker, info.epoch, reset=True))
        self._membership_changed()

    async def deregister(self, worker: str, epoch: int) -> None:
        """A worker leaves. Unknown ones are fine."""
        member = self._members.get(worker)
        if member is not None and member.epoch == epoch:
            self._drop(worker)

    async def report(
        self, worker: str, epoch: int, seq: int, stored: list[bytes], removed: list[bytes], reset: bool
    ) -> Literal["ok", "resync"]:
        """What a worker's prefix cache gained and lost since its report number seq - 1; also its sign of life.

        "resync": register, and report everything with `reset`. A report that is repeated is taken once.
        """
        self._look_around()
        member = self._members.get(worker)
        if member is None or member.epoch != epoch:
            return "resync"
        last, _ = self._reports[worker]
        if seq > last + 1 and not reset:
            return "resync"
        is_new = reset or seq == last + 1
        self._reports[worker] = seq if is_new else last, self._clock()
        if is_new and (reset or stored or removed):
            self._change_pages(PageChange(worker, epoch, stored, removed, reset))
        return "ok"

    async def watch(self, version: int, timeout: float, pages: bool = True) -> WatchUpdate:
        """Waits until something is newer than `version`, at most `timeout` seconds; -1 gets everything at once.

        With pages=False only a change of membership counts, and no page changes come along. A new controller answers
        nobody for GATHER_S: those who followed the one before would think that all workers have gone.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            self._look_around()
            changed = self._changed
            newest = self._version if pages else self._members_version
            over = loop.time() >= deadline or newest > version or version > self._version
            if over and self._clock() - self._started_at >= GATHER_S:
                return self._update_since(version, pages)
            await _wait(changed, LOOK_S if over else min(LOOK_S, deadline - loop.time()))

    async def queue(self, gateway: str, num_tokens: int) -> None:
        """How many prompt tokens a gateway's requests wait to have computed, from time to time."""
        self._queues[gateway] = num_tokens, self._clock()

    async def queued_tokens(self) -> int:
        """Of all gateways that have said so lately."""
        since = self._clock() - QUEUE_S
        self._queues = {gateway: told for gateway, told in self._queues.items() if told[1] >= since}
        return sum(num_tokens for num_tokens, _ in self._queues.values())

    async def open(self, opening: Opening) -> Opening:
        """Returns once the opening is on disk. Raises LedgerUnavailable or RecordRefused."""
        record = await self._writer.write(opening)
        assert isinstance(record, Opening)
        return record

    async def settle(self, settlement: Settlement) -> Settled:
        """Returns what is on disk: this settlement, or the first one of the request. Raises as `open`."""
        record = await self._writer.write(settlement)
        assert isinstance(record, Settled)
        return record

    async def orphaned(self, request_id: str, output_tokens: int) -> None:
        """A worker lost the gateway of a request that had emitted so much: unless settled in time, it is settled so."""
        emitted, due = self._orphans.get(request_id, (0, self._clock() + ORPHAN_GRACE_S))
        self._orphans[request_id] = max(emitted, output_tokens), due

    async def totals(self) -> list[Totals]:
        """Every tenant's sums. Raises LedgerUnavailable."""
        return await self._writer.call(Ledger.totals)

    async def days(self, tenant: str, key_id: str, first: int, last: int) -> list[DayTotals]:
        """One key's sums by day. Raises LedgerUnavailable."""
        return await self._writer.call(Ledger.days, tenant, key_id, first, last)

    async def keys(self, known: int) -> KeyList | None:
        """API keys and limits; None where nothing has changed since version `known`. Raises LedgerUnavailable."""
        return await asyncio.to_thread(self._read_keys, known)

    async def close(self) -> None:
        """Settles the orphans there are and closes the ledger."""
        self._settle_orphans(float("inf"))
        await asyncio.gather(*self._settling)
        await self._writer.close()
        if self._keys is not None:
            self._keys.close()

    def _read_keys(self, known: int) -> KeyList | None:
        """On any thread. The database may come up after the controller."""
        if self._keys is None:
            self._keys = KeyStore(self._ledger_url)
        return self._keys.read(known)

    def _look_around(self) -> None:
        now = self._clock()
        if now - self._looked_at > WORKER_SILENCE_S / 2:  # it was we who did not listen
            self._reports = {worker: (seq, now) for worker, (seq, _) in self._reports.items()}
        self._looked_at = now
        for worker, (_, heard_at) in list(self._reports.items()):
            if now - heard_at > WORKER_SILENCE_S:
                log.warning("worker %s has been silent for %.1f s and is dropped", worker, now - heard_at)
                self._drop(worker)
        self._settle_orphans(now)

    def _drop(self, worker: str) -> None:
        del self._members[worker], self._reports[worker]
        self._directory.drop(worker)
        self._membership_changed()

    def _membership_changed(self) -> None:
        self._version += 1
        self._members_version = self._version
        self._wake_followers()

    def _change_pages(self, change: PageChange) -> None:
        self._directory.apply(change.worker, change.epoch, change.stored, change.removed, change.reset)
        self._version += 1
        self._log.append((self._version, change))
        self._num_logged_pages += _size(change)
        while self._num_logged_pages > MAX_LOGGED_PAGES:
            self._log_start, forgotten = self._log.popleft()
            self._num_logged_pages -= _size(forgotten)
        self._wake_followers()

    def _wake_followers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _update_since(self, version: int, pages: bool) -> WatchUpdate:
        if not pages:
            changes = []
        elif self._log_start <= version <= self._version:
            changes = [change for at, change in self._log if at > version]
        else:
            changes = self._directory.snapshot()
        members = sorted(self._members.values(), key=lambda info: info.worker)
        return WatchUpdate(version=self._version, members=members, changes=changes)

    def _settle_orphans(self, now: float) -> None:
        due = [request_id for request_id, (_, at) in self._orphans.items() if at <= now]
        for request_id in due:
            output_tokens, _ = self._orphans.pop(request_id)
            task = asyncio.get_running_loop().create_task(self._settle_orphan(request_id, output_tokens))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

    async def _settle_orphan(self, request_id: str, output_tokens: int) -> None:
        try:
            opening = await self._writer.call(Ledger.find, request_id)
            if opening is None:
                return  # no token had left
            settlement = Settlement(
                request_id=request_id,
                hit_tokens=opening.hit_tokens,
                miss_tokens=opening.miss_tokens,
                output_tokens=output_tokens,
                finish="orphaned",
                time_ms=int(self._wall_clock() * 1000),
            )
            await self._writer.write(settlement)
        except LedgerUnavailable as error:
            log.warning("orphan %s waits for the ledger: %s", request_id, error)
            self._orphans[request_id] = output_tokens, self._clock() + ORPHAN_GRACE_S


class _LedgerWriter:
    """The ledger on a thread of its own. What is asked for while a transaction is under way shares the next one."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._ledger: Ledger | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")
        self._waiting: list[tuple[Opening | Settlement, asyncio.Future[Record]]] = []
        self._task: asyncio.Task[None] | None = None

    async def write(self, record: Opening | Settlement) -> Record:
        """Returns what is on disk. Raises LedgerUnavailable or RecordRefused."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Record] = loop.create_future()
        self._waiting.append((record, done))
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._write_waiting())
        return await done

    async def call(self, method: Callable[[Ledger, *Arguments], T], *arguments: *Arguments) -> T:
        """Calls a method of the ledger between two others. Raises LedgerUnavailable."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: method(self._open(), *arguments))

    async def close(self) -> None:
        if self._task is not None:
            await self._task
        if self._ledger is not None:
            await self.call(Ledger.close)
        self._thread.shutdown()

    async def _write_waiting(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
            call = self.call(Ledger.append, [record for record, _ in batch])
            # Whatever goes wrong goes to those who wait, so that none waits for ever.
            (result,) = await asyncio.gather(call, return_exceptions=True)
            answers: Sequence[Record | BaseException]
            answers = [result] * len(batch) if isinstance(result, BaseException) else result
            for (_, done), answer in zip(batch, answers, strict=True):
                if done.cancelled():
                    continue
                if isinstance(answer, BaseException):
                    done.set_exception(answer)
                else:
                    done.set_result(answer)

    def _open(self) -> Ledger:
        """On the ledger's thread. The database may come up after the controller."""
        if self._ledger is None:
            self._ledger = Ledger(self._url)
        return self._ledger


def _size(change: PageChange) -> int:
    return 1 + len(change.stored) + len(change.removed)


async def _wait(event: asyncio.Event, timeout: float) -> None:
    try:
        async with asyncio.timeout(timeout):
            await event.wait()
    except TimeoutError:
        return
