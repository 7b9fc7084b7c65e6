"""The TCP connection between a prefill and a decode worker: small messages, and the proof that the peer is alive.

A killed peer's kernel closes the connection, which wakes the reader at once; a frozen peer's heartbeats stop. Knows
nothing of pages or process groups.
"""

import select
import socket
import threading
import time
from collections import deque

from workers.shipping.protocol import Framer, Heartbeat, LinkConfig, Message, encode

_HEARTBEAT = encode(Heartbeat())


class LinkLost(ConnectionError):
    """The peer is gone, frozen or talks nonsense, or this end has closed."""


class Link:
    """One end. One thread calls `receive` again and again, which also keeps the heart beating; any thread may `send`.

    The owner of the reading thread calls `dispose` when it is through with the link.
    """

    def __init__(self, connection: socket.socket, config: LinkConfig) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(config.dead_after_s)
        self.address: str = connection.getsockname()[0]
        self._socket = connection
        self._config = config
        self._framer = Framer()
        self._unread: deque[Message] = deque()
        self._send_lock = threading.Lock()
        self._sent_at = time.monotonic()
        self._closed_because: str | None = None
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    @property
    def closed(self) -> bool:
        return self._closed_because is not None

    def send(self, message: Message) -> int:
        """Returns the number of bytes. Raises LinkLost if the link is broken, which it then is for the reader too."""
        data = encode(message)
        self._send(data)
        return len(data)

    def receive(self) -> Message:
        """The next message that is not a heartbeat. Raises LinkLost or another OSError."""
        heard_at = time.monotonic()
        while not self._unread:
            if time.monotonic() - self._sent_at >= self._config.heartbeat_s:
                self._send(_HEARTBEAT)
            if self._poll.poll(500 * self._config.heartbeat_s):
                self._read()
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at > self._config.dead_after_s:
                raise LinkLost(f"the peer was silent for {self._config.dead_after_s:g} s")
        return self._unread.popleft()

    def close(self, reason: str) -> None:
        """Breaks the link; both readers wake up. From any thread, any number of times; the first reason stays."""
        self._closed_because = self._closed_because or reason
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the peer was faster

    def dispose(self) -> None:
        """Gives the socket back. For the reading thread alone, so that no one polls a number that is in use again."""
        self.close("disposed")
        self._socket.close()

    def _send(self, data: bytes) -> None:
        try:
            with self._send_lock:
                self._socket.sendall(data)
                self._sent_at = time.monotonic()
        except OSError as error:
            self.close(f"cannot send: {error}")
            raise LinkLost(self._closed_because) from error

    def _read(self) -> None:
        data = self._socket.recv(2**16)
        if not data:
            raise LinkLost(self._closed_because or "the peer closed the connection")
        try:
            self._unread.extend(m for m in self._framer.feed(data) if not isinstance(m, Heartbeat))
        except ValueError as error:
            raise LinkLost(f"the peer sent an unreadable message: {error}") from error
