"""What the leader and the followers of one worker say to each other on their TCP connection.

A message is a 4-byte big-endian length and a msgpack body. Tensors do not travel here: they go through the ranks' group.
"""

import contextlib
import socket
import struct
import threading
from typing import Any

import msgspec

from workers.config import EngineConfig
from workers.messages import Ticket
from workers.scheduler import Lockstep
from workers.shipping.protocol import Commit

MAX_MESSAGE_BYTES = 256 * 2**20  # the tokens and pages of a step full of long prompts take a few MB
_LENGTH = struct.Struct(">I")


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """Sent as an array, without field names: both ends run the same code."""


class Hello(_Message, frozen=True, tag="hello"):
    """Follower to leader, first."""

    rank: int
    secret: str


class Ship(_Message, frozen=True, tag="ship", kw_only=True):
    """Whose caches a follower ships or lands, as workers.start knows it."""

    worker_id: str
    epoch: int
    host: str
    secret: str


class Setup(_Message, frozen=True, tag="setup", kw_only=True):
    """Leader to follower: join the group, then load your share of the model."""

    model: str
    config: EngineConfig
    shares_rows: bool
    store_port: int  # where the group is made, on the leader's host
    ship: Ship | None  # None: an engine without links


class Ready(_Message, frozen=True, tag="ready"):
    """Follower to leader: about to join the group."""


class Loaded(_Message, frozen=True, tag="loaded"):
    """Follower to leader: ready for steps, and for shipments at this port if it is a decode worker's."""

    ship_port: int


class Failed(_Message, frozen=True, tag="failed"):
    """Follower to leader, last: what went wrong."""

    reason: str


class Alive(_Message, frozen=True, tag="alive"):
    """Follower to leader, again and again: silence means a frozen process. As Shipper or Landing tell it."""

    peers: list[tuple[str, int]] = []
    counters: dict[str, float] = {}


class Known(_Message, frozen=True, tag="known", kw_only=True):
    """What has become new of a request since the last step that named it: tokens and pages from these indices on."""

    request_id: str
    tokens_from: int
    tokens: list[int]
    pages_from: int
    pages: list[int]


class Step(_Message, frozen=True, tag="step", kw_only=True):
    """Leader to follower: one forward pass.

    forget: requests that have ended
    items:  (request, start, end) of what this rank computes, in its order
    shows:  whether what the indexer selects goes to the leader
    """

    forget: list[str]
    known: list[Known]
    items: list[tuple[str, int, int]]
    lockstep: Lockstep
    shows: bool


class Record(_Message, frozen=True, tag="record"):
    """Leader to follower: record decode steps now, as all ranks do."""


class Peers(_Message, frozen=True, tag="peers"):
    """To a prefill follower: landing -> host, port and epoch, as for Shipper.set_peers."""

    landings: dict[str, tuple[str, int, int]]


class ShipPages(_Message, frozen=True, tag="ship_pages"):
    """To a prefill follower: as Shipper.ship, after the steps that were sent before it."""

    ticket: Ticket
    page_indices: list[int]
    page_ids: list[int]


class ShipCommit(_Message, frozen=True, tag="ship_commit"):
    """To a prefill follower: as Shipper.commit."""

    ticket: Ticket
    token: int
    finish: str | None


class ShipAbandon(_Message, frozen=True, tag="ship_abandon"):
    """To a prefill follower: as Shipper.abandon."""

    ticket: Ticket


class ShipEnded(_Message, frozen=True, tag="ship_ended"):
    """Of a prefill follower: it reads no page of the request any more. `reason`: why it failed; None if it did not."""

    request_id: str
    reason: str | None


class Expect(_Message, frozen=True, tag="expect"):
    """To a decode follower: the pages of this ticket, which are its own, may be written by shipments."""

    ticket: Ticket


class Forget(_Message, frozen=True, tag="forget"):
    """To a decode follower: no more shipments for this request; its pages may soon be another's."""

    request_id: str


class PagesLanded(_Message, frozen=True, tag="pages_landed"):
    """Of a decode follower: so many layers of one kind of these pages were verified and written."""

    request_id: str
    page_indices: list[int]
    num_layers: int


class CommitLanded(_Message, frozen=True, tag="commit_landed"):
    """Of a decode follower."""

    commit: Commit


class AbandonLanded(_Message, frozen=True, tag="abandon_landed"):
    """Of a decode follower."""

    request_id: str


ToLeader = Hello | Ready | Loaded | Failed | Alive | ShipEnded | PagesLanded | CommitLanded | AbandonLanded
ToFollower = Setup | Step | Record | Peers | ShipPages | ShipCommit | ShipAbandon | Expect | Forget


def rank_name(worker_id: str, rank: int) -> str:
    """Under which the rank's own links go; rank 0's are the worker's."""
    return f"{worker_id}.{rank}" if rank else worker_id


_encoder = msgspec.msgpack.Encoder()


class Wire:
    """One end of a connection. One thread receives, any may send. Both raise OSError once it is broken."""

    def __init__(self, connection: socket.socket, kind: object) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._lock = threading.Lock()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(kind)

    def send(self, message: ToLeader | ToFollower) -> None:
        body = _encoder.encode(message)
        with self._lock:
            self.socket.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self) -> Any:
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > MAX_MESSAGE_BYTES:
            raise ConnectionError(f"a message of {length} bytes; the limit is {MAX_MESSAGE_BYTES}")
        try:
            return self._decoder.decode(self._read(length))
        except msgspec.DecodeError as error:
            raise ConnectionError(f"an unreadable message: {error}") from error

    def hang_up(self) -> None:
        """Breaks the connection; whoever receives at either end wakes up."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def _read(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            received = self.socket.recv_into(view)
            if not received:
                raise ConnectionError("the connection was closed")
            view = view[received:]
        return data
