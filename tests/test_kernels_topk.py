"""Top-k: ties, signs of zero, lengths, and never a position that is not there."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.reference import top_k

# Few values, so that ties are the rule.
SCORES = st.sampled_from([-math.inf, -3.5, -1.0, -1e-38, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 7.25, math.inf])


def naive(scores: list[float], length: int, topk: int) -> list[int]:
    best = sorted(range(length), key=lambda position: (-scores[position], position))[:topk]
    return sorted(best) + [-1] * (topk - len(best))


@given(st.data(), st.integers(1, 40), st.integers(1, 5), st.integers(1, 12))
def test_is_the_sort_by_score_then_position(
    data: st.DataObject, width: int, num_rows: int, topk: int
) -> None:
    row = st.lists(SCORES, min_size=width, max_size=width)
    scores = data.draw(st.lists(row, min_size=num_rows, max_size=num_rows))
    lengths = data.draw(st.lists(st.integers(0, width), min_size=num_rows, max_size=num_rows))
    picks = top_k(torch.tensor(scores), torch.tensor(lengths), topk)
    assert picks.dtype == torch.int32
    assert picks.tolist() == [naive(*row, topk) for row in zip(scores, lengths, strict=True)]


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 200])
def test_all_equal_scores_give_the_first_positions(length: int) -> None:
    picks = top_k(torch.full((3, 200), -2.5), torch.full((3,), length), 64)
    expected = [*range(min(length, 64))] + [-1] * (64 - min(length, 64))
    assert picks.tolist() == [expected] * 3


def test_zeros_of_both_signs_tie() -> None:
    scores = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    assert top_k(scores, torch.tensor([4]), 2).tolist() == [[0, 1]]
    assert top_k(-scores, torch.tensor([4]), 2).tolist() == [[0, 1]]


@pytest.mark.parametrize("garbage", [math.nan, -math.nan, math.inf])
def test_what_lies_beyond_the_length_is_never_taken(garbage: float) -> None:
    scores = torch.randn(4, 100)
    scores[:, 50:] = garbage
    picks = top_k(scores, torch.tensor([0, 10, 50, 49]), 20)
    assert [int(row.max()) < length for row, length in zip(picks, (0, 10, 50, 49), strict=True)] == [True] * 4
    assert (picks >= 0).sum(1).tolist() == [0, 10, 20, 20]


@pytest.mark.parametrize("value", [-math.inf, math.nan, -math.nan])
def test_a_visible_position_is_taken_whatever_its_score(value: float) -> None:
    assert top_k(torch.full((1, 8), value), torch.tensor([5]), 6).tolist() == [[0, 1, 2, 3, 4, -1]]


def test_more_than_there_are() -> None:
    assert top_k(torch.randn(1, 3), torch.tensor([3]), 5).tolist() == [[0, 1, 2, -1, -1]]
    assert top_k(torch.empty(2, 0), torch.tensor([0, 0]), 2).tolist() == [[-1, -1]] * 2
    assert top_k(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), 2).shape == (0, 2)


def test_many_ties_at_the_border_of_a_long_row() -> None:
    scores = torch.randint(0, 4, (6, 5000)).float()
    lengths = torch.tensor([5000, 4999, 3000, 64, 65, 1])
    picks = top_k(scores, lengths, 64)
    assert picks.tolist() == [naive(row.tolist(), int(n), 64) for row, n in zip(scores, lengths, strict=True)]
