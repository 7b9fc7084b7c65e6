"""Which request gets how many tokens this step, and who waits for pages. Knows nothing of tensors, Ray, HTTP or prices.

There is no prefill phase and no decode phase: only requests whose num_computed_tokens catches up with len(tokens) under one
token budget. A request that has caught up gets one more token. Order of arrival decides everything: the oldest is
scheduled first, the most recent is preempted first. A preempted request is just a waiting one.

Life of a request:
  add      WAITING -> RUNNING once pages for all its known tokens are there -> FINISHED
  reserve  LANDING at once or not at all; `landed` for each page, `join` -> RUNNING -> FINISHED
  abort    from any state -> FINISHED
"""

from bisect import insort
from collections.abc import Collection
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from kernels.layout import PAGE_SIZE
from workers.config import EngineConfig
from workers.page_hash import page_hashes
from workers.page_pool import PagePool, pages_for
from workers.page_pools import PagePools
from workers.request import Request, Status
from workers.shares import Room, choose_rank

_by_arrival = attrgetter("arrival")


class QueueFull(ValueError):
    """max_waiting requests wait already. The same request may be accepted later, or by another worker."""


class Scheduled(NamedTuple):
    """The tokens start..start+num_tokens of a request are computed in this step; their pages are request.pages."""

    request: Request
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def samples(self) -> bool:
        """Whether the request catches up, so that its last row gives the next token. Only true until `update`."""
        return self.end == len(self.request.tokens)


class Lockstep(NamedTuple):
    """A collective needs equally much of every rank.

    num_rows, num_logits: the rows that the busiest rank computes, and of how many it wants logits
    replays:              whether all ranks replay a recorded step
    """

    num_rows: int
    num_logits: int
    replays: bool


@dataclass(frozen=True)
class Plan:
    """One step. `lockstep`: of several ranks, what all of them must do alike."""

    scheduled: list[Scheduled]
    preempted: list[Request]
    lockstep: Lockstep | None = None

    @property
    def sampling(self) -> list[Request]:
        return [item.request for item in self.scheduled if item.samples]


class Scheduler:
    """`max_context` is the most tokens of prompt and output that a request may have.

    pools: one for each rank with pages of its own. A request has pages of one rank only, chosen when it is admitted.
    """

    def __init__(
        self, pools: PagePools, config: EngineConfig, *, eos_token_ids: Collection[int], max_context: int
    ) -> None:
        self.pools = pools
        self.config = config
        self.max_context = max_context
        self._eos_token_ids = frozenset(eos_token_ids)
        self._num_arrivals = 0
        self._requests: dict[str, Request] = {}  # whatever may hold pages or wait for them
        self._waiting: list[Request] = []  # by arrival
        self._running: list[Request] = []  # by arrival
        self._missing: dict[str, set[int]] = {}  # LANDING requests: page indices that have not landed

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens that are still to be computed."""
        return sum(max(0, r.num_prompt_tokens - r.num_computed_tokens) for r in self._waiting + self._running)

    def has_work(self) -> bool:
        """Whether a step has something to do. Waiting requests that have no room are none: only an event gives them room."""
        return bool(self._running) or (bool(self._waiting) and self._find_room(self._waiting[0]))

    def check_fits(self, request: Request) -> None:
        """Raises ValueError if the request could not be served even by an empty engine."""
        num_tokens = len(request.tokens)
        if num_tokens + 1 > self.max_context:
            raise ValueError(
                f"request {request.id}: {num_tokens} tokens leave no room for an answer: "
                f"the context is {self.max_context} tokens"
            )
        # The last token sampled is never computed.
        needed = pages_for(num_tokens if request.one_token else max(num_tokens, self._limit(request) - 1))
        if needed > self.pools.num_pages:
            raise ValueError(
                f"request {request.id}: {request.num_prompt_tokens} prompt tokens and max_tokens "
                f"{request.sampling.max_tokens} need {needed} pages of {PAGE_SIZE} tokens; "
                f"there are {self.pools.num_pages}"
            )

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError if it can never be served, QueueFull if too many wait."""
        self._prepare(request)
        if len(self._waiting) >= self.config.max_waiting:
            raise QueueFull(f"request {request.id}: {len(self._waiting)} requests wait already (max_waiting)")
        self._register(request)
        insort(self._waiting, request, key=_by_arrival)

    def reserve(self, request: Request) -> bool:
        """Takes pages for all known tokens at once, for a prefill worker to fill; False if there is no room now.

        Nothing overtakes a waiting request. Raises ValueError if the request can never be served.
        """
        self._prepare(request)
        if self._waiting or not self._find_room(request):
            return False
        self._register(request)
        self._take_pages(request)
        request.status = Status.LANDING
        self._missing[request.id] = set(range(request.num_computed_tokens // PAGE_SIZE, len(request.pages)))
        return True

    def landed(self, request_id: str, page_index: int) -> None:
        """A page's bytes have arrived and were verified. Raises ValueError unless the request is LANDING.

        Full pages are published as soon as all pages before them are complete, and survive an abort as prefix cache.
        """
        request, missing = self._landing(request_id)
        missing.discard(page_index)
        complete = min(missing) if missing else len(request.pages)
        self._advance(request, min(complete, len(request.tokens) // PAGE_SIZE) * PAGE_SIZE)

    def join(self, request_id: str, first_token: int) -> str | None:
        """LANDING -> RUNNING with the token that the prefill worker sampled; the finish reason if that token is the last.

        Raises ValueError unless the request is LANDING and every page has landed.
        """
        request, missing = self._landing(request_id)
        if missing:
            raise ValueError(
                f"request {request_id}: {len(missing)} of {len(request.pages)} pages have not landed"
            )
        del self._missing[request_id]
        request.num_computed_tokens = len(request.tokens)
        request.status = Status.RUNNING
        insort(self._running, request, key=_by_arrival)
        self._append(request, first_token)
        return request.finish_reason

    def abort(self, request_id: str) -> bool:
        """Ends a request in any state; False if there is none of this id that has not ended."""
        request = self._requests.get(request_id)
        if request is None or request.status is Status.FINISHED:
            return False
        self._finish(request, "abort")
        return True

    def release(self, request_id: str) -> bool:
        """Lets go of the pages of a `hold_pages` request that has ended; False if the id is unknown."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        if request.status is not Status.FINISHED:
            raise ValueError(
                f"request {request_id} is {request.status.value}: it must end before its pages are released"
            )
        self._drop(request)
        return True

    def schedule(self) -> Plan:
        """Decides one step. `update` must follow before anything else is called."""
        budget = self.config.max_batched_tokens
        plan = Plan(scheduled=[], preempted=[])
        for request in tuple(self._running):
            if budget and request.status is Status.RUNNING and self._grow(request, plan.preempted):
                budget -= self._plan(plan, request, budget)
        while budget and self._waiting and self._find_room(self._waiting[0]):
            request = self._waiting.pop(0)
            self._take_pages(request)
            request.status = Status.RUNNING
            insort(self._running, request, key=_by_arrival)
            budget -= self._plan(plan, request, budget)
        return plan

    def update(self, plan: Plan, sampled: list[int]) -> None:
        """Books a computed plan. `sampled`: one token for each request of plan.sampling, in its order."""
        tokens = iter(sampled)
        for item in plan.scheduled:
            samples = item.samples
            self._advance(item.request, item.end)
            if samples:
                self._append(item.request, next(tokens))

    def check(self) -> None:
        """Raises RuntimeError unless pages are conserved and exactly those of live requests are held."""
        self.pools.check()
        owned = {(request.rank, page) for request in self._requests.values() for page in request.pages}
        if len(owned) != self.pools.held:
            raise RuntimeError(f"{self.pools.held} pages are held, but requests own {len(owned)}")

    def _prepare(self, request: Request) -> None:
        if request.id in self._requests:
            raise ValueError(f"request {request.id} exists already")
        if not request.tokens:
            raise ValueError(f"request {request.id} has no tokens")
        if request.hold_pages and not request.one_token:
            raise ValueError(
                f"request {request.id}: hold_pages needs one_token: held pages cannot be preempted"
            )
        self.check_fits(request)
        self._hash(request)

    def _hash(self, request: Request) -> None:
        request.hashes = page_hashes(
            request.namespace, request.tokens, request.hashes, request.num_public_pages
        )

    def _register(self, request: Request) -> None:
        request.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._requests[request.id] = request

    def _limit(self, request: Request) -> int:
        """The number of tokens at which the request ends for its length."""
        return min(request.num_prompt_tokens + request.sampling.max_tokens, self.max_context)

    def _landing(self, request_id: str) -> tuple[Request, set[int]]:
        if request_id not in self._missing:
            raise ValueError(f"request {request_id} is not landing")
        return self._requests[request_id], self._missing[request_id]

    def _hittable(self, request: Request) -> list[bytes]:
        """At least one token is always computed, because the next one is sampled from its row."""
        return request.hashes[: (len(request.tokens) - 1) // PAGE_SIZE]

    def _pool(self, request: Request) -> PagePool:
        return self.pools[request.rank]

    def _find_room(self, request: Request) -> bool:
        """Gives the request the best rank that has room for it; False if none has."""
        others = self._running + [self._requests[request_id] for request_id in self._missing]
        if len(others) >= self.config.max_running:
            return False
        rooms = [room for rank in range(len(self.pools)) if (room := self._room(request, rank, others))]
        if rooms:
            request.rank = choose_rank(rooms)
        return bool(rooms)

    def _room(self, request: Request, rank: int, others: list[Request]) -> Room | None:
        """None unless there are pages for all known tokens, and one to spare for each request that grows: else they would be
        preempted at once by each other."""
        pool, here = self.pools[rank], [other for other in others if other.rank == rank]
        hashes, needed = self._hittable(request), pages_for(len(request.tokens))
        if not pool.fits(hashes, needed + sum(not other.one_token for other in here)):
            return None
        return Room(rank, pool.count_hits(hashes), pool.free + pool.cached, len(here))

    def _take_pages(self, request: Request) -> None:
        request.pages = self._pool(request).acquire(self._hittable(request))
        request.num_computed_tokens = PAGE_SIZE * len(request.pages)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens
        fresh = self._pool(request).allocate(pages_for(len(request.tokens)) - len(request.pages))
        assert fresh is not None, "_take_pages without _find_room"
        request.pages += fresh

    def _grow(self, request: Request, preempted: list[Request]) -> bool:
        """Gives a running request the page its last token needs; False if it had to give up its own pages instead."""
        if len(request.tokens) <= PAGE_SIZE * len(request.pages):
            return True
        while (page := self._pool(request).allocate(1)) is None:
            # A shipment may be reading held pages. `request` itself holds none, because it grows.
            victim = next(
                other
                for other in reversed(self._running)
                if other.rank == request.rank and not other.hold_pages
            )
            self._preempt(victim)
            preempted.append(victim)
            if victim is request:
                return False
        request.pages += page
        return True

    def _preempt(self, request: Request) -> None:
        self._running.remove(request)
        self._pool(request).release(request.pages)
        request.pages = []
        request.num_computed_tokens = 0
        request.status = Status.WAITING
        insort(self._waiting, request, key=_by_arrival)

    def _plan(self, plan: Plan, request: Request, budget: int) -> int:
        start = request.num_computed_tokens
        num_tokens = min(budget, len(request.tokens) - start)
        plan.scheduled.append(Scheduled(request, start, num_tokens))
        return num_tokens

    def _advance(self, request: Request, num_computed_tokens: int) -> None:
        """Publishes what has become full."""
        first, end = request.num_computed_tokens // PAGE_SIZE, num_computed_tokens // PAGE_SIZE
        request.num_computed_tokens = num_computed_tokens
        if end > len(request.hashes):
            self._hash(request)
        for index in range(first, end):
            self._pool(request).publish(request.pages[index], request.hashes[index])

    def _append(self, request: Request, token: int) -> None:
        request.tokens.append(token)
        stops = request.sampling.stop_token_ids
        if token in stops or (token in self._eos_token_ids and request.sampling.eos_ends):
            self._finish(request, "stop")
        elif len(request.tokens) >= self._limit(request):
            self._finish(request, "length")
        elif request.one_token:
            self._finish(request, "prefilled")

    def _finish(self, request: Request, reason: str) -> None:
        if request.status is Status.WAITING:
            self._waiting.remove(request)
        elif request.status is Status.RUNNING:
            self._running.remove(request)
        self._missing.pop(request.id, None)
        request.status = Status.FINISHED
        request.finish_reason = reason
        if not request.hold_pages:
            self._drop(request)

    def _drop(self, request: Request) -> None:
        self._pool(request).release(request.pages)
        request.pages = []
        del self._requests[request.id]
