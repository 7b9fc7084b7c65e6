"""The prefix directory against a model that keeps plain sets."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cluster.prefix_directory import PageChange, PrefixDirectory

PAGES = [bytes([number]) * 16 for number in range(12)]
pages = st.lists(st.sampled_from(PAGES), max_size=6)
change = st.builds(
    PageChange,
    worker=st.sampled_from("abc"),
    epoch=st.integers(1, 3),
    stored=pages,
    removed=pages,
    reset=st.booleans(),
)


def naive_lookup(held: dict[str, set[bytes]], prompt: list[bytes]) -> dict[str, int]:
    found = {}
    for worker, pages in held.items():
        count = 0
        while count < len(prompt) and prompt[count] in pages:
            count += 1
        if count:
            found[worker] = count
    return found


@given(
    st.lists(st.one_of(change, st.sampled_from("abc")), max_size=30),
    st.lists(st.sampled_from(PAGES), max_size=8),
)
def test_it_agrees_with_plain_sets(steps: list[Any], prompt: list[bytes]) -> None:
    directory = PrefixDirectory()
    held: dict[str, set[bytes]] = {}
    epochs: dict[str, int] = {}
    for step in steps:
        if isinstance(step, str):
            directory.drop(step)
            held.pop(step, None)
            epochs.pop(step, None)
            continue
        directory.apply(step.worker, step.epoch, step.stored, step.removed, step.reset)
        if step.reset or epochs.get(step.worker) != step.epoch:
            held[step.worker] = set()
        epochs[step.worker] = step.epoch
        held[step.worker] = (held[step.worker] - set(step.removed)) | set(step.stored)
    assert directory.lookup(prompt) == naive_lookup(held, prompt)


@given(
    st.lists(change, max_size=20), st.lists(change, max_size=20), st.lists(st.sampled_from(PAGES), max_size=8)
)
def test_a_snapshot_gives_any_copy_the_same_state(
    mine: list[PageChange], other: list[PageChange], prompt: list[bytes]
) -> None:
    authority, copy = PrefixDirectory(), PrefixDirectory()
    authority.follow(mine, "abc")
    copy.follow(other, "abc")
    members = {change.worker for change in mine}
    copy.follow(authority.snapshot(), members)
    assert copy.snapshot() == authority.snapshot()
    assert copy.lookup(prompt) == authority.lookup(prompt)


@given(st.lists(change, max_size=20), st.sets(st.sampled_from("abc")))
def test_who_is_no_member_holds_nothing(changes: list[PageChange], members: set[str]) -> None:
    directory = PrefixDirectory()
    directory.follow(changes, members)
    assert {change.worker for change in directory.snapshot()} <= members


def test_only_leading_pages_count() -> None:
    directory = PrefixDirectory()
    directory.apply("a", 1, [PAGES[0], PAGES[1], PAGES[3]])
    directory.apply("b", 1, [PAGES[1]])
    assert directory.lookup(PAGES) == {"a": 2}
    assert directory.lookup([]) == {}


@given(st.lists(change, max_size=30), st.integers(0, 5))
def test_no_worker_takes_more_room_than_it_may(changes: list[PageChange], limit: int) -> None:
    directory = PrefixDirectory(max_pages=limit)
    directory.follow(changes, "abc")
    assert all(len(change.stored) <= limit for change in directory.snapshot())


def test_beyond_the_bound_the_first_pages_of_a_prefix_are_kept() -> None:
    directory = PrefixDirectory(max_pages=2)
    directory.apply("a", 1, PAGES[:4])
    assert directory.lookup(PAGES) == {"a": 2}
    directory.apply("a", 1, PAGES[2:4], [PAGES[1]])
    assert directory.lookup(PAGES) == {"a": 1}
