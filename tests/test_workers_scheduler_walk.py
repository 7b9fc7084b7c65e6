"""A random walk of the scheduler in a tiny pool, against a memory that remembers what was written into each slot."""

import zlib
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.config import EngineConfig
from workers.page_pool import PagePool
from workers.page_pools import PagePools
from workers.request import Request, SamplingParams, Status
from workers.scheduler import Plan, QueueFull, Scheduler

EOS = 1
NUM_PAGES, MAX_RUNNING, MAX_WAITING, MAX_CONTEXT = 6, 4, 6, 380
BASES = {"a": 0, "aa": 100, "b": 300}  # prompts of "a" and "aa" share their first 100 tokens


def prompt(name: str, length: int) -> list[int]:
    shared = BASES[name] or 1000
    return [(3 if i < shared else 5) * i % 1009 + 10 * (name == "b") for i in range(length)]


def contents(namespace: bytes, tokens: list[int]) -> list[int]:
    """What the cache must hold for each token: everything up to it."""
    value, result = zlib.crc32(namespace), []
    for token in tokens:
        value = hash((value, token))
        result.append(value)
    return result


def next_token(content: int) -> int:
    return content % 211  # EOS now and then


def expected_tokens(request: Request, original: list[int]) -> list[int]:
    tokens = list(original)
    while True:
        tokens.append(next_token(contents(request.namespace, tokens)[-1]))
        num_output = len(tokens) - request.num_prompt_tokens
        ends = tokens[-1] == EOS or num_output >= request.sampling.max_tokens or len(tokens) >= MAX_CONTEXT
        if ends or request.one_token:
            return tokens


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(budget=st.sampled_from([1, 7, 64, 100, 1000]))
    def start(self, budget: int) -> None:
        config = EngineConfig(max_batched_tokens=budget, max_running=MAX_RUNNING, max_waiting=MAX_WAITING)
        self.scheduler = Scheduler(
            PagePools([PagePool(NUM_PAGES)]), config, eos_token_ids=[EOS], max_context=MAX_CONTEXT
        )
        self.memory = [0] * (64 * NUM_PAGES)
        self.requests: list[tuple[Request, list[int]]] = []
        self.queued: set[int] = set()  # arrivals that were added and have not been scheduled yet

    def make(
        self, name: str, length: int, max_tokens: int, namespace: bytes, one_token: bool, hold: bool
    ) -> Request:
        return Request(
            f"r{len(self.requests)}",
            prompt(name, length),
            length,
            SamplingParams(max_tokens=max_tokens),
            namespace,
            one_token=one_token or hold,
            hold_pages=hold,
        )

    fields: dict[str, st.SearchStrategy[Any]] = {
        "name": st.sampled_from(list(BASES)),
        "length": st.sampled_from([1, 60, 63, 64, 65, 100, 130, 192, 193, 250]),
        "max_tokens": st.sampled_from([1, 5, 70, 100, 200]),
        "namespace": st.sampled_from([b"x", b"x", b"y"]),
        "one_token": st.sampled_from([False, False, False, True]),
        "hold": st.sampled_from([False, False, False, True]),
    }

    @rule(batch=st.lists(st.fixed_dictionaries(fields), min_size=1, max_size=4))
    def add(self, batch: list[dict[str, Any]]) -> None:
        for fields in batch:
            request = self.make(**fields)
            original = list(request.tokens)
            try:
                self.scheduler.add(request)
            except QueueFull:
                assert self.scheduler.num_waiting >= MAX_WAITING
            else:
                self.requests.append((request, original))
                self.queued.add(request.arrival)

    @rule(fields=st.fixed_dictionaries(fields))
    def reserve(self, fields: dict[str, Any]) -> None:
        request = self.make(**{**fields, "one_token": False, "hold": False})
        original = list(request.tokens)
        if self.scheduler.reserve(request):
            assert len(request.pages) == -(-len(original) // 64)
            self.check_contents(request, request.num_computed_tokens)
            self.requests.append((request, original))

    def having(self, *statuses: Status) -> list[Request]:
        return [request for request, _ in self.requests if request.status in statuses]

    @precondition(lambda self: bool(self.having(Status.LANDING)))
    @rule(data=st.data())
    def land_and_join(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.having(Status.LANDING)))
        missing = sorted(self.scheduler._missing[request.id])
        for index in data.draw(st.permutations(missing))[: data.draw(st.integers(0, len(missing) + 3))]:
            self.land(request, index)
        if not self.scheduler._missing[request.id]:
            self.join(request)

    def land(self, request: Request, index: int) -> None:
        values = contents(request.namespace, request.tokens)[64 * index : 64 * index + 64]
        slot = 64 * request.pages[index]
        self.memory[slot : slot + len(values)] = values
        self.scheduler.landed(request.id, index)

    def join(self, request: Request) -> None:
        self.check_contents(request, len(request.tokens))
        self.scheduler.join(request.id, next_token(contents(request.namespace, request.tokens)[-1]))

    @precondition(lambda self: bool(self.requests))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request, _ = data.draw(st.sampled_from(self.requests))
        alive = request.status is not Status.FINISHED
        assert self.scheduler.abort(request.id) == alive
        self.queued.discard(request.arrival)
        assert request.status is Status.FINISHED

    @precondition(lambda self: not all(r.hold_pages for r in self.having(Status.RUNNING)))
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        """As if pages had run out, which they do far too seldom for a test."""
        victims = [r for r in self.having(Status.RUNNING) if not r.hold_pages]
        self.scheduler._preempt(data.draw(st.sampled_from(victims)))

    @precondition(lambda self: bool(self.having(Status.FINISHED)))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.having(Status.FINISHED)))
        assert self.scheduler.release(request.id) <= request.hold_pages
        assert not request.pages

    @rule(n=st.integers(1, 30))
    def steps(self, n: int) -> None:
        for _ in range(n):
            if self.scheduler.has_work():
                self.step()

    def step(self) -> None:
        running = list(self.scheduler._running)
        plan = self.scheduler.schedule()
        self.check_plan(plan, running)
        for item in plan.scheduled:
            self.check_contents(item.request, item.start)
            values = contents(item.request.namespace, item.request.tokens)
            for position in range(item.start, item.end):
                self.memory[64 * item.request.pages[position // 64] + position % 64] = values[position]
        sampled = [next_token(contents(r.namespace, r.tokens)[-1]) for r in plan.sampling]
        self.scheduler.update(plan, sampled)

    def check_plan(self, plan: Plan, running: list[Request]) -> None:
        assert plan.scheduled or plan.preempted, "has_work, and yet nothing to do"
        assert sum(item.num_tokens for item in plan.scheduled) <= self.scheduler.config.max_batched_tokens
        assert len({item.request.id for item in plan.scheduled}) == len(plan.scheduled)
        for item in plan.scheduled:
            assert item.num_tokens > 0
            assert item.start == item.request.num_computed_tokens
            assert item.end <= min(len(item.request.tokens), 64 * len(item.request.pages))
        if running and running[0] not in plan.preempted:
            assert plan.scheduled[0].request is running[0], "the oldest goes on"
        assert not any(request.hold_pages for request in plan.preempted)
        for item in plan.scheduled:
            arrival = item.request.arrival
            if arrival in self.queued:
                assert arrival == min(self.queued), "a later arrival has overtaken it"
                self.queued.remove(arrival)

    def check_contents(self, request: Request, num_tokens: int) -> None:
        values = contents(request.namespace, request.tokens)
        for position in range(num_tokens):
            assert self.memory[64 * request.pages[position // 64] + position % 64] == values[position]

    @invariant()
    def pages_are_conserved(self) -> None:
        self.scheduler.check()
        assert self.scheduler.num_running + len(self.having(Status.LANDING)) <= MAX_RUNNING

    @invariant()
    def finished_requests_have_the_right_tokens(self) -> None:
        for request, original in self.requests:
            if request.status is Status.FINISHED and request.finish_reason != "abort":
                assert request.tokens == expected_tokens(request, original)

    def teardown(self) -> None:
        for request in self.having(Status.LANDING):
            for index in sorted(self.scheduler._missing[request.id]):
                self.land(request, index)
            self.join(request)
        for _ in range(20_000):
            for request in self.having(Status.FINISHED):
                self.scheduler.release(request.id)
            if not self.scheduler.has_work():
                break
            self.step()
        assert all(request.status is Status.FINISHED for request, _ in self.requests)
        self.finished_requests_have_the_right_tokens()
        self.scheduler.check()
        assert self.scheduler.pools.held == 0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=80, stateful_step_count=25)
