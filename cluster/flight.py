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

from cluster.course import Claim, Course, Place, view_of
from cluster.errors import ContextTooLong, DeadlineExceeded, InvalidRequest, Overloaded, WorkersLost
from cluster.fleet import Connection, DeadlinePassed, Fleet, Note, WorkerLost
from cluster.gate import Gate, have_room
from cluster.prefix_directory import PrefixDirectory
from cluster.router import Costs, Route, RouteRequest, choose
from kernels.layout import PAGE_SIZE
from workers.messages import Failed, Landed, Prefill, Progress, Reserve, Ticketed, Tokens
from workers.request import SamplingParams, TokenLogprobs

log = logging.getLogger(__name__)

MAX_RESTARTS = 6
RESTART_PAUSE_S = 0.02  # before the first restart; doubles with each
ROUTE_WAIT_S = 15.0  # how long a request waits for a routable pair before it is refused
ROUTE_PAUSE_S = 0.05  # between two looks for one


@dataclass
class Timing:
    """Seconds; what the latency of the first two tokens is made of. After `admitted_at`: since then."""

    admitted_at: float = field(default_factory=time.monotonic)  # the whole body had been read
    waited: float = 0.0  # at the gate
    queue: float = 0.0  # this included, and at the prefill worker before its first step
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
    num_public_pages: int = 0  # leading ones that are the same in every namespace
    flow: str = ""  # flights of one flow wait for each other, and flows take turns
    deadline: float | None = None  # of the event loop's clock
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
        self._gate: Gate[Flight, Course] = Gate(self._admit, Course.release)
        self._looked_at = 0.0
        self._paired_at = time.monotonic()  # when there was a routable pair, as far as somebody looked
        fleet.on_frame = self._gate.look_soon

    @property
    def in_progress(self) -> int:
        """Requests that have not ended."""
        return len(self._flights)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens whose first token has not come yet."""
        return sum(len(flight.prompt) for flight in self._flights if not flight.emitted)

    @property
    def uncomputed_tokens(self) -> int:
        """Of the queued tokens, those that no worker holds."""
        return sum(self._num_missing(flight) for flight in self._flights if not flight.emitted)

    async def fly(
        self, flight: Flight, on_quote: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Step | Reading, None]:
        """Yields tokens until flight.finish is set. Raises ApiError when the request cannot be served.

        Where flight.wants_progress, yields before the first token how far the prompt has been read. `on_quote` is called
        once, when flight.num_quoted is known.
        """
        self._flights.add(flight)
        begun = time.monotonic()
        try:
            while flight.finish is None:
                course = await self._course(flight)
                if flight.num_quoted is None:
                    flight.timing.waited = time.monotonic() - begun
                    flight.num_quoted = flight.num_hit = course.route.quote
                    on_quote()
                try:
                    async with contextlib.aclosing(self._attempt(flight, course)) as steps:
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
            self._gate.look()

    async def _course(self, flight: Flight) -> Course:
        """Picks the workers once they have use for the flight, waiting a little for a pair to come (back).

        Probes do not queue, and neither does a flight that lost its workers: it has had its turn.
        """
        try:
            async with asyncio.timeout_at(flight.deadline):
                if flight.pair is None and not flight.restarts:
                    cost = max(PAGE_SIZE, self._num_missing(flight))
                    return await self._gate.wait(flight.flow, cost, flight, give_up=self._give_up)
                since = time.monotonic()
                while (course := self._route(flight)) is None:
                    if flight.pair is not None:
                        raise Overloaded("these two workers are not ready", retry_after_s=2)
                    self._give_up(time.monotonic() - since)
                    await asyncio.sleep(ROUTE_PAUSE_S)
                return course
        except TimeoutError:
            raise _too_late() from None

    def _give_up(self, waited_s: float) -> None:
        """Raises Overloaded where there has been no pair for too long."""
        now = time.monotonic()
        if (
            now >= self._looked_at + ROUTE_PAUSE_S
        ):  # for all that wait: there may be many pairs to look through
            self._looked_at = now
            if self._fleet.routable_pairs():
                self._paired_at = now
        if min(waited_s, now - self._paired_at) > ROUTE_WAIT_S:
            raise Overloaded("no prefill and decode worker are ready", retry_after_s=2)

    def _admit(self, flight: Flight) -> Course | None:
        """The gate's question: workers for a flight, if they would otherwise soon be idle."""
        proven = {key for pair in self._fleet.proven for key in pair}
        is_due = have_room(
            len(flight.prompt),
            prefills=[view_of(c) for c in self._fleet.taking("prefill") if c.key in proven],
            decodes=[view_of(c) for c in self._fleet.taking("decode") if c.key in proven],
        )
        return self._route(flight) if is_due else None

    def _route(self, flight: Flight) -> Course | None:
        """Picks the workers; None where no pair is ready. What they are given to do counts from now on."""
        num_tokens = len(flight.prompt) + len(flight.emitted)
        pairs = self._fleet.linked_pairs() if flight.pair else self._fleet.routable_pairs()
        names = {(p[0], d[0]) for p, d in pairs}
        route = choose(
            RouteRequest(num_tokens=num_tokens, hits=self._directory.lookup(flight.page_hashes)),
            prefills=[view_of(c) for c in self._fleet.taking("prefill")],
            decodes=[view_of(c) for c in self._fleet.taking("decode")],
            pairs=names & {flight.pair} if flight.pair else names,
            costs=self._costs,
        )
        if route is None:
            return None
        prefill, decode = self._fleet.connections[route.prefill], self._fleet.connections[route.decode]
        num_missing = num_tokens - route.alternatives[0].prefill_hit_tokens
        return Course(
            route=route,
            prefill=prefill,
            decode=decode,
            reading=Claim(prefill, max(PAGE_SIZE, num_missing)),
            pages=Claim(decode, num_tokens),
            place=Place(decode),
        )

    def _num_missing(self, flight: Flight) -> int:
        """Tokens of the prompt that no worker holds."""
        most_pages = max(self._directory.lookup(flight.page_hashes).values(), default=0)
        return len(flight.prompt) - PAGE_SIZE * most_pages

    async def _attempt(self, flight: Flight, course: Course) -> AsyncGenerator[Step | Reading, None]:
        prefill, decode = course.prefill, course.decode
        attempt = f"{flight.id}#{next(self._numbers)}"
        flight.attempts.append(Attempt(attempt, course.route))
        mailbox = self._fleet.begin(attempt, frozenset({course.route.prefill, course.route.decode}))
        work = {
            "request_id": attempt,
            "tokens": flight.prompt + flight.emitted,
            "num_prompt_tokens": len(flight.prompt),
            "sampling": flight.sampling,
            "namespace": flight.namespace,
            "num_public_pages": flight.num_public_pages,
        }
        wants_progress = flight.wants_progress and not flight.emitted
        decode.send(Reserve(**work, selected_pages=flight.wants_selected_pages))  # type: ignore[arg-type]
        landed = False
        held: dict[int, Tokens] = {}  # updates that came before the one they follow
        timer = self._timer(flight, attempt)
        try:
            while flight.finish is None:
                match update := await mailbox.get():
                    case Ticketed(ticket=ticket):
                        self._found(flight, ticket.num_resident_tokens)
                        self._done(course.pages)
                        prefill.send(Prefill(ticket=ticket, progress=wants_progress, **work))  # type: ignore[arg-type]
                        if wants_progress and (reading := _read(flight, flight.num_hit)) is not None:
                            yield reading
                    case Progress():
                        self._found(flight, update.num_cached_tokens)
                        if (reading := _read(flight, update.num_computed_tokens)) is not None:
                            yield reading
                    case Tokens():
                        self._done(course.reading)
                        held[update.start] = update
                        while (tokens := held.pop(len(flight.emitted), None)) is not None:
                            yield self._emit(flight, tokens)
                    case Landed():
                        landed = True
                        self._done(course.place)
                        if not flight.restarts:
                            flight.timing.landed = time.monotonic() - flight.timing.admitted_at
                    case _:
                        self._check_over(update, prefill, landed=landed)
        finally:
            if timer is not None:
                timer.cancel()
            course.release()
            self._fleet.end(attempt, abort=flight.finish is None)

    def _done(self, claim: Claim | Place) -> None:
        """The workers' loads show it by now, and there may be room for others."""
        if claim.held:
            claim.release()
            self._gate.look()

    def _timer(self, flight: Flight, attempt: str) -> asyncio.TimerHandle | None:
        """Ends the attempt at the flight's deadline, even while its client does not read."""
        if flight.deadline is None:
            return None
        return asyncio.get_running_loop().call_at(flight.deadline, self._fleet.expire, attempt)

    def _found(self, flight: Flight, num_cached: int) -> None:
        """Bills the better number; what an earlier attempt of the same request left behind is no hit."""
        if not flight.restarts:
            flight.num_hit = max(flight.num_hit, num_cached)

    def _emit(self, flight: Flight, update: Tokens) -> Step:
        timing = flight.timing
        if not flight.emitted:
            timing.first_token = time.monotonic() - timing.admitted_at
            timing.queue, timing.prefill = timing.waited + update.queued_s, update.prefill_s
            self._found(flight, update.num_cached_tokens or 0)
        flight.emitted.extend(update.tokens)
        if timing.second_token is None and len(flight.emitted) > 1:
            timing.second_token = time.monotonic() - timing.admitted_at
            if timing.landed is not None:  # told together with the first step, which says how long it took
                timing.landed = min(timing.landed, timing.second_token - update.decode_s)
        flight.finish = update.finish
        if flight.pair is None:
            self._gate.charge(flight.flow, len(update.tokens))
        flight.selected_pages = update.selected_pages or []
        return Step(update.tokens, update.logprobs)

    def _check_over(self, update: Note, prefill: Connection, *, landed: bool) -> None:
        """Ends the attempt where the update says so. Once all has landed the prefill worker's fate no longer matters."""
        if isinstance(update, DeadlinePassed):
            raise _too_late()
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


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("the request's time was up before its answer was whole")
