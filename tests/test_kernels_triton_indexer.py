"""The indexer of the Triton back end against the reference: on the CPU through Triton's interpreter, small; on a GPU at real sizes."""

from types import ModuleType

import pytest
import torch
from exact_interpreter import prepare

from kernels import reference
from kernels.layout import CacheLayout
from kernels.testing import LAYOUTS, Case, difference, make_case

FP8 = LAYOUTS["fp8"]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")]
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, where hardware gives infinity or NaN


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    prepare()
    from kernels import triton_ops

    return triton_ops


def case_of(contexts: list[int], queries: list[int], heads: int) -> Case:
    return make_case(contexts, queries, heads=1, index_heads=heads, dtype=torch.bfloat16, device=DEVICE)


CASES = [
    ([700, 65, 30], [5, 2, 3], 4),
    ([300, 400], [1, 1], 16),
    ([129], [7], 64),
    pytest.param([9000, 4100, 100], [300, 65, 40], 64, marks=gpu),
    pytest.param([40_000], [2048], 64, marks=gpu),
    pytest.param([9000, 3, 64, 5000], [1, 1, 1, 1], 64, marks=gpu),
]


@pytest.mark.parametrize(("contexts", "queries", "heads"), CASES)
def test_selections_are_those_of_the_scores(
    ops: ModuleType, contexts: list[int], queries: list[int], heads: int
) -> None:
    """The products of the FP8 units have short sums: scores are near the reference's, and each selection is exact for its own."""
    case, topk = case_of(contexts, queries, heads), 64 if max(contexts) < 2048 else 2048
    selected = ops.select_tokens(
        case.index_q, case.index_weights, case.index_pages, case.rows, topk, case.layout
    )
    starts = case.rows.query_starts
    for request, context in enumerate(contexts):
        own = case.only(range(starts[request], starts[request + 1]))
        arguments = (own.index_q, own.index_weights, own.index_pages, own.rows, own.layout)
        scores = ops.index_scores(*arguments)
        visible = torch.arange(context, device=DEVICE) <= own.rows.positions.unsqueeze(1)
        expected = reference.index_scores(*arguments)
        assert difference(scores[visible], expected[visible]) < 1e-7
        assert not visible.logical_not().logical_and(scores != -torch.inf).any()
        picks = reference.top_k(scores, own.rows.positions + 1, topk)
        slots = case.slots_of(request, context)[picks.clamp(min=0).long()].int().masked_fill(picks < 0, -1)
        assert torch.equal(selected[starts[request] : starts[request + 1]], slots)


def test_selecting_twice_gives_the_same(ops: ModuleType) -> None:
    case = case_of([700, 300], [9, 2], 4)
    first, second = (
        ops.select_tokens(case.index_q, case.index_weights, case.index_pages, case.rows, 64, FP8)
        for _ in range(2)
    )
    assert torch.equal(first, second)


def angles(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    turned = (torch.rand(rows, 1, 32) * 1000).to(DEVICE)
    return turned.cos(), turned.sin()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [2, 65])
def test_turned_queries(ops: ModuleType, heads: int, dtype: torch.dtype) -> None:
    projected = torch.randn(5, heads * 128 + 64).to(DEVICE, dtype)
    queries = projected[:, 64:].unflatten(1, (heads, 128))
    rope = angles(5)
    turned, expected = (back_end.rotate_index_queries(queries, *rope) for back_end in (ops, reference))
    assert turned.dtype == dtype
    assert difference(turned, expected) < (1e-5 if dtype == torch.bfloat16 else 1e-12)


def test_turned_keys_are_cached(ops: ModuleType) -> None:
    projected = torch.randn(20, 320).to(DEVICE, torch.bfloat16)
    weight, bias = (torch.rand(128) + 0.5).to(DEVICE), torch.randn(128).to(DEVICE)
    slots, rope = torch.randperm(192)[:20].to(DEVICE), angles(20)
    caches = []
    for back_end in (ops, reference):
        pages = torch.zeros(3, FP8.index_page_bytes, dtype=torch.uint8, device=DEVICE)
        back_end.rotate_index_keys(projected[:, 128:256], weight, bias, 1e-6, *rope, pages, slots, FP8)
        caches.append(reference.read_index_keys(pages, torch.arange(192, device=DEVICE), FP8))
    # Another order of additions: a number at the border of two codes may fall to the other side.
    assert (caches[0] != caches[1]).float().mean() < 1e-2
    torch.testing.assert_close(*caches, rtol=0.13, atol=0.01)


def test_written_keys_have_the_bytes_of_the_reference(ops: ModuleType) -> None:
    keys, slots = torch.randn(20, 128).to(DEVICE), torch.randperm(192)[:20].to(DEVICE)
    mine, theirs = (torch.zeros(3, FP8.index_page_bytes, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    ops.write_index_keys(mine, slots, keys, FP8)
    reference.write_index_keys(theirs, slots, keys, FP8)
    assert torch.equal(mine, theirs)


def test_unquantised_caches_are_refused(ops: ModuleType) -> None:
    pages = torch.zeros(1, LAYOUTS["fp32"].index_page_bytes, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match=r"layout\.quantized must be True"):
        ops.write_index_keys(pages, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 128), LAYOUTS["fp32"])


@pytest.mark.parametrize("layout", [CacheLayout(512, 64, 256)], ids=["index_dim 256"])
def test_other_key_sizes_are_refused(ops: ModuleType, layout: CacheLayout) -> None:
    pages = torch.zeros(1, layout.index_page_bytes, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="index_dim is 256"):
        ops.write_index_keys(pages, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 256), layout)
