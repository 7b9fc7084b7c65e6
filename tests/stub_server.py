"""A stand-in for a server, for the tests of HTTP clients: a thread that answers POSTs with what the test hands it."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Iterator[bytes] | tuple[int, bytes]  # a stream, or a status and a body
MODELS = {"object": "list", "data": [{"id": "stub", "object": "model", "vocab_size": 400}]}


class StubServer:
    """`answer(path, body)` is called for every POST; `seen` holds what came, `keys` the Authorization headers."""

    def __init__(self, answer: Callable[[str, dict[str, Any]], Answer]) -> None:
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.hung_up = threading.Event()  # a client has left before the end of its stream
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, json.dumps(MODELS).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                stub.seen.append(body)
                stub.keys.append(self.headers["authorization"])
                reply = answer(self.path, body)
                if isinstance(reply, tuple):
                    self._send(*reply)
                    return
                self.send_response(200)
                self.end_headers()
                try:
                    for part in reply:
                        self.wfile.write(part)
                except (BrokenPipeError, ConnectionResetError):
                    stub.hung_up.set()

            def _send(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator["StubServer"]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
