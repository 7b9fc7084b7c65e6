"""One request from admission to its last token: route, reserve, prefill, stream, and start again where a worker is lost.

Every emitted token id is journaled, so that another attempt prefills prompt + emitted tokens and the stream goes on at the
next one: none lost, none twice. Knows token ids only; nothing of HTTP, text or money.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from cluster.errors import ContextTooLong, InvalidRequest, Overloaded, WorkersLost
from cluster.fleet import Connection, Fleet, WorkerLost
from cluster.prefix_directory import PrefixDirectory
from cluster.router import Costs, Route, RouteRequest, WorkerView, choose
from workers.messages import Failed, Landed, Prefill, Progress, Reserve, Ticketed, Tokens, Update
from workers.request import SamplingParams, TokenLogprobs

log = logging.getLogger(__name__)

MAX_RESTARTS = 6
RESTART_PAUSE_S = 0.02  # before the first restart; doubles with each
ROUTE_WAIT_S = 15.0  # how long a request waits for a routable pair before it is refused


@dataclass
class Timing:
    """Seconds; what the latency of the first two tokens is made of. After `admitted_at`: since then."""

    admitted_at: float = field(default_factory=time.monotonic)  # the whole body had been read
    queue: float = 0.0
    prefill: float = 0.0
    first_token: float = 0.0  # at the gateway
    landed: float | None = None  # the first attempt's caches, all of them
    second_token: float | None = None
    total: float = 0.0  # the end, once that has come

    @property
    def ship(self) -> float | None:
        """First token to landed. None where nothing landed."""
        return None if self.landed is None else max(0.0, self.landed - self.first_token)

    @property
    def first_decode(self) -> float | None:
        """The first step of the decode worker, as a client sees it."""
        if self.landed is None or self.second_token is None:
            return None
        return max(0.0, self.second_token - max(self.landed, self.first_token))


@dataclass
class Attempt:
    """What one pair of workers was given to do. `failure`: why another attempt had to follow, or none could."""

    id: str  # the request's id in its workers' logs
    route: Route
    failure: str | None = None


@dataclass(eq=False)
class Flight:
    """What is asked for and what has happened so far. `emitted` is the journal."""

    id: str
    prompt: list[int]
    sampling: SamplingParams
    namespace: bytes
    page_hashes: list[bytes]  # of the prompt's full pages
    pair: tuple[str, str] | None = None  # probes are pinned to one pair
    wants_progress: bool = False  # whether `fly` also tells how far the prompt has been read
    wants_selected_pages: bool = False
    emitted: list[int] = field(default_factory=list)
    finish: str | None = None
    num_quoted: int | None = None  # hit tokens promised at admission
    num_hit: int = 0  # the better of the quote and what the workers found
    num_read: int = -1  # prompt tokens that the client was told have been read
    selected_pages: list[list[int]] = field(default_factory=list)  # as the last decode worker counted them
    restarts: int = 0
    attempts: list[Attempt] = field(default_factory=list)
    timing: Timing = field(default_factory=Timing)


@dataclass(frozen=True)
class Step:
    """Newly emitted tokens."""

    tokens: list[int]
    logprobs: list[TokenLogprobs] | None


@dataclass(frozen=True)
class Reading:
    """How far the prompt has been read, in tokens: `processed` rises from one to the next, up to `total`."""

    total: int
    cache: int  # of the prompt, found in a prefix cache, as far as is known
    processed: int  # these included


class _Retry(Exception):
    """This attempt is over; another one may succeed."""


class Pilot:
    """Runs flights over a fleet."""

    def __init__(self, fleet: Fleet, costs: Costs, directory: PrefixDirectory) -> None:
        self._fleet = fleet
        self._costs = costs
        self._directory = directory
        self._numbers = itertools.count()
        self._flights: set[Flight] = set()

    @property
    def in_progress(self) -> int:
        """Requests that have not ended."""
        return len(self._flights)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens whose first token has not come yet."""
        return sum(len(flight.prompt) for flight in self._flights if not flight.emitted)

    async def fly(
        self, flight: Flight, on_quote: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Step | Reading, None]:
        """Yields tokens until flight.finish is set. Raises ApiError when the request cannot be served.

        Where flight.wants_progress, yields before the first token how far the prompt has been read. `on_quote` is called
        once, when flight.num_quoted is known.
        """
        self._flights.add(flight)
        try:
            while flight.finish is None:
                route = await self._route(flight)
                if flight.num_quoted is None:
                    flight.num_quoted = flight.num_hit = route.quote
                    on_quote()
                try:
                    async with contextlib.aclosing(self._attempt(flight, route)) as steps:
                        async for step in steps:
                            yield step
                except _Retry as reason:
                    flight.attempts[-1].failure = str(reason)
                    log.warning("%s ended: %s", flight.attempts[-1].id, reason)
                    flight.restarts += 1
                    if flight.restarts > MAX_RESTARTS:
                        raise WorkersLost(
                            f"gave up after {MAX_RESTARTS} restarts; the last: {reason}"
                        ) from None
                    await asyncio.sleep(RESTART_PAUSE_S * 2 ** (flight.restarts - 1))
        finally:
            flight.timing.total = time.monotonic() - flight.timing.admitted_at
            self._flights.discard(flight)

    async def _route(self, flight: Flight) -> Route:
        """Picks the workers, waiting a little for a pair to come (back)."""
        tokens = len(flight.prompt) + len(flight.emitted)
        deadline = time.monotonic() + ROUTE_WAIT_S
        while True:
            self._fleet.changed.clear()
            pairs = self._fleet.linked_pairs() if flight.pair else self._fleet.routable_pairs()
            names = {(p[0], d[0]) for p, d in pairs}
            route = choose(
                RouteRequest(num_tokens=tokens, hits=self._directory.lookup(flight.page_hashes)),
                prefills=[_view(c) for c in self._fleet.alive("prefill")],
                decodes=[_view(c) for c in self._fleet.alive("decode")],
                pairs=names & {flight.pair} if flight.pair else names,
                costs=self._costs,
            )
            if route is not None:
                return route
            if flight.pair or time.monotonic() > deadline:
                raise Overloaded("no prefill and decode worker are ready", retry_after_s=2)
            try:
                async with asyncio.timeout(0.25):
                    await self._fleet.changed.wait()
            except TimeoutError:
                continue

    async def _attempt(self, flight: Flight, route: Route) -> AsyncGenerator[Step | Reading, None]:
        prefill = self._fleet.connections[route.prefill]
        decode = self._fleet.connections[route.decode]
        attempt = f"{flight.id}#{next(self._numbers)}"
        flight.attempts.append(Attempt(attempt, route))
        mailbox = self._fleet.begin(attempt, frozenset({route.prefill, route.decode}))
        work = {
            "request_id": attempt,
            "tokens": flight.prompt + flight.emitted,
            "num_prompt_tokens": len(flight.prompt),
            "sampling": flight.sampling,
            "namespace": flight.namespace,
        }
        wants_progress = flight.wants_progress and not flight.emitted
        decode.send(Reserve(**work, selected_pages=flight.wants_selected_pages))  # type: ignore[arg-type]
        claims = [_Claim(worker, len(flight.prompt) + len(flight.emitted)) for worker in (prefill, decode)]
        landed = False
        held: dict[int, Tokens] = {}  # updates that came before the one they follow
        try:
            while flight.finish is None:
                match update := await mailbox.get():
                    case Ticketed(ticket=ticket):
                        self._found(flight, ticket.num_resident_tokens)
                        claims[1].release()
                        prefill.send(Prefill(ticket=ticket, progress=wants_progress, **work))  # type: ignore[arg-type]
                        if wants_progress and (reading := _read(flight, flight.num_hit)) is not None:
                            yield reading
                    case Progress():
                        self._found(flight, update.num_cached_tokens)
                        if (reading := _read(flight, update.num_computed_tokens)) is not None:
                            yield reading
                    case Tokens():
                        claims[0].release()
                        held[update.start] = update
                        while (tokens := held.pop(len(flight.emitted), None)) is not None:
                            yield self._emit(flight, tokens)
                    case Landed():
                        landed = True
                        if not flight.restarts:
                            flight.timing.landed = time.monotonic() - flight.timing.admitted_at
                    case _:
                        self._check_over(update, prefill, landed=landed)
        finally:
            for claim in claims:
                claim.release()
            self._fleet.end(attempt, abort=flight.finish is None)

    def _found(self, flight: Flight, num_cached: int) -> None:
        """Bills the better number; what an earlier attempt of the same request left behind is no hit."""
        if not flight.restarts:
            flight.num_hit = max(flight.num_hit, num_cached)

    def _emit(self, flight: Flight, update: Tokens) -> Step:
        timing = flight.timing
        if not flight.emitted:
            timing.first_token = time.monotonic() - timing.admitted_at
            timing.queue, timing.prefill = update.queued_s, update.prefill_s
            self._found(flight, update.num_cached_tokens or 0)
        elif timing.second_token is None:
            timing.second_token = time.monotonic() - timing.admitted_at
        flight.emitted.extend(update.tokens)
        flight.finish = update.finish
        flight.selected_pages = update.selected_pages or []
        return Step(update.tokens, update.logprobs)

    def _check_over(self, update: Update | WorkerLost, prefill: Connection, *, landed: bool) -> None:
        """Ends the attempt where the update says so. Once all has landed the prefill worker's fate no longer matters."""
        if isinstance(update, WorkerLost):
            if not (landed and update.worker == prefill.info.worker):
                raise _Retry(f"worker {update.worker} was lost")
        elif isinstance(update, Failed) and update.grammar:
            raise InvalidRequest(
                f"the tools or the response_format are too complex to follow: {update.reason}"
            )
        elif isinstance(update, Failed) and not landed:
            if not update.retry:
                raise ContextTooLong(update.reason)
            raise _Retry(update.reason)


def _read(flight: Flight, num_tokens: int) -> Reading | None:
    """What to tell once `num_tokens` of the prompt have been read; None where that is no news: an attempt began again."""
    num_read = max(num_tokens, flight.num_hit)
    if num_read <= flight.num_read:
        return None
    flight.num_read = num_read
    return Reading(total=len(flight.prompt), cache=flight.num_hit, processed=num_read)


class _Claim:
    """Prompt tokens sent to a worker, until its load frames must show them."""

    def __init__(self, connection: Connection, num_tokens: int) -> None:
        self._connection = connection
        self._num_tokens = num_tokens
        connection.assigned_tokens += num_tokens

    def release(self) -> None:
        self._connection.assigned_tokens -= self._num_tokens
        self._num_tokens = 0


def _view(connection: Connection) -> WorkerView:
    load = connection.load
    return WorkerView(
        worker=connection.info.worker,
        queued_tokens=max(0, load.queued_tokens - connection.assigned_tokens),  # it may show them already
        assigned_tokens=connection.assigned_tokens,
        seconds_per_token=load.seconds_per_token,
        step_seconds=load.step_seconds,
        running=load.running + load.waiting,
        available_pages=load.free_pages + load.cached_pages,
    )
