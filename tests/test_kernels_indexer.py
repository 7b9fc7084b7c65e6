"""The indexer against its definition in float64, and that a row's selection depends on its own request alone."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.layout import CacheLayout
from kernels.reference import (
    dequantize_blocks,
    index_scores,
    indexer,
    quantize_blocks,
    read_index_keys,
    select_tokens,
    top_k,
    write_index_keys,
)
from kernels.reference.indexer import hadamard
from kernels.rows import Rows
from kernels.testing import LAYOUTS, Case, make_case

FP8, FP32 = LAYOUTS["fp8"], LAYOUTS["fp32"]


def select(case: Case, topk: int) -> torch.Tensor:
    return select_tokens(case.index_q, case.index_weights, case.index_pages, case.rows, topk, case.layout)


def naive_scores(case: Case, row: int, request: int) -> torch.Tensor:
    """fp64 [length]: token by token and head by head, as the indexer is defined."""
    length = int(case.rows.positions[row]) + 1
    keys = read_index_keys(case.index_pages, case.slots_of(request, length), case.layout).double()
    q = case.index_q[row]
    if case.layout.quantized:
        q = dequantize_blocks(*quantize_blocks(q))
    scores = torch.zeros(length, dtype=torch.float64)
    for token, key in enumerate(keys):
        for weight, query in zip(case.index_weights[row].double(), q.double(), strict=True):
            scores[token] += weight * max(float(query @ key), 0.0)
    return scores


def owners(rows: Rows) -> list[int]:
    """The request of each row."""
    counts = [end - start for start, end in itertools.pairwise(rows.query_starts)]
    return [request for request, count in enumerate(counts) for _ in range(count)]


def test_hadamard_is_sylvesters_matrix() -> None:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < 128:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    x = torch.randn(5, 3, 128)
    expected = x.double() @ matrix.T / math.sqrt(128)
    torch.testing.assert_close(hadamard(x).double(), expected, rtol=1e-5, atol=1e-6)
    assert hadamard(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=1e-5, atol=1e-5)


def test_hadamard_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="96"):
        hadamard(torch.randn(2, 96))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("index_heads", [1, 3, 4, 64])
def test_scores_agree_with_the_definition(layout: CacheLayout, index_heads: int) -> None:
    case = make_case([70], [2], layout=layout, index_heads=index_heads)
    scores = index_scores(case.index_q, case.index_weights, case.index_pages, case.rows, layout)
    assert scores.shape == (2, 70)
    assert scores.dtype == torch.float32
    assert scores[0, 69] == -math.inf
    for row, length in ((0, 69), (1, 70)):
        expected = naive_scores(case, row, 0)
        torch.testing.assert_close(scores[row, :length].double(), expected, rtol=1e-5, atol=1e-4)


def test_key_scale_and_q_scale_are_part_of_the_score() -> None:
    pages = torch.zeros(1, FP8.index_page_bytes, dtype=torch.uint8)
    keys = torch.full((2, 128), 3.0) * torch.tensor([[1.0], [1024.0]])
    write_index_keys(pages, torch.tensor([0, 1]), keys, FP8)
    rows = Rows.of((0, 1), torch.tensor([1]), torch.tensor([[0]], dtype=torch.int32))
    q = torch.full((1, 2, 128), 5.0) * torch.tensor([1.0, 256.0]).view(1, 2, 1)
    scores = index_scores(q, torch.tensor([[1.0, -0.5]]), pages, rows, FP8)
    dot = 128 * 15.0
    assert scores.tolist() == [[dot - 0.5 * 256 * dot, 1024 * (dot - 0.5 * 256 * dot)]]


def test_scores_are_of_one_request() -> None:
    case = make_case([10, 20], [1, 1])
    with pytest.raises(ValueError, match="holds 2 requests"):
        index_scores(case.index_q, case.index_weights, case.index_pages, case.rows, FP8)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_selection_is_the_top_k_of_the_definition(layout: CacheLayout) -> None:
    """Contexts of several times top-k, and of several key tiles; pages in random order."""
    topk = 64
    case = make_case([1100, 65, 64, 63, 1, 300], [3, 2, 1, 5, 1, 70], layout=layout, index_heads=3)
    selected = select(case, topk)
    assert selected.dtype == torch.int32
    for row, request in enumerate(owners(case.rows)):
        length = int(case.rows.positions[row]) + 1
        count = min(length, topk)
        order = case.slots_of(request, length)
        taken = [(order == slot).nonzero().item() for slot in selected[row, :count]]
        assert taken == sorted(set(taken))  # ascending positions, all different, all visible
        assert (selected[row, count:] == -1).all()
        if length <= topk:
            assert taken == list(range(length))
        elif row % 10 == 0 or length == topk + 1:  # float64 token by token is slow
            scores = naive_scores(case, row, request)
            left_out = torch.ones(length, dtype=torch.bool)
            left_out[taken] = False
            assert scores[taken].min() >= scores[left_out].max() - 1e-4


def test_selection_is_top_k_of_index_scores() -> None:
    case = make_case([1500], [40])
    scores = index_scores(case.index_q, case.index_weights, case.index_pages, case.rows, FP8)
    picks = top_k(scores, case.rows.positions + 1, 100)
    slots = case.slots_of(0, 1500)
    assert torch.equal(select(case, 100), slots[picks.long()].int())


def test_contexts_of_several_groups_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selected are the best of all groups, also a row at a time, when keys are kept from one piece to the next, and with others."""
    case = make_case([2 * indexer.KEYS_IN_GROUP + 700, indexer.KEYS_IN_GROUP, 70], [40, 3, 1])
    whole = select(case, 64)
    part = case.only(range(40))
    scores = index_scores(part.index_q, part.index_weights, part.index_pages, part.rows, FP8)
    picks = top_k(scores, part.rows.positions + 1, 64)
    assert torch.equal(whole[:40], case.slots_of(0, scores.shape[1])[picks.long()].int())
    for row in (0, 21, 39, 40, 42, 43):
        assert torch.equal(select(case.only([row]), 64), whole[[row]])
    monkeypatch.setattr(indexer, "CHUNK_BYTES", 1)
    assert torch.equal(select(case, 64), whole)


def test_equal_scores_take_the_first_tokens() -> None:
    case = make_case([700], [4])
    slots = case.slots_of(0, 700)
    write_index_keys(case.index_pages, slots, torch.ones(700, 128), FP8)
    assert torch.equal(select(case, 64), slots[:64].int().expand(4, -1))


def test_all_weights_negative_still_take_the_highest() -> None:
    """Keys that score 0 against every head beat those that score below."""
    case = make_case([500], [1])
    keys = -case.index_q[0].sum(0).expand(500, -1).clone()
    q = case.index_q[0].sum(0).expand(1, 4, -1)
    keys[100:164] *= -1
    slots = case.slots_of(0, 500)
    write_index_keys(case.index_pages, slots, keys, FP8)
    weights = torch.full((1, 4), -1.0)
    taken = select_tokens(q, weights, case.index_pages, case.rows, 436, FP8)
    expected = torch.cat((slots[:100], slots[164:])).int()
    assert torch.equal(taken[0], expected)


def test_a_row_that_sees_nothing_selects_nothing() -> None:
    case = make_case([130, 200], [2, 1])
    rows = case.rows._replace(positions=torch.tensor([-1, 129, -1]))
    selected = select_tokens(case.index_q, case.index_weights, case.index_pages, rows, 8, FP8)
    assert (selected[[0, 2]] == -1).all()
    assert (selected[1] >= 0).all()


def test_requests_without_rows_are_skipped() -> None:
    case = make_case([100, 90, 300], [1, 0, 2])
    assert torch.equal(select(case, 16), select(case.only([0, 1, 2]), 16))


@pytest.mark.parametrize("index_heads", [3, 4, 64])
def test_bits_of_a_score_do_not_depend_on_the_batch(index_heads: int) -> None:
    """One row at a time, odd groups of rows and all of them: the same bits, so the same selection."""
    case = make_case([1300], [75], index_heads=index_heads)
    whole = index_scores(case.index_q, case.index_weights, case.index_pages, case.rows, FP8)
    for start, end in ((0, 1), (17, 18), (74, 75), (3, 5), (1, 12), (10, 75), (0, 64)):
        part = case.only(range(start, end))
        scores = index_scores(part.index_q, part.index_weights, part.index_pages, part.rows, FP8)
        assert torch.equal(scores, whole[start:end, : scores.shape[1]]), (start, end)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_selection_does_not_depend_on_the_batch_or_the_chunks(
    layout: CacheLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case([900, 70, 1200, 40, 600], [20, 3, 1, 40, 33], layout=layout)
    whole = select(case, 64)
    for row in range(0, len(whole), 7):
        assert torch.equal(select(case.only([row]), 64), whole[[row]])
    assert torch.equal(select(case.only(range(5, 90, 3)), 64), whole[5:90:3])
    for chunk_bytes in (1, 32 * 1200 * 3, 32 * 1200 * 17):
        monkeypatch.setattr(indexer, "CHUNK_BYTES", chunk_bytes)
        assert torch.equal(select(case, 64), whole), chunk_bytes


@given(st.integers(1, 200), st.integers(1, 80), st.data())
@settings(max_examples=30)
def test_slots_are_of_visible_tokens_of_the_own_request(context: int, topk: int, data: st.DataObject) -> None:
    other = data.draw(st.integers(1, 200))
    queries = data.draw(st.integers(1, context))
    case = make_case([other, context], [1, queries], index_heads=2, seed=context)
    selected = select(case, topk)
    for row in range(1, 1 + queries):
        visible = set(case.slots_of(1, int(case.rows.positions[row]) + 1).tolist())
        taken = [slot for slot in selected[row].tolist() if slot != -1]
        assert len(set(taken)) == len(taken) == min(topk, len(visible))
        assert set(taken) <= visible


def test_pages_of_others_may_change_without_a_trace() -> None:
    case = make_case([700, 700], [2, 2])
    whole = select(case, 64)
    slots = case.slots_of(1, 700)
    write_index_keys(case.index_pages, slots, torch.full((700, 128), math.nan), FP8)
    assert torch.equal(select(case, 64)[:2], whole[:2])
