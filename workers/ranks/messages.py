"""What the leader and the followers of one worker say to each other on their TCP connection.

A message is a 4-byte big-endian length and a msgpack body. Tensors do not travel here: they go through the ranks' group.
"""

import contextlib
import socket
import struct
import threading

import msgspec

from workers.config import EngineConfig
from workers.scheduler import Lockstep

MAX_MESSAGE_BYTES = 256 * 2**20  # the tokens and pages of a step full of long prompts take a few MB
_LENGTH = struct.Struct(">I")


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """Sent as an array, without field names: both ends run the same code."""


class Hello(_Message, frozen=True, tag="hello"):
    """Follower to leader, first."""

    rank: int
    secret: str


class Setup(_Message, frozen=True, tag="setup", kw_only=True):
    """Leader to follower: join the group, then load your share of the model."""

    model: str
    config: EngineConfig
    shares_rows: bool
    store_port: int  # where the group is made, on the leader's host


class Loaded(_Message, frozen=True, tag="loaded"):
    """Follower to leader: ready for steps."""


class Failed(_Message, frozen=True, tag="failed"):
    """Follower to leader, last: what went wrong."""

    reason: str


class Alive(_Message, frozen=True, tag="alive"):
    """Follower to leader, again and again: silence means a frozen process."""


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


ToLeader = Hello | Loaded | Failed | Alive
ToFollower = Setup | Step | Record
_encoder = msgspec.msgpack.Encoder()


class Wire:
    """One end of a connection. One thread receives, any may send. Both raise OSError once it is broken."""

    def __init__(self, connection: socket.socket, kind: object) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._lock = threading.Lock()
        self._decoder: msgspec.msgpack.Decoder[object] = msgspec.msgpack.Decoder(kind)

    def send(self, message: ToLeader | ToFollower) -> None:
        body = _encoder.encode(message)
        with self._lock:
            self.socket.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self) -> object:
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
