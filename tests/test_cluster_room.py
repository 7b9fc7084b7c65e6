"""A tenant that floods the gateway leaves room for others."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.room import GREED, Room

ASKED = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), max_size=80)


@given(st.integers(50, 500), ASKED)
def test_never_more_than_there_is_and_always_some_for_a_newcomer(
    capacity: int, asked: list[tuple[str, int]]
) -> None:
    room, held = Room(capacity), Counter[str]()
    for tenant, amount in asked:
        reason = room.refuses(tenant, amount)
        if reason is None:
            room.take(tenant, amount)
            held[tenant] += amount
        elif reason == "tenant":
            assert held[tenant]
            assert held[tenant] + amount > GREED * (capacity - room.held - amount)
        else:
            assert not held[tenant]
            assert room.held + amount > capacity
        assert room.held == held.total() <= capacity
    for tenant, amount in held.items():
        room.give_back(tenant, amount)
    assert room.held == 0


@given(st.integers(100, 1000))
def test_one_that_floods_leaves_a_fifth(capacity: int) -> None:
    room = Room(capacity)
    while room.refuses("flood", 1) is None:
        room.take("flood", 1)
    assert room.refuses("flood", 1) == "tenant"
    assert capacity / 5 - 1 <= capacity - room.held <= capacity / 5 + 1
    assert room.refuses("light", capacity - room.held) is None
    assert room.refuses("light", capacity - room.held + 1) == "all"


def test_something_too_large_gets_in_alone() -> None:
    room = Room(10)
    assert room.refuses("a", 25) is None
    room.take("a", 25)
    assert (room.refuses("a", 1), room.refuses("b", 1)) == ("tenant", "all")
