"""Top-k of the Triton back end against the reference: on the CPU through Triton's interpreter, on a GPU at full sizes."""

import math
from types import ModuleType

import pytest
import torch
from exact_interpreter import prepare

from kernels import reference

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOPK = 2048 if ON_GPU else 64
WIDTH = 40000 if ON_GPU else 1100
LENGTHS = [0, 1, 63, 64, 65, TOPK + 1, WIDTH // 2, WIDTH]
if ON_GPU:
    LENGTHS += [TOPK - 1, TOPK, 2 * TOPK, WIDTH - 1]
KINDS = ["normal", "equal", "few", "traps", "sorted", "periodic"]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where hardware gives NaN


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    prepare()
    from kernels.triton_ops import topk

    if not ON_GPU:  # several tiles and parts in small rows
        topk.TILE, topk.MIN_GROUPS, topk.PROGRAMS = 128, 256, 16
    return topk


def scores_of(kind: str, num_rows: int, width: int) -> torch.Tensor:
    if kind == "equal":
        return torch.full((num_rows, width), -1.75, device=DEVICE)
    if kind == "few":
        return torch.randint(-3, 3, (num_rows, width), device=DEVICE).float()
    scores = torch.randn(num_rows, width, device=DEVICE)
    if kind == "traps":
        values = torch.tensor(
            [math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-45, -1e-45], device=DEVICE
        )
        scores = torch.where(scores < -1.2, scores, values[torch.randint(8, scores.shape, device=DEVICE)])
    if kind == "sorted":
        scores = scores.sort(1).values
    if kind == "periodic":  # the groups' bests all lie in few groups
        scores = scores[:, :256].repeat(1, -(-width // 256))[:, :width] + scores * 1e-3
    return scores.contiguous()


def lengths_of(values: list[int], width: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor([min(value, width) for value in values], device=DEVICE, dtype=dtype)


def hide(scores: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """NaN, which would win, in what no row may look at."""
    positions = torch.arange(scores.shape[1], device=DEVICE)
    return scores.masked_fill(positions >= lengths.unsqueeze(1), math.nan)


@pytest.mark.parametrize(("kind", "width"), [*((kind, WIDTH) for kind in KINDS), ("traps", TOPK + 37)])
def test_agrees(ops: ModuleType, kind: str, width: int) -> None:
    lengths = lengths_of(LENGTHS, width)
    scores = hide(scores_of(kind, len(LENGTHS), width), lengths)
    assert torch.equal(ops.top_k(scores, lengths, TOPK), reference.top_k(scores, lengths, TOPK))


@pytest.mark.parametrize("programs", [1, 300] if ON_GPU else [1, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_however_rows_are_divided(
    ops: ModuleType, monkeypatch: pytest.MonkeyPatch, programs: int, kind: str
) -> None:
    monkeypatch.setattr(ops, "PROGRAMS", programs)
    lengths = lengths_of([WIDTH, 4 * TOPK + 5], WIDTH)
    scores = hide(scores_of(kind, 2, WIDTH), lengths)
    assert torch.equal(ops.top_k(scores, lengths, TOPK), reference.top_k(scores, lengths, TOPK))


@pytest.mark.parametrize("topk", [1, 48])
def test_any_topk(ops: ModuleType, topk: int) -> None:
    lengths = lengths_of([WIDTH, 1, 100], WIDTH)
    scores = hide(scores_of("normal", 3, WIDTH), lengths)
    assert torch.equal(ops.top_k(scores, lengths, topk), reference.top_k(scores, lengths, topk))


def test_more_than_there_are(ops: ModuleType) -> None:
    for width in (0, 3):
        scores, lengths = torch.randn(2, width, device=DEVICE), lengths_of([width, 0], width)
        assert torch.equal(ops.top_k(scores, lengths, 64), reference.top_k(scores, lengths, 64))
    assert ops.top_k(torch.empty(0, 5, device=DEVICE), lengths_of([], 5), 2).shape == (0, 2)


@pytest.mark.parametrize("width", [WIDTH, TOPK + 37])
def test_slots_of_strided_rows(ops: ModuleType, width: int) -> None:
    lengths = lengths_of([width, TOPK, 5, 0, TOPK + 1], width, torch.int32)
    wide = torch.full((5, width + 77), math.nan, device=DEVICE)
    scores = wide[:, :width]
    scores.copy_(hide(scores_of("normal", 5, width), lengths))
    table = torch.randperm(3 * (width // 64 + 1), device=DEVICE).int().view(3, -1)
    owners = torch.tensor([2, 0, 1, 1, 2], dtype=torch.int32, device=DEVICE)
    picks = reference.top_k(scores, lengths.long(), TOPK)
    pages = table[owners.long()].gather(1, picks.clamp(min=0).long() // 64)
    expected = (pages * 64 + picks % 64).masked_fill(picks < 0, -1)
    assert torch.equal(ops.top_k_slots(scores, lengths, TOPK, table, owners), expected)


def test_other_types_are_refused(ops: ModuleType) -> None:
    with pytest.raises(ValueError, match="float32"):
        ops.top_k(torch.zeros(1, 4).half(), torch.tensor([4]), 2)
    with pytest.raises(ValueError, match="contiguous"):
        ops.top_k(torch.zeros(4, 4).T, torch.tensor([4] * 4), 2)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1 << 20), (2, 1 << 20), (40, 131072), (300, 100000)])
def test_long_rows(ops: ModuleType, num_rows: int, width: int) -> None:
    lengths = torch.randint(width // 2, width + 1, (num_rows,), device=DEVICE)
    for kind in KINDS:
        scores = hide(scores_of(kind, num_rows, width), lengths)
        assert torch.equal(ops.top_k(scores, lengths, TOPK), reference.top_k(scores, lengths, TOPK))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")
@pytest.mark.parametrize("width", [8192, 131072])
def test_graphs_replay(ops: ModuleType, width: int) -> None:
    scores, lengths = torch.randn(8, width, device=DEVICE), lengths_of([width] * 8, width)
    ops.top_k(scores, lengths, TOPK)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        picks = ops.top_k(scores, lengths, TOPK)
    for _ in range(3):
        scores.normal_()
        lengths.random_(width // 2, width)
        picks.fill_(-7)
        graph.replay()
        assert torch.equal(picks, reference.top_k(scores, lengths, TOPK))
