"""Every row exactly once, the work of a prompt even, and sums of experts that do not depend on the number of ranks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.shares import Room, choose_rank, deal_rows, expert_blocks, experts_of

RANKS = st.sampled_from([1, 2, 3, 4, 8])
SPANS = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 700)).map(lambda s: (s[0], s[0] + s[1])))


@given(SPANS, RANKS)
def test_every_row_is_dealt_once_and_in_order(spans: list[tuple[int, int]], num_ranks: int) -> None:
    shares = deal_rows(spans, num_ranks)
    assert len(shares) == num_ranks
    assert all(run.start < run.end for runs in shares for run in runs)
    for runs in shares:
        assert runs == sorted(runs)
        assert all(a.item < b.item or a.end < b.start for a, b in zip(runs, runs[1:], strict=False))
    dealt = sorted((run.item, row) for runs in shares for run in runs for row in range(run.start, run.end))
    assert dealt == [(item, row) for item, span in enumerate(spans) for row in range(*span)]
    assert shares == deal_rows(spans, num_ranks)


@given(SPANS, RANKS)
def test_ranks_get_as_many_rows(spans: list[tuple[int, int]], num_ranks: int) -> None:
    counts = [sum(run.end - run.start for run in runs) for runs in deal_rows(spans, num_ranks)]
    assert max(counts) - min(counts) <= 1


@given(st.integers(0, 100_000), st.integers(256, 8192), RANKS)
def test_the_work_of_a_prompt_is_even(start: int, count: int, num_ranks: int) -> None:
    """Work: the tokens that the rows see."""
    shares = deal_rows([(start, start + count)], num_ranks)
    work = [sum(row + 1 for run in runs for row in range(run.start, run.end)) for runs in shares]
    # Two rows more or fewer are what whole rows cannot avoid.
    assert max(work) - min(work) <= 0.01 * max(work) + 2 * (start + count)


def test_one_rank_has_one_run_of_each_span() -> None:
    assert deal_rows([(5, 9), (0, 1)], 1) == [[(0, 5, 9), (1, 0, 1)]]


def test_a_request_goes_where_most_of_it_is_known_then_where_least_goes_on() -> None:
    assert choose_rank([Room(0, 2, 50, 1), Room(1, 3, 10, 9)]) == 1
    assert choose_rank([Room(0, 3, 90, 2), Room(1, 3, 10, 1)]) == 1
    assert choose_rank([Room(0, 3, 10, 1), Room(1, 3, 90, 1)]) == 1
    assert choose_rank([Room(1, 0, 10, 0), Room(0, 0, 10, 0)]) == 0


@pytest.mark.parametrize(("num_experts", "blocks"), [(256, 8), (8, 8), (4, 4), (12, 4), (7, 1)])
def test_experts_are_whole_branches_of_the_sum(num_experts: int, blocks: int) -> None:
    assert expert_blocks(num_experts) == blocks
    num_ranks = 1
    while num_ranks <= blocks:
        owned = [experts_of(rank, num_ranks, num_experts) for rank in range(num_ranks)]
        assert [expert for experts in owned for expert in experts] == list(range(num_experts))
        num_ranks *= 2


@pytest.mark.parametrize(("num_ranks", "num_experts", "allowed"), [(3, 256, "1 or 2 or 4 or 8"), (2, 7, "1")])
def test_ranks_that_experts_do_not_allow(num_ranks: int, num_experts: int, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"ranks is {num_ranks}, but {num_experts} experts allow {allowed}$"):
        experts_of(0, num_ranks, num_experts)
