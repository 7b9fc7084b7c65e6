"""The scheduler with a pool, without a model: what is planned, in which order, and that pages come back."""

from typing import Any

import pytest

from workers.config import EngineConfig
from workers.page_pool import PagePool
from workers.page_pools import PagePools
from workers.request import Request, SamplingParams, Status
from workers.scheduler import QueueFull, Scheduler

EOS, STOP = 1, 2


def make_scheduler(num_pages: int = 8, *, max_context: int = 10_000, **config: Any) -> Scheduler:
    return Scheduler(
        PagePools([PagePool(num_pages)]), EngineConfig(**config), eos_token_ids=[EOS], max_context=max_context
    )


def make_request(
    request_id: str, num_tokens: int, *, first: int = 100, max_tokens: int = 4, **fields: Any
) -> Request:
    sampling = {name: fields.pop(name) for name in list(fields) if name in SamplingParams.__struct_fields__}
    return Request(
        id=request_id,
        tokens=list(range(first, first + num_tokens)),
        num_prompt_tokens=fields.pop("num_prompt_tokens", num_tokens),
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        namespace=fields.pop("namespace", b"tenant"),
        **fields,
    )


def step(scheduler: Scheduler, token: int = 9) -> list[tuple[str, int, int]]:
    """One step in which every request samples `token`. Returns (request id, start, end) of what was computed."""
    plan = scheduler.schedule()
    scheduler.update(plan, [token] * len(plan.sampling))
    return [(item.request.id, item.start, item.end) for item in plan.scheduled]


def run(scheduler: Scheduler, token: int = 9) -> list[list[tuple[str, int, int]]]:
    steps = []
    while scheduler.has_work():
        steps.append(step(scheduler, token))
    return steps


def test_a_prompt_is_computed_in_chunks_then_token_by_token() -> None:
    scheduler = make_scheduler(max_batched_tokens=100)
    scheduler.add(make_request("a", 150, max_tokens=3))
    assert run(scheduler) == [[("a", 0, 100)], [("a", 100, 150)], [("a", 150, 151)], [("a", 151, 152)]]


def test_the_budget_goes_to_the_oldest_first() -> None:
    scheduler = make_scheduler(max_batched_tokens=100)
    scheduler.add(make_request("a", 70))
    scheduler.add(make_request("b", 50, first=500))
    scheduler.add(make_request("c", 50, first=900))
    assert step(scheduler) == [("a", 0, 70), ("b", 0, 30)]
    assert step(scheduler) == [("a", 70, 71), ("b", 30, 50), ("c", 0, 50)]
    assert step(scheduler) == [("a", 71, 72), ("b", 50, 51), ("c", 50, 51)]


def test_nobody_overtakes_a_request_that_waits_for_pages() -> None:
    scheduler = make_scheduler(4)
    scheduler.add(make_request("a", 130, max_tokens=10))
    step(scheduler)
    scheduler.add(make_request("large", 100, first=500))
    scheduler.add(make_request("small", 10, first=900))
    assert step(scheduler) == [("a", 130, 131)]
    scheduler.abort("a")
    assert step(scheduler) == [("large", 0, 100), ("small", 0, 10)]


def test_a_prompt_waits_until_all_of_it_has_pages() -> None:
    scheduler = make_scheduler(4, max_batched_tokens=64)
    scheduler.add(make_request("a", 128, max_tokens=2, one_token=True))
    scheduler.add(make_request("b", 192, first=500, max_tokens=2, one_token=True))
    assert run(scheduler) == [
        [("a", 0, 64)],
        [("a", 64, 128)],
        [("b", 0, 64)],
        [("b", 64, 128)],
        [("b", 128, 192)],
    ]


@pytest.mark.parametrize(
    ("num_tokens", "hit"), [(63, 0), (64, 0), (65, 64), (128, 64), (129, 128), (200, 192)]
)
def test_a_hit_is_whole_pages_and_leaves_a_token_to_compute(num_tokens: int, hit: int) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("first", 200, max_tokens=1))
    run(scheduler)
    again = make_request("again", num_tokens, max_tokens=1)
    scheduler.add(again)
    assert run(scheduler) == [[("again", hit, num_tokens)]]
    assert again.num_cached_tokens == hit


def test_a_hit_stays_within_a_namespace() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("first", 200, max_tokens=1))
    run(scheduler)
    scheduler.add(make_request("other", 200, max_tokens=1, namespace=b"another tenant"))
    assert run(scheduler) == [[("other", 0, 200)]]


def test_generated_tokens_become_prefix_cache() -> None:
    scheduler = make_scheduler()
    first = make_request("first", 100, max_tokens=29)
    scheduler.add(first)
    run(scheduler)
    assert len(first.tokens) == 129
    follow_up = make_request("next turn", 0, max_tokens=1, num_prompt_tokens=130)
    follow_up.tokens = [*first.tokens, 77]
    scheduler.add(follow_up)
    assert run(scheduler) == [[("next turn", 128, 130)]]


def test_the_most_recent_is_preempted_and_resumes_from_the_prefix_cache() -> None:
    scheduler = make_scheduler(4)
    old, recent = make_request("old", 64, max_tokens=80), make_request("recent", 63, first=500, max_tokens=80)
    scheduler.add(old)
    scheduler.add(recent)
    while not (plan := scheduler.schedule()).preempted:
        scheduler.update(plan, [9] * len(plan.sampling))
    assert plan.preempted == [recent]
    assert [item.request.id for item in plan.scheduled] == ["old"]
    assert (recent.status, recent.pages, recent.num_computed_tokens) == (Status.WAITING, [], 0)
    scheduler.update(plan, [9])
    known = len(recent.tokens)
    assert known > 64
    scheduler.add(make_request("late", 10, first=900))
    steps = run(scheduler)
    resumed = next(items for items in steps if any(name == "recent" for name, _, _ in items))
    assert ("recent", 64, known) in resumed
    assert recent.num_cached_tokens == 0, "its own recomputed tokens are not a hit"
    assert len(recent.tokens) == 63 + 80


def test_a_preempted_request_waits_before_later_arrivals() -> None:
    scheduler = make_scheduler(4, max_running=2)
    for name, first in [("old", 100), ("recent", 500), ("late", 900)]:
        scheduler.add(make_request(name, 63, first=first, max_tokens=80))
    while not (plan := scheduler.schedule()).preempted:
        scheduler.update(plan, [9] * len(plan.sampling))
    scheduler.update(plan, [9] * len(plan.sampling))
    steps = [[name for name, _, _ in items] for items in run(scheduler)]
    assert next(names for names in steps if "old" not in names)[0] == "recent"


def test_nobody_overtakes_a_waiting_request_by_reserving() -> None:
    scheduler = make_scheduler(4)
    assert scheduler.reserve(make_request("landing", 120))
    scheduler.add(make_request("large", 120, first=500))
    assert not scheduler.reserve(make_request("small", 10, first=900))
    scheduler.abort("large")
    assert scheduler.reserve(make_request("small", 10, first=900))


def test_a_joined_request_keeps_its_place() -> None:
    scheduler = make_scheduler()
    for name in "ac":
        assert scheduler.reserve(make_request(name, 10))
        if name == "a":
            scheduler.add(make_request("b", 10, first=500))
            step(scheduler)
    for name in "ca":
        scheduler.landed(name, 0)
        scheduler.join(name, 9)
    assert step(scheduler) == [("a", 10, 11), ("b", 10, 11), ("c", 10, 11)]


def test_a_request_may_preempt_itself() -> None:
    scheduler = make_scheduler(3)
    held = make_request("held", 100, max_tokens=1, one_token=True, hold_pages=True)
    growing = make_request("growing", 62, first=500, max_tokens=5)
    scheduler.add(held)
    scheduler.add(growing)
    assert run(scheduler)[-2:] == [[("growing", 63, 64)], []]
    assert growing.status is Status.WAITING
    assert not scheduler.has_work()
    scheduler.release("held")
    run(scheduler)
    assert growing.finish_reason == "length"


def test_pages_that_a_shipment_reads_are_never_preempted() -> None:
    scheduler = make_scheduler(4, max_batched_tokens=2)
    growing = make_request("growing", 2, max_tokens=150)
    shipping = make_request("shipping", 128, first=500, one_token=True, hold_pages=True)
    scheduler.add(growing)
    step(scheduler)
    scheduler.add(shipping)
    step(scheduler)
    pages, preempted = list(shipping.pages), []
    while shipping.finish_reason is None:
        plan = scheduler.schedule()
        scheduler.update(plan, [9] * len(plan.sampling))
        preempted += plan.preempted
        assert shipping.pages == pages
    assert preempted == [growing]


def test_admission_leaves_a_page_for_each_request_that_grows() -> None:
    scheduler = make_scheduler(4)
    scheduler.add(make_request("a", 64))
    scheduler.add(make_request("b", 128, first=500))
    scheduler.add(make_request("c", 64, first=900))
    assert step(scheduler) == [("a", 0, 64), ("b", 0, 128)]
    assert not scheduler.reserve(make_request("d", 10, first=1300))
    scheduler.abort("c")
    assert not scheduler.reserve(make_request("d", 10, first=1300))
    scheduler.abort("b")
    assert scheduler.reserve(make_request("d", 10, first=1300))


def test_max_running_counts_landing_requests() -> None:
    scheduler = make_scheduler(20, max_running=2)
    assert scheduler.reserve(make_request("a", 10))
    assert scheduler.reserve(make_request("b", 10))
    assert not scheduler.reserve(make_request("c", 10))
    scheduler.add(make_request("d", 10))
    assert not scheduler.has_work()
    scheduler.abort("a")
    assert step(scheduler) == [("d", 0, 10)]


@pytest.mark.parametrize(
    ("fields", "tokens", "reason"),
    [
        ({"max_tokens": 3}, [9, 9, 9], "length"),
        ({"max_tokens": 3}, [9, EOS], "stop"),
        ({"max_tokens": 3}, [9, 9, EOS], "stop"),
        ({"max_tokens": 3, "ignore_eos": True}, [EOS, EOS, EOS], "length"),
        ({"max_tokens": 3, "stop_token_ids": (STOP,)}, [STOP], "stop"),
        ({"max_tokens": 3, "stop_token_ids": (STOP,), "ignore_eos": True}, [EOS, STOP], "stop"),
        ({"max_tokens": 100}, [9, 9], "length"),
        ({"max_tokens": 3, "one_token": True}, [9], "prefilled"),
        ({"max_tokens": 3, "one_token": True}, [EOS], "stop"),
        ({"max_tokens": 1, "one_token": True}, [9], "length"),
        ({"max_tokens": 3, "num_prompt_tokens": 8}, [9], "length"),
    ],
)
def test_how_a_request_ends(fields: dict[str, Any], tokens: list[int], reason: str) -> None:
    scheduler = make_scheduler(max_context=12 if fields["max_tokens"] == 100 else 1000)
    request = make_request("a", 10, **fields)
    scheduler.add(request)
    for token in tokens:
        assert request.finish_reason is None
        step(scheduler, token)
    assert (request.finish_reason, request.tokens[10:]) == (reason, tokens)
    assert (request.status, request.pages, scheduler.has_work()) == (Status.FINISHED, [], False)
    scheduler.check()


@pytest.mark.parametrize("end", ["finish", "abort while running", "abort while waiting"])
def test_held_pages_stay_until_released(end: str) -> None:
    scheduler = make_scheduler()
    request = make_request("a", 100, hold_pages=True, one_token=True)
    scheduler.add(request)
    if end == "finish":
        step(scheduler)
    elif end == "abort while running":
        scheduler.schedule()
        with pytest.raises(ValueError, match="a is running: it must end"):
            scheduler.release("a")
        assert scheduler.abort("a")
    else:
        assert scheduler.abort("a")
    pages = 0 if end == "abort while waiting" else 2
    assert (request.status, len(request.pages), scheduler.pools.held) == (Status.FINISHED, pages, pages)
    assert not scheduler.abort("a")
    scheduler.check()
    assert scheduler.release("a")
    assert scheduler.pools.held == 0
    assert not scheduler.release("a")


def test_landed_pages_are_published_in_order_and_survive_an_abort() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 200)
    assert scheduler.reserve(request)
    assert (request.status, len(request.pages), request.num_cached_tokens) == (Status.LANDING, 4, 0)
    assert not scheduler.has_work()
    for index, num_published in [(2, 0), (0, 1), (3, 1)]:
        scheduler.landed("a", index)
        assert len(scheduler.pools.published()) == num_published
    with pytest.raises(ValueError, match="1 of 4 pages have not landed"):
        scheduler.join("a", 9)
    scheduler.landed("a", 1)
    assert scheduler.pools.published() == request.hashes
    assert scheduler.abort("a")
    again = make_request("again", 200)
    assert scheduler.reserve(again)
    assert again.num_cached_tokens == again.num_computed_tokens == 192
    scheduler.landed("again", 3)
    assert scheduler.join("again", 9) is None
    assert step(scheduler) == [("again", 200, 201)]


def test_pages_that_landed_after_a_gap_do_not_survive_an_abort() -> None:
    scheduler = make_scheduler()
    scheduler.reserve(make_request("a", 200))
    scheduler.landed("a", 0)
    scheduler.landed("a", 2)
    scheduler.abort("a")
    assert (scheduler.pools.cached, scheduler.pools.free) == (1, 7)


@pytest.mark.parametrize(
    ("token", "max_tokens", "reason"), [(EOS, 4, "stop"), (9, 1, "length"), (9, 2, None)]
)
def test_join_with_a_token_that_may_be_the_last(token: int, max_tokens: int, reason: str | None) -> None:
    scheduler = make_scheduler()
    request = make_request("a", 64, max_tokens=max_tokens)
    scheduler.reserve(request)
    scheduler.landed("a", 0)
    assert scheduler.join("a", token) == request.finish_reason == reason
    assert request.tokens[64:] == [token]
    assert scheduler.pools.held == (0 if reason else 1)


def test_only_a_landing_request_lands_and_joins() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 10))
    with pytest.raises(ValueError, match="a is not landing"):
        scheduler.landed("a", 0)
    with pytest.raises(ValueError, match="b is not landing"):
        scheduler.join("b", 9)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            make_request("a", 100, max_tokens=158),
            "100 prompt tokens and max_tokens 158 need 5 pages .* there are 4",
        ),
        (make_request("a", 257, one_token=True), "need 5 pages"),
        (make_request("a", 300), "300 tokens leave no room for an answer: the context is 300"),
        (make_request("a", 0), "has no tokens"),
        (make_request("a", 10, hold_pages=True), "hold_pages needs one_token"),
        (make_request("twin", 10), "exists already"),
    ],
)
def test_what_can_never_be_served_is_refused(request_: Request, message: str) -> None:
    scheduler = make_scheduler(4, max_context=300)
    scheduler.add(make_request("twin", 10))
    for refuse in (scheduler.add, scheduler.reserve):
        with pytest.raises(ValueError, match=message):
            refuse(request_)
    assert (scheduler.num_waiting, scheduler.pools.held) == (1, 0)


@pytest.mark.parametrize(
    "request_",
    [
        make_request("a", 100, max_tokens=157),
        make_request("a", 256, one_token=True, max_tokens=1000),
        make_request("a", 120, max_tokens=10_000),
    ],
)
def test_what_just_fits_is_served(request_: Request) -> None:
    scheduler = make_scheduler(4, max_context=257)
    scheduler.add(request_)
    run(scheduler)
    assert request_.finish_reason in ("length", "prefilled")


def test_a_full_queue_refuses() -> None:
    scheduler = make_scheduler(max_waiting=2)
    for name in "ab":
        scheduler.add(make_request(name, 10))
    with pytest.raises(QueueFull, match="2 requests wait already"):
        scheduler.add(make_request("c", 10))
    step(scheduler)
    scheduler.add(make_request("c", 10))


def test_abort_of_an_unknown_id_is_ignored() -> None:
    assert not make_scheduler().abort("nobody")


def test_queued_tokens_are_the_prompt_tokens_to_be_computed() -> None:
    scheduler = make_scheduler(max_batched_tokens=100)
    scheduler.add(make_request("a", 130, max_tokens=10))
    scheduler.add(make_request("b", 50, first=500))
    assert scheduler.num_queued_tokens == 180
    step(scheduler)
    assert scheduler.num_queued_tokens == 80
    step(scheduler)
    step(scheduler)
    assert scheduler.num_queued_tokens == 0
