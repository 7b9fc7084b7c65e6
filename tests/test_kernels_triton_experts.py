"""Gate and experts of the Triton back end against the reference: on the CPU through Triton's interpreter, small; on a GPU at
the sizes of the model.
"""

from types import ModuleType

import pytest
import torch
from exact_interpreter import prepare

from kernels import reference
from kernels.dispatch import ExpertWeights
from kernels.testing import difference

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, where hardware gives infinity or NaN
# FP8 units sum with 14 bits, and what lies between the products may round to another e4m3 than in the reference.
CLOSE = 5e-5 if ON_GPU else 1e-5
gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")]


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    prepare()
    from kernels import triton_ops

    return triton_ops


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape)).to(dtype).to(DEVICE)


# Gate

GATES = [
    (5, 256, {"num_experts": 8, "num_groups": 4, "kept_groups": 2, "num_chosen": 2}),
    (17, 200, {"num_experts": 36, "num_groups": 3, "kept_groups": 2, "num_chosen": 3}),
    *(
        pytest.param(
            rows, 7168, {"num_experts": 256, "num_groups": 8, "kept_groups": 4, "num_chosen": 8}, marks=gpu
        )
        for rows in (1, 32, 1000)
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_rows", "channels", "sizes"), GATES)
def test_gate(
    ops: ModuleType, num_rows: int, channels: int, sizes: dict[str, int], dtype: torch.dtype
) -> None:
    sizes = dict(sizes)
    num_experts = sizes.pop("num_experts")
    x, weight = random(num_rows, channels, dtype=dtype), random(num_experts, channels, scale=channels**-0.5)
    bias = random(num_experts, scale=0.1)
    experts, weights = ops.choose_experts(x, weight, bias, **sizes, scale=2.5)
    again = ops.choose_experts(x, weight, bias, **sizes, scale=2.5)
    assert torch.equal(experts, again[0])
    assert torch.equal(weights, again[1])
    expected, expected_weights = reference.choose_experts(
        x.double().float(), weight, bias, **sizes, scale=2.5
    )
    assert experts.dtype == torch.int32
    same = (experts == expected).all(1)
    assert (~same).sum() <= num_rows // 200  # two scores may be as close as rounding
    torch.testing.assert_close(weights[same], expected_weights[same], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", [0.0, -3.0])
def test_ties_go_to_the_lowest_index(ops: ModuleType, level: float) -> None:
    x, weight = torch.full((2, 256), level, device=DEVICE), torch.ones(32, 256, device=DEVICE)
    sizes = {"num_groups": 8, "kept_groups": 3, "num_chosen": 5}
    bias = torch.zeros(32, device=DEVICE)
    assert ops.choose_experts(x, weight, bias, **sizes, scale=1.0)[0].tolist() == [[0, 1, 2, 3, 4]] * 2
    bias[9] = bias[30] = 0.5
    assert ops.choose_experts(x, weight, bias, **sizes, scale=1.0)[0].tolist() == [[9, 30, 0, 1, 2]] * 2


# Experts


def fp8_matrices(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [
        reference.quantize_weight(random(*shape[-2:], scale=shape[-1] ** -0.5))
        for _ in range(torch.Size(shape[:-2]).numel())
    ]
    values, scales = (torch.stack(part).unflatten(0, shape[:-2]) for part in zip(*pairs, strict=True))
    return values, scales


def both(ops: ModuleType, count: int, hidden: int, channels: int) -> tuple[ExpertWeights, ExpertWeights]:
    stored = (*fp8_matrices(count, 2, channels, hidden), *fp8_matrices(count, hidden, channels))
    return ops.prepare_experts(*stored), reference.prepare_experts(*stored)


def picks(num_tokens: int, count: int, chosen: int) -> torch.Tensor:
    order = torch.rand(num_tokens, count).argsort(1)[:, :chosen]
    return order.int().to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("num_tokens", "count", "hidden", "channels"),
    [
        (3, 4, 256, 128),
        (40, 3, 128, 64),
        *(pytest.param(tokens, 8, 1024, 512, marks=gpu) for tokens in (1, 33, 100, 300, 2000)),
    ],
)
def test_experts(
    ops: ModuleType, num_tokens: int, count: int, hidden: int, channels: int, dtype: torch.dtype
) -> None:
    mine, theirs = both(ops, count, hidden, channels)
    x, experts, weights = (
        random(num_tokens, hidden, dtype=dtype),
        picks(num_tokens, count, 2),
        random(num_tokens, 2).abs(),
    )
    start = random(num_tokens, hidden, dtype=dtype)
    out = ops.expert_mlp(x, experts, weights, mine, start)
    assert out.dtype == torch.float32
    assert difference(out, reference.expert_mlp(x, experts, weights, theirs, start)) < CLOSE
    assert torch.equal(ops.expert_mlp(x, experts, weights, mine, start), out)
    plain = ops.expert_mlp(x, experts.long(), weights, mine)
    assert difference(plain, reference.expert_mlp(x, experts, weights, theirs)) < CLOSE


@pytest.mark.parametrize("absent", [-1, -(2**31), 4, 2**31 - 1])
def test_experts_elsewhere_add_nothing(ops: ModuleType, absent: int) -> None:
    mine, theirs = both(ops, 4, 128, 128)
    x, weights = random(3, 128), random(3, 2).abs()
    experts = torch.tensor([[0, absent], [absent, absent], [1, 3]], dtype=torch.int32, device=DEVICE)
    out = ops.expert_mlp(x, experts, weights, mine)
    assert not out[1].any()
    assert difference(out, reference.expert_mlp(x, experts, weights, theirs)) < CLOSE


@pytest.mark.parametrize("num_blocks", [2, 4, 8])
def test_branches_of_the_experts_add_up_to_the_bits_of_all(ops: ModuleType, num_blocks: int) -> None:
    """Two ranks with half of the experts each, and one with all of them."""
    mine, theirs = both(ops, 8, 128, 128)
    x, experts, weights = random(5, 128), picks(5, 8, 4), random(5, 4).abs()
    whole = ops.expert_mlp(x, experts, weights, mine, x, num_blocks)
    assert difference(whole, reference.expert_mlp(x, experts, weights, theirs, x, num_blocks)) < CLOSE
    halves = [part(mine, 8, rank) for rank in range(2)]
    parts = [
        ops.expert_mlp(x, experts - 4 * rank, weights, halves[rank], None, num_blocks // 2)
        for rank in range(2)
    ]
    assert torch.equal(x + (parts[0] + parts[1]), whole)


def part(prepared: ExpertWeights, count: int, rank: int) -> ExpertWeights:
    """Half of the experts, as the back end keeps them: under each other."""
    tensors = tuple(
        tensor.unflatten(0, (count, -1)).chunk(2)[rank].flatten(0, 1) for tensor in prepared.tensors
    )
    return ExpertWeights(tensors, prepared.quantized)


@pytest.mark.parametrize(("num_tokens", "count", "tile"), [(1, 4, 16), (150, 5, 16), (70, 40, 32)])
def test_rows_are_placed_by_expert_and_in_order(
    ops: ModuleType, num_tokens: int, count: int, tile: int
) -> None:
    from kernels.triton_ops.experts import place_rows

    experts = torch.randint(-1, count + 1, (num_tokens, 3), dtype=torch.int32).to(DEVICE)
    positions, matrices = place_rows(experts, count, tile)
    flat, rows = experts.flatten().tolist(), positions.flatten().tolist()
    expected: dict[int, int] = {}
    row = 0
    for expert in range(count):
        chosen = [pick for pick, owner in enumerate(flat) if owner == expert]
        expected |= {pick: row + rank for rank, pick in enumerate(chosen)}
        row += -(-len(chosen) // tile) * tile
    assert rows == [expected.get(pick, -1) for pick in range(len(flat))]
    owners = {position // tile: flat[pick] for pick, position in expected.items()}
    assert matrices.tolist() == [owners.get(index, -1) for index in range(len(matrices))]


def test_all_tokens_at_one_expert(ops: ModuleType) -> None:
    mine, theirs = both(ops, 4, 128, 128)
    x, experts = (
        random(20, 128, dtype=torch.bfloat16),
        torch.full((20, 1), 2, dtype=torch.int32, device=DEVICE),
    )
    weights = torch.ones(20, 1, device=DEVICE)
    out = ops.expert_mlp(x, experts, weights, mine)
    assert difference(out, reference.expert_mlp(x, experts, weights, theirs)) < CLOSE


def test_no_tokens(ops: ModuleType) -> None:
    mine, _ = both(ops, 2, 128, 128)
    none = torch.empty(0, 2, dtype=torch.int32, device=DEVICE)
    assert ops.expert_mlp(random(0, 128), none, random(0, 2), mine).shape == (0, 128)


def test_experts_that_are_not_fp8_are_refused(ops: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"experts must be FP8, but these are torch\.bfloat16"):
        ops.prepare_experts(
            random(2, 2, 128, 128, dtype=torch.bfloat16),
            None,
            random(2, 128, 128, dtype=torch.bfloat16),
            None,
        )


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")
def test_one_graph_serves_every_routing(ops: ModuleType) -> None:
    mine, theirs = both(ops, 16, 256, 128)
    x, experts, weights = random(24, 256, dtype=torch.bfloat16), picks(24, 16, 4), random(24, 4).abs()
    ops.expert_mlp(x, experts, weights, mine)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.expert_mlp(x, experts, weights, mine)
    for _ in range(3):
        experts.copy_(picks(24, 16, 4))
        out.fill_(torch.nan)
        graph.replay()
        assert difference(out, reference.expert_mlp(x, experts, weights, theirs)) < CLOSE
