"""A worker's TCP door for gateways: messages in, frames out.

Runs an event loop on a thread of its own, so that a worker is the same inside a Serve replica and in a plain process.
Knows nothing of Ray, prompts or prices.
"""

import asyncio
import contextlib
import hmac
import logging
import threading
import time
from collections.abc import Coroutine, Hashable
from typing import Any

import msgspec

from workers.messages import (
    HEARTBEAT_S,
    PROTOCOL_VERSION,
    Abort,
    Frame,
    Hello,
    Submit,
    ToWorker,
    Update,
    pack,
    read_body,
)
from workers.worker import Worker

log = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 64 * 2**20  # a gateway that reads slower than this is treated as gone
_decoder = msgspec.msgpack.Decoder(ToWorker)


class WorkerServer:
    """Listens on `host` and an ephemeral port (see `port` after `start`)."""

    def __init__(self, *, host: str, secret: str) -> None:
        self.worker: Worker | None = None
        self.host = host
        self.port = 0
        self._secret = secret
        self._writers: set[asyncio.StreamWriter] = set()
        self._gateways: dict[Hashable, asyncio.StreamWriter] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="worker-server", daemon=True)

    def start(self, worker: Worker) -> None:
        self.worker = worker
        self._thread.start()
        self._run(self._open())

    def stop(self) -> None:
        """Closes every connection and ends the loop. Safe to call twice."""
        if self._loop.is_closed():
            return
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def emit(self, updates: list[tuple[Hashable, Update]]) -> None:
        """Called by the engine thread once a step: one frame for each gateway that has something in it."""
        by_gateway: dict[Hashable, list[Update]] = {}
        for owner, update in updates:
            by_gateway.setdefault(owner, []).append(update)
        self._loop.call_soon_threadsafe(self._deliver, by_gateway)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._heart = asyncio.create_task(self._beat())

    async def _close(self) -> None:
        self._server.close()
        self._heart.cancel()
        for writer in self._writers:
            writer.transport.abort()  # wakes its handler, which ends
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        worker = self.worker
        assert worker is not None
        owner: Hashable = object()
        self._writers.add(writer)
        try:
            hello = _decoder.decode(await read_body(reader))
            if not self._welcome(hello):
                log.warning("refused a connection: not a gateway of this cluster")
                return
            self._gateways[owner] = writer
            self._deliver({owner: []})
            while True:
                self._handle(_decoder.decode(await read_body(reader)), owner)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except msgspec.MsgspecError as error:
            log.warning("closed a connection that sent an unreadable message: %s", error)
        finally:
            if self._gateways.pop(owner, None) is not None:
                worker.post(lambda: worker.abort_owner(owner))
            self._writers.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def _welcome(self, hello: object) -> bool:
        return (
            isinstance(hello, Hello)
            and hmac.compare_digest(hello.secret, self._secret)
            and hello.version == PROTOCOL_VERSION
        )

    def _handle(self, message: ToWorker, owner: Hashable) -> None:
        worker = self.worker
        assert worker is not None
        if isinstance(message, Submit):
            worker.post(lambda: worker.submit(message, owner))
        elif isinstance(message, Abort):
            worker.post(lambda: worker.abort(message.request_id))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._deliver({owner: [] for owner in self._gateways})

    def _deliver(self, updates: dict[Hashable, list[Update]]) -> None:
        worker = self.worker
        assert worker is not None
        load = worker.latest_load
        for owner, of_gateway in updates.items():
            writer = self._gateways.get(owner)
            if writer is None:
                continue
            if writer.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
                log.warning("closed a gateway's connection: it does not read")
                writer.transport.abort()
                continue
            writer.write(pack(Frame(worker.id, worker.epoch, load, of_gateway)))


def seconds_since_step(worker: Worker) -> float:
    """Age of the engine thread's last sign of life."""
    return time.monotonic() - worker.alive_at
