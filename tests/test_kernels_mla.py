"""Sparse and dense MLA against float64, what invalid slots do, and that a row depends on its own tokens alone."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from kernels.layout import CacheLayout
from kernels.reference import dense_mla, mla, read_latents, select_tokens, sparse_mla, write_latents
from kernels.rows import Rows
from kernels.testing import LAYOUTS, SOFTMAX_SCALE, Case, difference, make_case

FP8 = LAYOUTS["fp8"]


def sparse(case: Case, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return sparse_mla(case.q, case.latent_pages, slots, SOFTMAX_SCALE, case.layout)


def dense(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return dense_mla(case.q, case.latent_pages, case.rows, SOFTMAX_SCALE, case.layout)


def naive(case: Case, row: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One row over its slots in fp64: [H, latent_dim] and [H]."""
    latents = read_latents(case.latent_pages, slots, case.layout).double()
    logits = case.q[row].double() @ latents.T * SOFTMAX_SCALE
    return logits.softmax(-1) @ latents[:, : case.layout.latent_dim], logits.logsumexp(-1)


def visible_slots(case: Case) -> list[torch.Tensor]:
    """Of each row the slots of what it sees."""
    counts = [end - start for start, end in itertools.pairwise(case.rows.query_starts)]
    owners = [request for request, count in enumerate(counts) for _ in range(count)]
    return [
        case.slots_of(request, position + 1)
        for request, position in zip(owners, case.rows.positions.tolist(), strict=True)
    ]


def padded(slots: list[torch.Tensor], width: int) -> torch.Tensor:
    rows = [torch.nn.functional.pad(row, (0, width - len(row)), value=-1) for row in slots]
    return torch.stack(rows).int()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_sparse_agrees_with_float64(layout: CacheLayout) -> None:
    case = make_case([400, 70, 1], [9, 3, 1], layout=layout)
    chosen = [slots[torch.randperm(len(slots))[:50]] for slots in visible_slots(case)]
    out, lse = sparse(case, padded(chosen, 64))
    assert out.shape == (13, 4, 512)
    assert lse.shape == (13, 4)
    assert lse.dtype == torch.float32
    for row, slots in enumerate(chosen):
        expected, expected_lse = naive(case, row, slots)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[row].double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("heads", [1, 4, 100])
def test_dense_agrees_with_float64(layout: CacheLayout, heads: int) -> None:
    case = make_case([1100, 64, 1], [20, 3, 1], layout=layout, heads=heads)
    out, lse = dense(case)
    for row, slots in enumerate(visible_slots(case)):
        expected, expected_lse = naive(case, row, slots)
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[row].double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_sparse_is_dense_when_everything_is_selected() -> None:
    case = make_case([300, 65, 20], [30, 2, 20])
    slots = select_tokens(case.index_q, case.index_weights, case.index_pages, case.rows, 300, case.layout)
    assert torch.equal(slots, padded(visible_slots(case), 300))
    for actual, expected in zip(sparse(case, slots), dense(case), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_sparse_is_not_dense_when_little_is_selected() -> None:
    case = make_case([1000], [4])
    slots = select_tokens(case.index_q, case.index_weights, case.index_pages, case.rows, 64, case.layout)
    assert difference(sparse(case, slots)[0], dense(case)[0]) > 0.1


def test_slots_outside_the_pages_count_as_none() -> None:
    case = make_case([200], [1])
    num_slots = len(case.latent_pages) * 64
    chosen = case.slots_of(0, 200)[5:45]
    nasty = torch.tensor([-1, -2, -64, -65, -(2**31), num_slots, num_slots + 1, 2**31 - 1])
    mixed = torch.cat((nasty[:3], chosen[:7], nasty[3:6], chosen[7:], nasty[6:])).int().unsqueeze(0)
    out, lse = sparse(case, mixed)
    expected, expected_lse = naive(case, 0, chosen)
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse[0].double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_a_row_without_a_valid_slot_gives_zeros_and_infinity() -> None:
    case = make_case([200], [3])
    slots = case.slots_of(0, 64).int().repeat(3, 1)
    slots[1] = torch.tensor([-1, -(2**31), 2**31 - 1, len(case.latent_pages) * 64]).repeat(16).int()
    out, lse = sparse(case, slots)
    assert not out[1].any()
    assert (lse[1] == math.inf).all()
    assert out[[0, 2]].isfinite().all()
    assert lse[[0, 2]].isfinite().all()


def test_dense_rows_that_see_nothing() -> None:
    case = make_case([130, 5], [2, 1])
    rows = case.rows._replace(positions=torch.tensor([-1, 129, -1]))
    out, lse = dense_mla(case.q, case.latent_pages, rows, SOFTMAX_SCALE, FP8)
    assert not out[[0, 2]].any()
    assert (lse[[0, 2]] == math.inf).all()
    assert torch.equal(out[1], dense(case)[0][1])


def test_large_logits_do_not_overflow() -> None:
    case = make_case([100], [2])
    out, lse = sparse_mla(
        case.q * 1e4, case.latent_pages, padded(visible_slots(case), 128), SOFTMAX_SCALE, FP8
    )
    assert out.isfinite().all()
    assert lse.isfinite().all()
    whole = dense_mla(case.q * 1e4, case.latent_pages, case.rows, SOFTMAX_SCALE, FP8)
    torch.testing.assert_close(out, whole[0])


def test_very_negative_logits_do_not_vanish() -> None:
    case = make_case([40], [1])
    slots = visible_slots(case)
    key = read_latents(case.latent_pages, slots[0][:1], FP8)
    write_latents(case.latent_pages, slots[0], key[:, :512].expand(40, -1), key[:, 512:].expand(40, -1), FP8)
    case = replace(case, q=-100 * key.expand(1, 4, -1))
    for out, lse in (sparse(case, padded(slots, 64)), dense(case)):
        assert (lse < -1000).all()
        torch.testing.assert_close(out[0], key[:, :512].expand(4, -1), rtol=1e-5, atol=1e-5)


def test_softmax_scale_is_used() -> None:
    case = make_case([100], [1])
    slots = padded(visible_slots(case), 128)
    _, lse = sparse_mla(case.q, case.latent_pages, slots, 0.0, FP8)
    torch.testing.assert_close(lse, torch.full((1, 4), math.log(100)))


def test_results_have_the_dtype_of_q() -> None:
    case = make_case([100], [2], dtype=torch.bfloat16)
    slots = padded(visible_slots(case), 128)
    for out, lse in (sparse(case, slots), dense(case)):
        assert out.dtype == torch.bfloat16
        assert lse.dtype == torch.float32
        expected, _ = naive(case, 0, visible_slots(case)[0])
        torch.testing.assert_close(out[0].double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("heads", "topk"), [(1, 64), (4, 64), (6, 128), (8, 40), (16, 200)])
def test_bits_of_a_sparse_row_do_not_depend_on_the_batch(layout: CacheLayout, heads: int, topk: int) -> None:
    case = make_case([500, 90], [50, 20], layout=layout, heads=heads)
    slots = select_tokens(case.index_q, case.index_weights, case.index_pages, case.rows, topk, layout)
    out, lse = sparse(case, slots)
    for start, end in [(row, row + 1) for row in range(0, 70, 9)] + [(0, 3), (45, 58), (1, 70)]:
        own_out, own_lse = sparse(case.only(range(start, end)), slots[start:end])
        assert torch.equal(own_out, out[start:end]), (start, end)
        assert torch.equal(own_lse, lse[start:end]), (start, end)


def test_gathering_in_small_or_large_chunks_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([500], [50])
    slots = select_tokens(case.index_q, case.index_weights, case.index_pages, case.rows, 64, FP8)
    out, lse = sparse(case, slots)
    for gather_bytes in (1, 64 * 2304 * 7, 2**30):
        monkeypatch.setattr(mla, "GATHER_BYTES", gather_bytes)
        own_out, own_lse = sparse(case, slots)
        assert torch.equal(own_out, out)
        assert torch.equal(own_lse, lse)


@pytest.mark.parametrize("heads", [1, 4, 100])
def test_bits_of_a_dense_row_do_not_depend_on_the_batch(heads: int) -> None:
    """Nor on how far the rows of its tile see: the tiles beyond change nothing."""
    case = make_case([1400, 500, 90], [40, 10, 20], heads=heads)
    positions = case.rows.positions.clone()
    positions[:20] = torch.arange(20) * 37
    rows = Rows.of(case.rows.query_starts, positions, case.rows.page_table)
    out, lse = dense_mla(case.q, case.latent_pages, rows, SOFTMAX_SCALE, FP8)
    for row in range(0, 70, 9):
        part = case.only([row])
        own = part.rows._replace(positions=positions[[row]])
        own_out, own_lse = dense_mla(part.q, part.latent_pages, own, SOFTMAX_SCALE, FP8)
        assert torch.equal(own_out, out[[row]]), row
        assert torch.equal(own_lse, lse[[row]]), row


def test_no_rows() -> None:
    case = make_case([10], [0])
    out, lse = sparse(case, torch.empty(0, 64, dtype=torch.int32))
    assert out.shape == (0, 4, 512)
    assert lse.shape == (0, 4)
    assert dense(case)[0].shape == (0, 4, 512)
