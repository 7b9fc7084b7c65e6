"""The gateway's view of the workers: one TCP connection to each, their load, and which pairs are proven.

A connection that closes, or from which no frame came for `timeout_s`, is a dead worker: every attempt that uses it is told
at once. Knows nothing of HTTP, prompts or money.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable

import msgspec

from cluster.controller import WorkerInfo
from workers.messages import Abort, Frame, Hello, Load, Tokens, ToWorker, Update, pack, read_body

log = logging.getLogger(__name__)

RECONNECT_S = 0.2
_decoder = msgspec.msgpack.Decoder(Frame)

Pair = tuple[tuple[str, int], tuple[str, int]]  # (prefill worker, epoch), (decode worker, epoch)


class WorkerLost(msgspec.Struct, frozen=True):
    """Put into an attempt's mailbox when a worker it uses has gone."""

    worker: str


class DeadlinePassed(msgspec.Struct, frozen=True):
    """Put into an attempt's mailbox when its time is up."""


Note = Update | WorkerLost | DeadlinePassed


class ClusterState(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to /ready. `pairs`: "prefill -> decode" and whether a real token has gone through the pair."""

    ready: bool
    pairs: dict[str, bool]
    workers: list[WorkerInfo]


class Connection:
    """One worker. `assigned_tokens` are prompt tokens that this gateway has sent it and that it has not dealt with yet;
    `assigned_requests`, of a decode worker, those whose caches have not landed yet."""

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.load = Load()
        self.assigned_tokens = 0
        self.assigned_requests = 0
        self.alive = False
        self.task: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.info.worker, self.info.epoch

    async def open(self, hello: Hello) -> asyncio.StreamReader:
        reader, self._writer = await asyncio.open_connection(self.info.host, self.info.port)
        self._writer.write(pack(hello))
        return reader

    def send(self, message: ToWorker) -> None:
        if self._writer is not None:
            self._writer.write(pack(message))

    async def close(self) -> None:
        self.alive = False
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
            self._writer = None


class Mailbox:
    """The updates of one attempt, in order. Tokens that wait are joined, so that a gateway that is behind sends fewer,
    larger events instead of falling further behind."""

    def __init__(self) -> None:
        self._updates: deque[Note] = deque()
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return len(self._updates)

    def put(self, update: Note) -> None:
        if self._updates and (joined := _join(self._updates[-1], update)) is not None:
            self._updates[-1] = joined
        else:
            self._updates.append(update)
        self._arrived.set()

    async def get(self) -> Note:
        """Waits for one. For a single reader."""
        while not self._updates:
            self._arrived.clear()
            await self._arrived.wait()
        return self._updates.popleft()


def _join(before: Note, after: Note) -> Tokens | None:
    """Both as one; None where the second does not go on where the first ends."""
    if not (isinstance(before, Tokens) and isinstance(after, Tokens)):
        return None
    if after.start != before.start + len(before.tokens):
        return None
    both = before.logprobs is not None and after.logprobs is not None
    return msgspec.structs.replace(
        before,
        tokens=before.tokens + after.tokens,
        logprobs=[*before.logprobs, *after.logprobs] if both else None,  # type: ignore[misc]
        finish=after.finish,
        selected_pages=after.selected_pages,
        decode_s=before.decode_s or after.decode_s,
    )


class Fleet:
    """Keeps one connection to each member and hands each update to the attempt it belongs to."""

    def __init__(self, *, gateway: str, secret: str, timeout_s: float) -> None:
        self.gateway = gateway
        self.connections: dict[str, Connection] = {}
        self.proven: set[Pair] = set()
        self.changed = asyncio.Event()  # set whenever a worker or a pair has come or gone
        self.on_load: Callable[[str, str, Load], None] = lambda worker, role, load: None
        self.on_gone: Callable[[str], None] = lambda worker: None
        self.on_frame: Callable[[], None] = lambda: None  # some worker's load is news
        self._hello = Hello(gateway=gateway, secret=secret)
        self._timeout_s = timeout_s
        self._attempts: dict[str, tuple[Mailbox, frozenset[str]]] = {}

    def alive(self, role: str) -> list[Connection]:
        """Workers of a role that answer, in a fixed order."""
        found = (c for c in self.connections.values() if c.alive and c.info.role == role)
        return sorted(found, key=lambda c: c.info.worker)

    def taking(self, role: str) -> list[Connection]:
        """Those that take requests: all that answer but the draining ones."""
        return [connection for connection in self.alive(role) if not connection.load.draining]

    def linked_pairs(self) -> set[Pair]:
        """Pairs whose two workers take requests and hold a link to each other."""
        decodes = {c.key for c in self.taking("decode")}
        return {
            (p.key, (worker, epoch))
            for p in self.taking("prefill")
            for worker, epoch in p.load.peers
            if (worker, epoch) in decodes
        }

    def routable_pairs(self) -> set[Pair]:
        """Linked pairs through which a real token has gone."""
        return self.linked_pairs() & self.proven

    def state(self) -> ClusterState:
        """Ready: there is a pair, every worker that does not drain is part of one, and a real token has gone through all of them."""
        linked, proven = self.linked_pairs(), self.routable_pairs()
        paired = {key for pair in linked for key in pair}
        connections = self.connections.values()
        return ClusterState(
            ready=bool(linked)
            and linked == proven
            and all(c.key in paired or c.load.draining for c in connections),
            pairs={f"{pair[0][0]} -> {pair[1][0]}": pair in proven for pair in sorted(linked)},
            workers=sorted((c.info for c in connections), key=lambda info: info.worker),
        )

    def set_members(self, members: list[WorkerInfo]) -> None:
        """Connects to the new members and lets go of those that have left."""
        wanted = {(info.worker, info.epoch): info for info in members}
        for connection in list(self.connections.values()):
            if connection.key not in wanted and connection.task is not None:
                connection.task.cancel()
                del self.connections[connection.info.worker]
        for (worker, _), info in wanted.items():
            if worker not in self.connections:
                connection = self.connections[worker] = Connection(info)
                connection.task = asyncio.create_task(self._keep(connection))

    def begin(self, attempt: str, workers: frozenset[str]) -> Mailbox:
        """Opens the mailbox into which the updates of an attempt go, whichever worker they come from."""
        mailbox = Mailbox()
        self._attempts[attempt] = mailbox, workers
        return mailbox

    def expire(self, attempt: str) -> None:
        """The attempt's time is up: its workers are told to stop, even while nobody reads its mailbox."""
        mailbox, workers = self._attempts[attempt]
        mailbox.put(DeadlinePassed())
        self._abort(attempt, workers)

    def end(self, attempt: str, *, abort: bool) -> None:
        """Closes the attempt's mailbox; with `abort` its workers are told to stop."""
        _, workers = self._attempts.pop(attempt)
        if abort:
            self._abort(attempt, workers)

    def _abort(self, attempt: str, workers: frozenset[str]) -> None:
        for worker in workers:
            if worker in self.connections:
                self.connections[worker].send(Abort(attempt))

    async def close(self) -> None:
        tasks = [c.task for c in self.connections.values() if c.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, connection: Connection) -> None:
        """Connects, listens, and connects again until the worker is no longer a member."""
        try:
            while True:
                try:
                    await self._listen(connection)
                except (OSError, asyncio.IncompleteReadError, msgspec.MsgspecError) as error:
                    if connection.alive:
                        log.warning(
                            "lost worker %s: %s", connection.info.worker, error or type(error).__name__
                        )
                await self._gone(connection)
                await asyncio.sleep(RECONNECT_S)
        finally:
            await self._gone(connection)

    async def _listen(self, connection: Connection) -> None:
        async with asyncio.timeout(self._timeout_s):
            reader = await connection.open(self._hello)
        while True:
            async with asyncio.timeout(self._timeout_s):  # TimeoutError is an OSError
                frame = _decoder.decode(await read_body(reader))
            self._take(connection, frame)

    def _take(self, connection: Connection, frame: Frame) -> None:
        if (frame.worker, frame.epoch) != connection.key:
            raise ConnectionError(f"another worker answers here: {frame.worker} of epoch {frame.epoch}")
        before, connection.load = connection.load, frame.load
        pairs_changed = (frame.load.peers, frame.load.draining) != (before.peers, before.draining)
        self.on_load(connection.info.worker, connection.info.role, frame.load)
        if pairs_changed or not connection.alive:
            connection.alive = True
            self.changed.set()
        for update in frame.updates:
            attempt = self._attempts.get(update.request_id)
            if attempt is not None:
                attempt[0].put(update)
        self.on_frame()

    async def _gone(self, connection: Connection) -> None:
        was_alive = connection.alive
        await connection.close()
        if was_alive:
            worker = connection.info.worker
            for mailbox, workers in self._attempts.values():
                if worker in workers:
                    mailbox.put(WorkerLost(worker))
            self.proven = {pair for pair in self.proven if connection.key not in pair}
            self.on_gone(worker)
            self.changed.set()
