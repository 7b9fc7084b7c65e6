"""Whose turn it is: nothing lost, no flow ahead of its share, and whoever was away waits for one item of each other at most."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.fair_queue import FairQueue

FLOWS = st.sampled_from("abcd")
COSTS = st.integers(1, 1000)
WORK = st.lists(st.one_of(st.tuples(FLOWS, COSTS), st.none()), max_size=120)  # None: let one through


@given(WORK)
def test_nothing_is_lost_and_a_flow_keeps_its_order(work: list[tuple[str, int] | None]) -> None:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    pushed, popped = [], []
    for number, push in enumerate(work):
        if push is not None:
            queue.push(push[0], push[1], (push[0], number))
            pushed.append((push[0], number))
        elif queue:
            expected = queue.peek()
            popped.append(queue.pop())
            assert popped[-1] == expected
    while queue:
        popped.append(queue.pop())
    assert sorted(popped) == sorted(pushed)
    for flow in "abcd":
        assert [item for item in popped if item[0] == flow] == [item for item in pushed if item[0] == flow]


@given(WORK, COSTS)
def test_a_flow_with_little_work_waits_for_one_item_of_each_other(
    work: list[tuple[str, int] | None], cost: int
) -> None:
    """Whatever the others have waiting, and whatever they are about to bring."""
    queue: FairQueue[str] = FairQueue()
    for push in work:
        if push is not None:
            queue.push(push[0], push[1], push[0])
        elif queue:
            queue.pop()
    queue.push("light", cost, "light")
    for flow in "abcd":
        queue.push(flow, 1, flow)
    ahead = []
    while (flow := queue.pop()) != "light":
        ahead.append(flow)
    assert all(count == 1 for count in Counter(ahead).values())


@given(st.lists(st.tuples(COSTS, COSTS), min_size=1, max_size=60), st.lists(st.booleans(), max_size=100))
def test_two_flows_that_always_wait_are_served_alike(
    costs: list[tuple[int, int]], charges: list[bool]
) -> None:
    """Also where part of the cost is known only afterwards."""
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for of_a, of_b in costs:
        queue.push("a", of_a, ("a", of_a))
        queue.push("b", of_b, ("b", of_b))
    served: Counter[str] = Counter()
    left = Counter(a=len(costs), b=len(costs))
    most = 0
    for later in charges + [False] * 2 * len(costs):
        if not left["a"] or not left["b"]:
            break
        flow, cost = queue.pop()
        left[flow] -= 1
        if later:
            queue.charge(flow, 7)
            cost += 7
        served[flow] += cost
        most = max(most, cost)
        assert abs(served["a"] - served["b"]) <= most


def test_a_pause_saves_nothing_up() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(10):
        queue.push("busy", 100, "busy")
        queue.pop()
    for _ in range(3):
        queue.push("busy", 100, "busy")
        queue.push("back", 100, "back")
    assert [queue.pop() for _ in range(6)].count("back") == 3
    assert [queue.push("x", 1, "x"), queue.peek()] == [None, "x"]


def test_the_length_of_an_answer_is_charged_when_it_is_known() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(4):
        queue.push("writes much", 10, "writes much")
        queue.push("reads", 10, "reads")
    assert queue.pop() == "writes much"
    queue.charge("writes much", 25)
    assert [queue.pop() for _ in range(5)] == ["reads"] * 4 + ["writes much"]


def test_an_item_that_waits_no_longer() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", 5, "first")
    queue.push("a", 5, "second")
    queue.remove("a", "first")
    assert (len(queue), queue.pop(), queue.peek()) == (1, "second", None)
    with pytest.raises(ValueError, match="no such item"):
        queue.remove("a", "first")
    with pytest.raises(IndexError):
        queue.pop()
