"""Top-k: ties, signs of zero, lengths, and never a position that is not there."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.reference import top_k
from kernels.reference.topk import BLOCK, top_k_in_blocks

# Few values, so that ties are the rule.
SCORES = st.sampled_from(
    [math.nan, -math.nan, -math.inf, -3.5, -1.0, -1e-38, -0.0, 0.0, 1e-45, 1.0, 7.25, math.inf]
)


def naive(scores: list[float], length: int, topk: int) -> list[int]:
    best = sorted(range(length), key=lambda position: (*_rank(scores[position]), position))[:topk]
    return sorted(best) + [-1] * (topk - len(best))


def _rank(score: float) -> tuple[bool, float]:
    return (False, 0.0) if math.isnan(score) else (True, -score)


def in_blocks(scores: torch.Tensor, lengths: torch.Tensor, topk: int) -> torch.Tensor:
    """top_k_in_blocks of scores in plain order. What fills the last block is NaN: it must never be taken."""
    padded = torch.nn.functional.pad(scores, (0, -scores.shape[1] % BLOCK), value=math.nan)
    return top_k_in_blocks(padded.unflatten(1, (-1, BLOCK)).permute(2, 0, 1).contiguous(), lengths, topk)


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


@given(st.data(), st.integers(1, 300), st.integers(1, 12), st.integers(0, 2**32))
def test_blocks_change_nothing(data: st.DataObject, width: int, topk: int, seed: int) -> None:
    """Rows of a few values, NaN and infinities among them, more blocks than topk and fewer, of any length."""
    values = torch.tensor(data.draw(st.lists(SCORES, min_size=1, max_size=6)))
    generator = torch.Generator().manual_seed(seed)
    scores = values[torch.randint(len(values), (4, width), generator=generator)]
    lengths = torch.tensor(data.draw(st.lists(st.integers(-1, width), min_size=4, max_size=4)))
    assert torch.equal(in_blocks(scores, lengths, topk), top_k(scores, lengths, topk))


@pytest.mark.parametrize("width", [64 * BLOCK - 1, 64 * BLOCK, 64 * BLOCK + 1, 5000])
def test_blocks_change_nothing_in_long_rows(width: int) -> None:
    for scores in (torch.randn(5, width), torch.randint(-2, 2, (5, width)).float(), -torch.zeros(5, width)):
        lengths = torch.tensor([width, width - 1, 64, 65, 0])
        assert torch.equal(in_blocks(scores, lengths, 64), top_k(scores, lengths, 64))


def test_the_best_may_all_lie_in_one_block_or_each_in_its_own() -> None:
    scores = torch.zeros(2, 4096)
    scores[0, 1600:1616] = torch.arange(16.0) + 1
    scores[1, 7::BLOCK] = torch.arange(256.0)
    lengths = torch.tensor([4096, 4096])
    expected = [list(range(1600, 1616)), [7 + BLOCK * block for block in range(240, 256)]]
    assert in_blocks(scores, lengths, 16).tolist() == expected


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
    assert in_blocks(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), 2).shape == (0, 2)
    assert in_blocks(torch.empty(2, 0), torch.tensor([0, 0]), 2).tolist() == [[-1, -1]] * 2


def test_many_ties_at_the_border_of_a_long_row() -> None:
    scores = torch.randint(0, 4, (6, 5000)).float()
    lengths = torch.tensor([5000, 4999, 3000, 64, 65, 1])
    picks = top_k(scores, lengths, 64)
    assert picks.tolist() == [naive(row.tolist(), int(n), 64) for row, n in zip(scores, lengths, strict=True)]
