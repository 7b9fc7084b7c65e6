"""The router: only pairs, only room, always the same answer, and no herd behind one warm worker."""

from collections import Counter
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from cluster.router import Costs, Route, RouteRequest, WorkerView, choose

COSTS = Costs(bytes_per_token=48_000)
PREFILLS, DECODES = ["p0", "p1", "p2"], ["d0", "d1", "d2"]
ROOM = 10_000

seconds = st.sampled_from([0.0, 1e-4, 2e-4, 1e-2])


def views(names: list[str], **fields: Any) -> st.SearchStrategy[list[WorkerView]]:
    one = st.fixed_dictionaries(
        {
            "queued_tokens": st.integers(0, 5000),
            "assigned_tokens": st.integers(0, 5000),
            "seconds_per_token": seconds,
            "step_seconds": seconds,
            "running": st.integers(0, 64),
            "available_pages": st.integers(0, 200),
            **fields,
        }
    )
    return st.tuples(*[one] * len(names)).map(
        lambda all_fields: [
            WorkerView(worker=name, **fields) for name, fields in zip(names, all_fields, strict=True)
        ]
    )


requests = st.builds(
    RouteRequest,
    num_tokens=st.integers(1, 8000),
    hits=st.dictionaries(st.sampled_from(PREFILLS + DECODES), st.integers(1, 200)),
)
pair_sets = st.sets(st.tuples(st.sampled_from([*PREFILLS, "gone"]), st.sampled_from([*DECODES, "gone"])))


def route(
    request: RouteRequest, prefills: list[WorkerView], decodes: list[WorkerView], pairs: Any, **rest: Any
) -> Route | None:
    return choose(request, prefills=prefills, decodes=decodes, pairs=pairs, costs=COSTS, **rest)


@given(requests, views(PREFILLS), views(DECODES), pair_sets, st.sets(st.sampled_from(PREFILLS + DECODES)))
def test_only_routable_pairs_that_are_not_excluded(
    request: RouteRequest,
    prefills: list[WorkerView],
    decodes: list[WorkerView],
    pairs: set[tuple[str, str]],
    exclude: set[str],
) -> None:
    chosen = route(request, prefills, decodes, pairs, exclude=exclude)
    usable = {pair for pair in pairs if "gone" not in pair and not exclude & set(pair)}
    if chosen is None:
        assert not usable
    else:
        assert (chosen.prefill, chosen.decode) in usable
        assert {(score.prefill, score.decode) for score in chosen.alternatives} <= usable


@given(requests, views(PREFILLS), views(DECODES), pair_sets)
def test_the_choice_is_the_best_of_all_pairs_and_explained(
    request: RouteRequest, prefills: list[WorkerView], decodes: list[WorkerView], pairs: set[tuple[str, str]]
) -> None:
    chosen = route(request, prefills, decodes, pairs)
    if chosen is None:
        return
    first = chosen.alternatives[0]
    assert (first.prefill, first.decode) == (chosen.prefill, chosen.decode)
    # Each pair judged as if it were the only one.
    for pair in pairs:
        alone = route(request, prefills, decodes, {pair})
        if alone is not None:
            score = alone.alternatives[0]
            assert (not first.has_room, first.seconds) <= (not score.has_room, score.seconds)


@given(requests, views(PREFILLS), views(DECODES), pair_sets, st.randoms(use_true_random=False))
def test_the_order_of_workers_and_pairs_does_not_matter(
    request: RouteRequest,
    prefills: list[WorkerView],
    decodes: list[WorkerView],
    pairs: set[tuple[str, str]],
    random: Any,
) -> None:
    pair_list = sorted(pairs)
    expected = route(request, prefills, decodes, pair_list)
    for items in (prefills, decodes, pair_list):
        random.shuffle(items)
    assert route(request, prefills, decodes, pair_list) == expected


@given(requests, views(PREFILLS), views(DECODES), pair_sets, st.booleans(), st.integers(1, 100))
def test_more_hits_never_lose_a_worker_its_request(
    request: RouteRequest,
    prefills: list[WorkerView],
    decodes: list[WorkerView],
    pairs: set[tuple[str, str]],
    on_prefill: bool,
    more: int,
) -> None:
    before = route(request, prefills, decodes, pairs)
    if before is None:
        return
    worker = before.prefill if on_prefill else before.decode
    hits = {**request.hits, worker: request.hits.get(worker, 0) + more}
    after = route(msgspec.structs.replace(request, hits=hits), prefills, decodes, pairs)
    assert after is not None
    assert worker in (after.prefill, after.decode)
    assert after.quote >= before.quote
    assert after.alternatives[0].seconds <= before.alternatives[0].seconds


@given(requests, views(PREFILLS), views(DECODES), pair_sets)
def test_the_quote_is_whole_units_and_never_the_last_token(
    request: RouteRequest, prefills: list[WorkerView], decodes: list[WorkerView], pairs: set[tuple[str, str]]
) -> None:
    chosen = route(request, prefills, decodes, pairs)
    if chosen is not None:
        best = max(request.hits.get(chosen.prefill, 0), request.hits.get(chosen.decode, 0))
        assert chosen.quote == min(64 * best, (request.num_tokens - 1) // 64 * 64)
        assert chosen.quote < request.num_tokens


@given(requests, views(PREFILLS), views(DECODES, available_pages=st.sampled_from([0, 10, ROOM])), pair_sets)
def test_a_decode_worker_without_room_only_where_none_has_room(
    request: RouteRequest, prefills: list[WorkerView], decodes: list[WorkerView], pairs: set[tuple[str, str]]
) -> None:
    chosen = route(request, prefills, decodes, pairs)
    if chosen is None:
        return
    needed = -(-request.num_tokens // 64)
    room = {view.worker for view in decodes if view.available_pages - view.assigned_tokens // 64 >= needed}
    reachable = {decode for prefill, decode in pairs if prefill in PREFILLS}
    assert chosen.alternatives[0].has_room == (chosen.decode in room)
    if room & reachable:
        assert chosen.decode in room


def all_pairs() -> set[tuple[str, str]]:
    return {(prefill, decode) for prefill in PREFILLS for decode in DECODES}


def idle(names: list[str], **fields: Any) -> list[WorkerView]:
    return [WorkerView(worker=name, available_pages=ROOM, **fields) for name in names]


def test_no_workers_no_route() -> None:
    assert route(RouteRequest(num_tokens=10, hits={}), [], [], all_pairs()) is None
    assert route(RouteRequest(num_tokens=10, hits={}), idle(PREFILLS), idle(DECODES), set()) is None


def test_ties_go_to_the_fewest_assigned_and_then_to_the_lowest_ids() -> None:
    request = RouteRequest(num_tokens=640, hits={})
    chosen = route(request, idle(PREFILLS), idle(DECODES), all_pairs())
    assert chosen is not None
    assert (chosen.prefill, chosen.decode) == ("p0", "d0")
    # As long a queue, but one that the worker knows of already.
    prefills = [
        WorkerView(worker="p0", assigned_tokens=500),
        WorkerView(worker="p1", queued_tokens=500),
    ]
    chosen = route(request, prefills, idle(DECODES), all_pairs())
    assert chosen is not None
    assert chosen.prefill == "p1"


def test_a_warm_worker_is_worth_a_queue_as_long_as_its_hits() -> None:
    request = RouteRequest(num_tokens=6400, hits={"p2": 50})
    for queued, expected in ((3000, "p2"), (3400, "p0")):
        prefills = [*idle(["p0", "p1"]), WorkerView(worker="p2", queued_tokens=queued)]
        chosen = route(request, prefills, idle(DECODES), all_pairs())
        assert chosen is not None
        assert chosen.prefill == expected


def test_a_decode_worker_that_holds_the_prompt_saves_the_shipment() -> None:
    chosen = route(
        RouteRequest(num_tokens=6400, hits={"d1": 100}), idle(PREFILLS), idle(DECODES), all_pairs()
    )
    assert chosen is not None
    assert chosen.decode == "d1"
    assert chosen.quote == 6336
    others = [score.ship_s for score in chosen.alternatives if score.decode != "d1"]
    assert chosen.alternatives[0].ship_s < 0.02 * min(others)


def test_a_worker_that_has_measured_nothing_does_not_look_faster() -> None:
    prefills = [
        WorkerView(worker="p0", seconds_per_token=1e-2),
        WorkerView(worker="p1", queued_tokens=1),
        WorkerView(worker="p2", seconds_per_token=2e-2),
    ]
    chosen = route(RouteRequest(num_tokens=640, hits={}), prefills, idle(DECODES), all_pairs())
    assert chosen is not None
    assert chosen.prefill == "p0"


def test_one_warm_worker_does_not_draw_the_whole_herd() -> None:
    """Between two load frames a gateway sees only what it has assigned itself."""
    assigned: Counter[str] = Counter()
    for _ in range(60):
        prefills = [WorkerView(worker=name, assigned_tokens=assigned[name]) for name in PREFILLS]
        decodes = [
            WorkerView(worker=name, assigned_tokens=assigned[name], available_pages=200) for name in DECODES
        ]
        chosen = route(RouteRequest(num_tokens=640, hits={"p0": 5}), prefills, decodes, all_pairs())
        assert chosen is not None
        assigned[chosen.prefill] += 320 if chosen.prefill == "p0" else 640
        assigned[chosen.decode] += 640
    # In tokens: the warm worker gets its share of the work, not all of it.
    assert max(assigned[name] for name in PREFILLS) - min(assigned[name] for name in PREFILLS) <= 1000
    assert max(assigned[name] for name in DECODES) - min(assigned[name] for name in DECODES) <= 1000
