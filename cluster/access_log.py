"""One JSON line for each HTTP request, whatever became of it, and the ids that it goes by. Never any text of a prompt.

Every request gets an id of ours, which is the `id` in its answer, in the ledger and in every line that a log has about it.
A client may send an id of its own as `x-request-id`; it is written beside ours, and sent back with every answer.
"""

import logging
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.activity import Ending
from cluster.answer import Answer
from cluster.errors import ApiError, InvalidRequest
from cluster.prices import dollars
from cluster.tenants import Tenant

log = logging.getLogger("lightship.access")

HEADER = "x-request-id"
MAX_ID_CHARS = 128
MAX_PATH_CHARS = 200
PREFIXES = {"/v1/chat/completions": "chatcmpl", "/v1/completions": "cmpl"}
# Asked for every second by probes and open consoles: logged on level DEBUG only.
QUIET_PATHS = frozenset({"/health", "/ready", "/metrics", "/console/state"})
WORST_FIRST = ("error", "cancelled", "length", "tool_calls", "stop")


@dataclass(eq=False)
class Call:
    """One HTTP request: its ids, whose it is, and what it came to. Filled in as that becomes known."""

    id: str
    method: str
    path: str
    client_id: str | None = None
    tenant: Tenant | None = None
    answer: Answer | None = None
    status: int | None = None  # None: the client left before there was an answer
    error: str | None = None
    deadline: float | None = None  # of the event loop's clock
    headers: dict[str, str] = field(default_factory=dict)  # of the answer, whatever it will be
    exits: ExitStack = field(
        default_factory=ExitStack
    )  # gives back what the request holds, once it is settled
    arrived_at: float = field(default_factory=time.time)
    clock: float = field(default_factory=time.monotonic)
    read_at: float = 0.0  # of the same clock: the whole body had been read

    @classmethod
    def of(cls, request: Request) -> "Call":
        """The call that a route handler is answering."""
        call: Call = request.state.call
        return call

    @property
    def seconds(self) -> float:
        """Since its arrival."""
        return time.monotonic() - self.clock


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What is logged. Tokens, cost and restarts: of all choices; seconds: of the first, and `total` of everything."""

    time: str
    id: str
    client_id: str | None
    tenant: str | None
    key_id: str | None
    method: str
    path: str
    status: int | None
    error: str | None
    finish: str | None  # of several choices: the worst
    prompt_tokens: int
    hit_tokens: int
    output_tokens: int
    cost: str  # dollars, exact
    queue: float
    prefill: float
    ship: float
    first_token: float
    total: float
    workers: list[str]
    restarts: int


class AccessLog:
    """The ASGI application around all others. `refuse` answers a request whose own id cannot be used.

    echoes_id False: a proxy in front puts the header on every answer. trace: called with each call that is over.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        refuse: Callable[[Request, ApiError], Awaitable[Response]],
        echoes_id: bool = True,
        trace: Callable[[Call, Headers], None] | None = None,
    ) -> None:
        self._app = app
        self._trace = trace
        self._refuse = refuse
        self._echoes_id = echoes_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"]
        call = Call(_new_id(path), scope["method"], path)
        scope.setdefault("state", {})["call"] = call

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                MutableHeaders(scope=message).update(call.headers)
                if self._echoes_id:
                    MutableHeaders(scope=message)[HEADER] = call.client_id or call.id
            await send(message)

        try:
            await self._run(call, scope, receive, answer)
        finally:
            with call.exits:
                if call.answer is not None:
                    await call.answer.close()  # a request whose client has left is settled now
            write(call)
            if self._trace is not None:
                self._trace(call, Headers(scope=scope))

    async def _run(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            call.client_id = read_client_id(Headers(scope=scope).get(HEADER))
        except InvalidRequest as error:
            response = await self._refuse(Request(scope), error)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def read_client_id(value: str | None) -> str | None:
    """A client's own id. Raises InvalidRequest where it is no id that a log can show."""
    if value is None:
        return None
    if not 0 < len(value) <= MAX_ID_CHARS or not all("!" <= character <= "~" for character in value):
        raise InvalidRequest(
            f"{HEADER}: must be 1 to {MAX_ID_CHARS} visible ASCII characters, without spaces", param=HEADER
        )
    return value


def write(call: Call) -> None:
    level = logging.DEBUG if call.path in QUIET_PATHS and call.status == 200 else logging.INFO
    if log.isEnabledFor(level):
        log.log(level, "%s", msgspec.json.encode(line_of(call)).decode())


def line_of(call: Call) -> Line:
    tenant, endings = call.tenant, call.answer.endings if call.answer else []
    phases = endings[0].phases if endings else None
    settlements = [ending.settlement for ending in endings]
    return Line(
        time=datetime.fromtimestamp(call.arrived_at, UTC).isoformat(timespec="milliseconds"),
        id=call.id,
        client_id=call.client_id,
        tenant=tenant.name if tenant else None,
        key_id=tenant.key_id if tenant else None,
        method=call.method,
        path=call.path[:MAX_PATH_CHARS],
        status=call.status,
        error=call.error,
        finish=_worst(endings),
        prompt_tokens=sum(settled.hit_tokens + settled.miss_tokens for settled in settlements),
        hit_tokens=sum(settled.hit_tokens for settled in settlements),
        output_tokens=sum(settled.output_tokens for settled in settlements),
        cost=dollars(sum(ending.nanodollars for ending in endings)).removeprefix("$"),
        queue=phases.queue if phases else 0.0,
        prefill=phases.prefill if phases else 0.0,
        ship=phases.ship if phases else 0.0,
        first_token=phases.first_token if phases else 0.0,
        total=call.seconds,
        workers=list(dict.fromkeys(worker for ending in endings for worker in ending.workers)),
        restarts=sum(settled.resumes for settled in settlements),
    )


def open_access_log(path: str | None) -> None:
    """Where the lines go: into a file, which may be rotated away, or (None) to stdout."""
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler(sys.stdout)
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        handler = WatchedFileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)


def _new_id(path: str) -> str:
    return f"{PREFIXES.get(path, 'request')}-{secrets.token_hex(12)}"


def _worst(endings: list[Ending]) -> str | None:
    finishes = {ending.settlement.finish for ending in endings}
    return next((finish for finish in WORST_FIRST if finish in finishes), None)
