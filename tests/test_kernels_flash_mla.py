"""The adapters to DeepSeek's kernels compute what the reference computes: on a GPU with the kernels themselves, on a CPU, small, with
stand-ins for the packages and Triton's interpreter.

On a GPU they come from the installed packages `flash_mla` and `deep_gemm`, or from the folder that the environment variable PEERS
names: a vLLM wheel, unpacked.
"""

import os
from collections.abc import Iterator
from types import ModuleType

import deepseek_stand_ins
import exact_interpreter
import pytest
import torch

from kernels import reference
from kernels.bench_peers import add_peers
from kernels.dispatch import Sizes, choose
from kernels.layout import PAGE_SIZE
from kernels.testing import (
    LAYOUTS,
    SOFTMAX_SCALE,
    Case,
    difference,
    make_case,
    make_linear_case,
    spread_slots,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of garbage that nobody reads
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LAYOUT = LAYOUTS["fp8"]
HEADS, INDEX_HEADS, TOPK = (128, 64, 256) if ON_GPU else (2, 2, 64)
NO_SLOTS = (-1, -(2**31), -PAGE_SIZE, 2**31 - 1)  # and the first behind the last page


@pytest.fixture(scope="module")
def adapters() -> Iterator[ModuleType]:
    exact_interpreter.prepare()
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            deepseek_stand_ins.install(patch)
        elif "PEERS" in os.environ:
            add_peers(os.environ["PEERS"])
        pytest.importorskip("flash_mla")
        pytest.importorskip("deep_gemm")
        yield pytest.importorskip("kernels.flash_mla_ops")


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """What the allocator hands out next holds NaN."""
    if ON_GPU:
        torch.empty(2**28, dtype=torch.uint8, device=DEVICE).fill_(0xFF)


def attention_case(num_rows: int) -> tuple[Case, torch.Tensor]:
    """Rows of a long and of a short request; among their slots are ones that are none, and one row has no other."""
    short = num_rows // 3
    case = make_case(
        [12 * TOPK, TOPK + 100],
        [num_rows - short, short],
        heads=HEADS,
        dtype=torch.bfloat16,
        device=DEVICE,
        seed=num_rows,
    )
    slots = spread_slots(case, TOPK, seed=1)
    none = torch.tensor([*NO_SLOTS, len(case.latent_pages) * PAGE_SIZE], dtype=torch.int32, device=DEVICE)
    slots[:, ::7] = none.repeat(TOPK)[: slots[:, ::7].shape[1]]
    slots[num_rows // 2] = -1
    return case, slots


@pytest.mark.parametrize("num_rows", [1, 2, 17, 300] if ON_GPU else [3])
def test_sparse_attention(adapters: ModuleType, num_rows: int) -> None:
    case, slots = attention_case(num_rows)
    arguments = case.latent_pages, slots, SOFTMAX_SCALE, LAYOUT
    out, lse = adapters.sparse_mla(case.q, *arguments)
    expected, expected_lse = reference.sparse_mla(case.q.float(), *arguments)
    assert out.dtype == torch.bfloat16
    assert difference(out, expected) < 1e-5
    empty = num_rows // 2
    assert torch.all(lse[empty] == torch.inf)
    assert torch.all(out[empty] == 0)
    rest = torch.arange(num_rows, device=DEVICE) != empty
    assert difference(lse[rest], expected_lse[rest]) < 1e-8
    again, _ = adapters.sparse_mla(case.q, *arguments)
    assert torch.equal(out, again)


def test_both_kernels_of_sparse_attention_agree(
    adapters: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, slots = attention_case(8)
    arguments = case.q, case.latent_pages, slots, SOFTMAX_SCALE, LAYOUT
    decoded, _ = adapters.sparse_mla(*arguments)
    monkeypatch.setattr(adapters.attention, "DECODE_ROWS", 0)
    prefilled, _ = adapters.sparse_mla(*arguments)
    monkeypatch.setattr(adapters.attention, "WORKSPACE_TOKENS", 3 * TOPK)
    in_portions, _ = adapters.sparse_mla(*arguments)
    assert difference(prefilled, decoded) < 1e-5
    assert torch.equal(in_portions, prefilled)


def test_latents_are_gathered_once_each(adapters: ModuleType) -> None:
    case, slots = attention_case(8)
    latents, numbers = adapters.workspace.gather_latents(case.latent_pages, slots, LAYOUT)
    valid = (slots >= 0) & (slots < len(case.latent_pages) * PAGE_SIZE)
    assert torch.equal(numbers >= 0, valid)
    assert int(numbers.max()) + 1 == len(slots[valid].unique())
    expected = reference.read_latents(case.latent_pages, slots[valid], LAYOUT).bfloat16()
    assert torch.equal(latents[numbers[valid].long()], expected)


@pytest.mark.parametrize(
    ("contexts", "queries"),
    [([1000, 65, 64, 63, 1, 4000], [1, 1, 2, 1, 1, 2]), ([5000], [300]), ([700, 1, 3000], [300, 1, 200])]
    if ON_GPU
    else [([300, 65, 64, 63, 1], [1, 1, 2, 1, 1]), ([200], [3]), ([70, 1, 300], [6, 1, 4])],
    ids=["decode", "prefill", "several"],
)
def test_selection(adapters: ModuleType, contexts: list[int], queries: list[int]) -> None:
    case = make_case(contexts, queries, index_heads=INDEX_HEADS, heads=1, dtype=torch.bfloat16, device=DEVICE)
    arguments = case.index_q, case.index_weights, case.index_pages, case.rows, TOPK, LAYOUT
    selected = adapters.select_tokens(*arguments)
    expected = reference.select_tokens(*arguments)
    assert torch.equal(selected >= 0, expected >= 0)
    short = case.rows.positions < TOPK
    assert torch.equal(selected[short], expected[short])
    missed = sum(int((~torch.isin(a, e)).sum()) for a, e in zip(selected, expected, strict=True))
    assert missed <= 2e-3 * expected.numel()  # sums are rounded in another order
    assert torch.equal(selected, adapters.select_tokens(*arguments))


def test_scores(adapters: ModuleType) -> None:
    case = make_case(
        [700 if ON_GPU else 90], [65], index_heads=INDEX_HEADS, heads=1, dtype=torch.bfloat16, device=DEVICE
    )
    arguments = case.index_q, case.index_weights, case.index_pages, case.rows, LAYOUT
    actual, expected = adapters.index_scores(*arguments), reference.index_scores(*arguments)
    assert torch.equal(actual.isinf(), expected.isinf())
    seen = ~expected.isinf()
    assert difference(actual[seen], expected[seen]) < 1e-7


@pytest.mark.parametrize("rows", [1, 5, 130] if ON_GPU else [5])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(576, 7168), (192, 256), (80, 144)] if ON_GPU else [(80, 144)]
)
def test_linear(adapters: ModuleType, rows: int, outputs: int, inputs: int) -> None:
    case = make_linear_case(rows, outputs, inputs, dtype=torch.bfloat16, device=DEVICE)
    prepared = adapters.prepare_fp8_weight(case.weight, case.scale_inv)
    expected = reference.fp8_linear(case.x.float(), reference.prepare_fp8_weight(case.weight, case.scale_inv))
    actual = adapters.fp8_linear(case.x, prepared)
    assert actual.dtype == torch.bfloat16
    assert difference(actual, expected) < 1e-5


def test_matrices_that_deep_gemm_cannot_read_are_refused(adapters: ModuleType) -> None:
    case = make_linear_case(1, 24, 136, device=DEVICE)
    with pytest.raises(ValueError, match=r"\[24, 136\], but DeepGEMM takes multiples of 16"):
        adapters.prepare_fp8_weight(case.weight, case.scale_inv)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")
def test_decode_is_captured_in_a_graph(adapters: ModuleType) -> None:
    """Selection and attention of a step, replayed with other queries and one more token each."""
    case = make_case(
        [3000, 600], [1, 1], heads=HEADS, index_heads=INDEX_HEADS, dtype=torch.bfloat16, device=DEVICE
    )

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        slots = adapters.select_tokens(
            case.index_q, case.index_weights, case.index_pages, case.rows, TOPK, LAYOUT
        )
        return slots, adapters.sparse_mla(case.q, case.latent_pages, slots, SOFTMAX_SCALE, LAYOUT)[0]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        slots, out = step()
    case.index_q.copy_(case.index_q.flip(-1))
    case.q.copy_(case.q.flip(0))
    case.rows.positions.sub_(1)
    graph.replay()
    expected_slots, expected = step()
    assert torch.equal(slots, expected_slots)
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")
def test_choice_prefers_the_adapters_where_they_fit(adapters: ModuleType) -> None:
    ops = choose("cuda", Sizes(heads=HEADS, index_heads=INDEX_HEADS, topk=2048, layout=LAYOUT))
    assert ops.sparse_mla is adapters.sparse_mla
    assert ops.select_tokens is adapters.select_tokens
    few = choose("cuda", Sizes(heads=16, index_heads=INDEX_HEADS, topk=2048, layout=LAYOUT))
    assert few.sparse_mla is not adapters.sparse_mla
    with pytest.raises(ValueError, match="has no sparse_mla here: takes 64 or 128 heads, not 16"):
        choose("cuda", Sizes(heads=16, index_heads=INDEX_HEADS, topk=2048, layout=LAYOUT), "flash_mla")
