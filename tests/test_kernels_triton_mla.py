"""Attention over latents and the latent cache of the Triton back end against the reference: on the CPU through Triton's
interpreter, small; on a GPU at the sizes of the model, where other kernels run.
"""

import math
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from exact_interpreter import prepare

from kernels import reference
from kernels.layout import CacheLayout
from kernels.reference.rope import rotate_neighbours
from kernels.rows import Rows
from kernels.testing import LAYOUTS, SOFTMAX_SCALE, Case, difference, make_case

FP8 = LAYOUTS["fp8"]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = 2e-5  # of bf16 weights and outputs
LSE_TOLERANCE = 2e-3
NOWHERE = [-1, -2, -64, -65, -(2**31), 2**31 - 1]
Attended = tuple[torch.Tensor, torch.Tensor]

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, where hardware gives infinity or NaN
gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")]


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    prepare()
    from kernels import triton_ops

    return triton_ops


def case_of(contexts: list[int], queries: list[int], heads: int) -> Case:
    return make_case(contexts, queries, heads=heads, dtype=torch.bfloat16, device=DEVICE)


def random_slots(case: Case, topk: int) -> torch.Tensor:
    """int32 [T, topk]: of each row some of the tokens that it sees, by position, then -1; the last row has all it can hold."""
    slots = torch.full((len(case.q), topk), -1, dtype=torch.int32, device=DEVICE)
    for row, (owner, position) in enumerate(
        zip(case.rows.owners.tolist(), case.rows.positions.tolist(), strict=True)
    ):
        visible = case.slots_of(owner, position + 1)
        count = min(topk, len(visible)) if row % 2 else min(topk // 2 + 3, len(visible))
        chosen = torch.randperm(len(visible))[:count].sort().values.to(DEVICE)
        slots[row, :count] = visible[chosen].int()
    return slots


def exact(case: Case, slots: torch.Tensor) -> Attended:
    """sparse_mla in fp32 on all tokens at once."""
    hidden = (slots < 0) | (slots >= 64 * len(case.latent_pages))
    latents = reference.read_latents(case.latent_pages, slots.masked_fill(hidden, 0), FP8)
    latents = latents.masked_fill(hidden.unsqueeze(-1), 0)
    logits = torch.einsum("thd,tkd->thk", case.q.float(), latents) * SOFTMAX_SCALE
    logits.masked_fill_(hidden.unsqueeze(1), -math.inf)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.unsqueeze(-1)).nan_to_num(0)
    return torch.einsum("thk,tkd->thd", weights, latents[..., :512]), lse.masked_fill(
        lse == -math.inf, math.inf
    )


def assert_attended(actual: Attended, expected: Attended) -> None:
    out, lse = actual
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert out.isfinite().all()
    assert difference(out, expected[0]) < TOLERANCE
    assert torch.equal(lse == math.inf, expected[1] == math.inf)
    assert not out[lse == math.inf].any()
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=LSE_TOLERANCE)


def sparse(ops: ModuleType, case: Case, slots: torch.Tensor) -> Attended:
    return ops.sparse_mla(case.q, case.latent_pages, slots, SOFTMAX_SCALE, FP8)


def dense(ops: ModuleType, case: Case, rows: Rows | None = None) -> Attended:
    return ops.dense_mla(case.q, case.latent_pages, rows or case.rows, SOFTMAX_SCALE, FP8)


SPARSE_SHAPES = [
    ([400, 70, 1], [3, 1, 1], 4, 64),
    ([150], [2], 20, 48),
    pytest.param([6000, 4096, 63, 64, 65, 1], [5, 2, 1, 1, 1, 1], 128, 2048, marks=gpu),
    pytest.param([5000, 300], [9, 3], 8, 2048, marks=gpu),
    pytest.param([5000, 300], [9, 3], 16, 1024, marks=gpu),
    pytest.param([5000], [300], 128, 2048, marks=gpu),
    pytest.param([5000], [130], 100, 2000, marks=gpu),
]


@pytest.mark.parametrize(("contexts", "queries", "heads", "topk"), SPARSE_SHAPES)
def test_sparse_agrees(
    ops: ModuleType, contexts: list[int], queries: list[int], heads: int, topk: int
) -> None:
    case = case_of(contexts, queries, heads)
    slots = random_slots(case, topk)
    assert_attended(sparse(ops, case, slots), exact(case, slots))


DENSE_SHAPES = [
    ([200, 65, 1], [3, 2, 1], 4),
    pytest.param([4500, 63, 64, 65, 1], [70, 3, 3, 3, 1], 128, marks=gpu),
    pytest.param([9000, 3, 4100], [1, 1, 1], 128, marks=gpu),
    pytest.param([4500, 63], [5, 3], 16, marks=gpu),
]


@pytest.mark.parametrize(("contexts", "queries", "heads"), DENSE_SHAPES)
def test_dense_agrees(ops: ModuleType, contexts: list[int], queries: list[int], heads: int) -> None:
    case = case_of(contexts, queries, heads)
    assert_attended(
        dense(ops, case),
        reference.dense_mla(case.q.float(), case.latent_pages, case.rows, SOFTMAX_SCALE, FP8),
    )


def test_dense_rows_that_see_nothing(ops: ModuleType) -> None:
    case = case_of([130, 5], [2, 1], 128 if ON_GPU else 2)
    rows = case.rows._replace(positions=torch.tensor([-1, 129, -1], device=DEVICE))
    assert_attended(
        dense(ops, case, rows), reference.dense_mla(case.q, case.latent_pages, rows, SOFTMAX_SCALE, FP8)
    )


def test_slots_outside_the_pages_count_as_none(ops: ModuleType) -> None:
    case = case_of([300], [4], 128 if ON_GPU else 2)
    slots = random_slots(case, 128)
    nowhere = [*NOWHERE, 64 * len(case.latent_pages), 64 * len(case.latent_pages) + 1]
    slots[:, 5:13] = torch.tensor(nowhere, dtype=torch.int32)  # among the others
    slots[1, :64] = -7  # a whole tile of them, before others
    slots[2] = torch.tensor(nowhere, dtype=torch.int32).repeat(16)
    attended = sparse(ops, case, slots)
    assert_attended(attended, exact(case, slots))
    assert (attended[1][2] == math.inf).all()


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_extreme_logits(ops: ModuleType, scale: float) -> None:
    case = case_of([200], [2], 128 if ON_GPU else 2)
    slots = random_slots(case, 64)
    query = (case.q * scale).contiguous()
    out, lse = ops.sparse_mla(query, case.latent_pages, slots, SOFTMAX_SCALE, FP8)
    expected = reference.sparse_mla(query.float(), case.latent_pages, slots, SOFTMAX_SCALE, FP8)
    assert difference(out, expected[0]) < 1e-3
    torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=LSE_TOLERANCE)


def test_queries_may_be_views(ops: ModuleType) -> None:
    case = case_of([200], [3], 128 if ON_GPU else 2)
    slots = random_slots(case, 64)
    wide = F.pad(case.q, (0, 64, 0, 1), value=math.nan)
    view = wide[:, : case.q.shape[1], :576]
    for actual, expected in zip(
        ops.sparse_mla(view, case.latent_pages, slots, SOFTMAX_SCALE, FP8),
        sparse(ops, case, slots),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def test_the_unquantised_layout_is_refused(ops: ModuleType) -> None:
    case = make_case([70], [1], layout=LAYOUTS["fp32"], device=DEVICE)
    with pytest.raises(ValueError, match="quantized"):
        ops.dense_mla(case.q, case.latent_pages, case.rows, SOFTMAX_SCALE, case.layout)
    with pytest.raises(ValueError, match="bfloat16"):
        ops.dense_mla(case.q, case_of([70], [1], 4).latent_pages, case.rows, SOFTMAX_SCALE, FP8)


@pytest.mark.parametrize("layout", [FP8, CacheLayout(latent_dim=128, rope_dim=16, index_dim=128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_are_written_and_read_bit_for_bit(
    ops: ModuleType, layout: CacheLayout, dtype: torch.dtype
) -> None:
    sizes = torch.logspace(-8, 5, 12).unsqueeze(1)
    together = (torch.randn(12, layout.latent_dim + layout.rope_dim + 5) * sizes).to(dtype).to(DEVICE)
    latent, key, _ = together.split((layout.latent_dim, layout.rope_dim, 5), dim=1)
    latent[1, 7], latent[2, 100], latent[3] = math.nan, -math.inf, 0
    slots = torch.randperm(3 * 64)[:12].to(DEVICE)
    pages = torch.full((3, 64, layout.latent_row_bytes), 0xFF, dtype=torch.uint8, device=DEVICE)
    expected = pages.clone()
    reference.write_latents(expected, slots, latent, key, layout)
    ops.write_latents(pages, slots, latent, key, layout)
    assert torch.equal(pages, expected)
    wanted = torch.stack((slots, slots.roll(1))).to(torch.int64)
    wanted[0, :8] = torch.tensor([*NOWHERE, 3 * 64, -5])
    actual, expected = ops.read_latents(pages, wanted, layout), reference.read_latents(pages, wanted, layout)
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32)) or torch.equal(
        actual.nan_to_num(7.5), expected.nan_to_num(7.5)
    )


@pytest.mark.parametrize(
    ("rows", "heads"), [(3, 4), pytest.param(1000, 128, marks=gpu), pytest.param(1, 128, marks=gpu)]
)
def test_latents_are_rotated_and_written(ops: ModuleType, rows: int, heads: int) -> None:
    query = torch.randn(rows, heads, 192).bfloat16().to(DEVICE)[..., 128:]
    latent, key, _ = torch.randn(rows, 640).bfloat16().to(DEVICE).split((512, 64, 64), dim=1)
    norm_weight = torch.rand(512, device=DEVICE) + 0.5
    angles = torch.rand(rows, 1, 32, device=DEVICE) * 1000
    pages = torch.full((rows // 16 + 1, 64, 656), 0xFF, dtype=torch.uint8, device=DEVICE)
    expected_pages = pages.clone()
    slots = torch.randperm(64 * len(pages))[:rows].to(DEVICE)
    operands = (query, latent, key, norm_weight, 1e-6, angles.cos(), angles.sin())
    roped = ops.rotate_latents(*operands, pages, slots, FP8)
    expected = reference.rotate_latents(*operands, expected_pages, slots, FP8)
    assert torch.equal(roped, expected)
    everything = torch.arange(64 * len(pages), device=DEVICE)
    untouched = torch.ones_like(everything, dtype=torch.bool).index_fill_(0, slots, False)
    assert (pages.view(-1, 656)[untouched] == 0xFF).all()
    actual = reference.read_latents(pages, slots, FP8)
    wanted = reference.read_latents(expected_pages, slots, FP8)
    assert torch.equal(actual[:, 512:], wanted[:, 512:])
    # The sum of squares has another order: a number at the border of two codes may fall to the other side.
    assert (actual != wanted).float().mean() < 1e-3
    torch.testing.assert_close(actual, wanted, rtol=0.13, atol=0.01)


def test_reference_rotates_latents_as_its_parts_do() -> None:
    from workers.layers import RMSNorm

    query, latent, key = torch.randn(5, 3, 64), torch.randn(5, 512), torch.randn(5, 64)
    weight, angles, slots = torch.rand(512), torch.rand(5, 1, 32) * 1000, torch.randperm(64)[:5]
    for layout in LAYOUTS.values():
        pages = torch.zeros(1, 64, layout.latent_row_bytes, dtype=torch.uint8)
        expected = pages.clone()
        roped = reference.rotate_latents(
            query, latent, key, weight, 1e-6, angles.cos(), angles.sin(), pages, slots, layout
        )
        rope = (angles.cos(), angles.sin())
        roped_key = rotate_neighbours(key.unsqueeze(1), *rope).squeeze(1)
        reference.write_latents(expected, slots, RMSNorm(weight, 1e-6, reference)(latent), roped_key, layout)
        assert torch.equal(roped, rotate_neighbours(query, *rope))
        assert torch.equal(pages, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")
@pytest.mark.parametrize("rows", [2, 16, 300])
def test_bits_repeat_and_graphs_replay(ops: ModuleType, rows: int) -> None:
    case = case_of([5000] * 2, [rows // 2] * 2, 128)
    slots = random_slots(case, 2048)
    expected = [*sparse(ops, case, slots), *dense(ops, case)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [*sparse(ops, case, slots), *dense(ops, case)]
    for _ in range(3):
        for tensor in captured:
            tensor.fill_(math.nan)
        graph.replay()
        again = [*sparse(ops, case, slots), *dense(ops, case)]
        for first, second, third in zip(expected, captured, again, strict=True):
            assert torch.equal(first, second)
            assert torch.equal(first, third)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")
def test_every_code_is_dequantised(ops: ModuleType) -> None:
    """A row whose only token holds each e4m3 code: what comes out is that token."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(2)
    codes[(codes & 0x7F) == 0x7F] = 0
    pages = torch.full((1, 64, 656), 0xFF, dtype=torch.uint8)
    scales = torch.tensor([2.0**-13, 1.0, 2.0**-22, 64.0])
    pages[0, 9] = torch.cat((codes, scales.view(torch.uint8), torch.randn(64).bfloat16().view(torch.uint8)))
    pages = pages.to(DEVICE)
    slots = torch.tensor([[9] + [-1] * 63], dtype=torch.int32, device=DEVICE)
    for heads in (16, 128):
        query = torch.randn(1, heads, 576, device=DEVICE).bfloat16() * 0.01
        out, _ = ops.sparse_mla(query, pages, slots, SOFTMAX_SCALE, FP8)
        expected = reference.read_latents(pages, slots[0, :1], FP8)[0, :512].bfloat16()
        assert torch.equal(out[0], expected.expand(heads, -1))
