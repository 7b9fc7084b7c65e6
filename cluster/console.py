"""The console: one page at `/` and the live picture of the cluster that it asks for every second.

The picture is what this gateway knows, in one struct: its view of the workers, and the caller's own requests. The page is
static: three files beside this one, sent as they are, which may load nothing from elsewhere. Knows nothing of routes.
"""

import time
from pathlib import Path

import msgspec
from starlette.responses import Response

from cluster.activity import Activity, Ending, Running, workers_of
from cluster.explanation import Phases
from cluster.fleet import Connection, Fleet
from cluster.flight import Pilot
from cluster.prices import dollars

FILES = {
    "/": ("console.html", "text/html"),
    "/console.css": ("console.css", "text/css"),
    "/console.js": ("console.js", "text/javascript"),
}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """One worker, as of its last load frame."""

    worker: str
    role: str
    alive: bool  # this gateway hears from it
    draining: bool  # takes no more requests, ends those it has, and goes
    pairs: int  # counterparts it is linked to
    proven: int  # of them, through which a real token has gone
    running: int
    waiting: int
    queued_tokens: int
    held_pages: int
    cached_pages: int
    free_pages: int


class RequestView(msgspec.Struct, frozen=True, kw_only=True):
    """One request. `finish` None: in progress, and its seconds are those so far."""

    id: str
    ended_at: float | None  # seconds since the epoch
    finish: str | None
    prompt_tokens: int
    read_tokens: int  # of the prompt, as far as is known
    hit_tokens: int
    output_tokens: int
    cost: str | None  # dollars, exact; once it is known
    phases: Phases
    workers: list[str]
    restarts: int


class ConsoleState(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to /console/state. Workers and queue are everyone's; tokens and requests are the caller's."""

    gateway: str
    time: float  # seconds since the epoch
    tenant: str
    ready: bool
    workers: list[WorkerView]
    requests_in_progress: int
    queued_tokens: int  # prompt tokens whose first token has not come yet
    output_tokens: int  # since this gateway started
    requests: list[RequestView]  # newest first: those in progress, then those that ended


class Console:
    """Looks at one gateway's fleet and requests."""

    def __init__(self, fleet: Fleet, pilot: Pilot, activity: Activity) -> None:
        self._fleet = fleet
        self._pilot = pilot
        self._activity = activity

    def state(self, tenant: str) -> ConsoleState:
        running = [_of_running(running) for running in self._activity.running(tenant)]
        ended = [_of_ending(ending) for ending in self._activity.last(tenant)]
        connections = self._fleet.connections.values()
        return ConsoleState(
            gateway=self._fleet.gateway,
            time=time.time(),
            tenant=tenant,
            ready=self._fleet.state().ready,
            workers=sorted(map(self._worker, connections), key=lambda view: (view.role, view.worker)),
            requests_in_progress=self._pilot.in_progress,
            queued_tokens=self._pilot.queued_tokens,
            output_tokens=self._activity.output_tokens(tenant),
            requests=running[::-1] + ended[::-1],
        )

    def _worker(self, connection: Connection) -> WorkerView:
        load, fleet = connection.load, self._fleet
        return WorkerView(
            worker=connection.info.worker,
            role=connection.info.role,
            alive=connection.alive,
            draining=load.draining,
            pairs=sum(connection.key in pair for pair in fleet.linked_pairs()),
            proven=sum(connection.key in pair for pair in fleet.routable_pairs()),
            running=load.running,
            waiting=load.waiting,
            queued_tokens=load.queued_tokens,
            held_pages=load.held_pages,
            cached_pages=load.cached_pages,
            free_pages=load.free_pages,
        )


def files() -> dict[str, Response]:
    """The page's files by path. Raises OSError where one is missing."""
    return {path: _file(name, media_type) for path, (name, media_type) in FILES.items()}


def _file(name: str, media_type: str) -> Response:
    return Response(Path(__file__).with_name(name).read_bytes(), media_type=media_type, headers=HEADERS)


def _of_running(running: Running) -> RequestView:
    flight = running.flight
    timing = flight.timing
    num_read = len(flight.prompt) if flight.emitted else max(flight.num_read, flight.num_hit)
    return RequestView(
        id=flight.id,
        ended_at=None,
        finish=None,
        prompt_tokens=len(flight.prompt),
        read_tokens=num_read,
        hit_tokens=flight.num_hit,
        output_tokens=len(flight.emitted),
        cost=None,
        phases=msgspec.structs.replace(Phases.of(flight), total=time.monotonic() - timing.admitted_at),
        workers=workers_of(flight),
        restarts=flight.restarts,
    )


def _of_ending(ending: Ending) -> RequestView:
    settlement = ending.settlement
    prompt_tokens = settlement.hit_tokens + settlement.miss_tokens
    return RequestView(
        id=settlement.request_id,
        ended_at=settlement.time_ms / 1000,
        finish=settlement.finish,
        prompt_tokens=prompt_tokens,
        read_tokens=prompt_tokens,
        hit_tokens=settlement.hit_tokens,
        output_tokens=settlement.output_tokens,
        cost=dollars(ending.nanodollars).removeprefix("$"),
        phases=ending.phases,
        workers=ending.workers,
        restarts=settlement.resumes,
    )
