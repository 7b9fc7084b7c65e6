"""Gate and experts of the reference against plain definitions, token by token."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.reference import (
    choose_experts,
    dequantize_blocks,
    dequantize_weight,
    expert_mlp,
    prepare_experts,
    quantize_blocks,
    quantize_weight,
    swiglu,
)
from kernels.reference.norm import sigmoid

EXPERTS, HIDDEN, CHANNELS = 5, 256, 192
FLOAT = (torch.randn(EXPERTS, 2, CHANNELS, HIDDEN) / 16, torch.randn(EXPERTS, HIDDEN, CHANNELS) / 14)


def quantize_experts(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float [..., N, K] -> e4m3 and scales, matrix by matrix."""
    pairs = [quantize_weight(matrix) for matrix in matrices.flatten(0, -3)]
    values, scales = (
        torch.stack(part).unflatten(0, matrices.shape[:-2]) for part in zip(*pairs, strict=True)
    )
    return values, scales


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


def rounded(x: torch.Tensor) -> torch.Tensor:
    return dequantize_blocks(*quantize_blocks(x))


# Experts


@pytest.mark.parametrize(("fp8", "read"), [(False, identity), (True, rounded)])
def test_a_token_goes_through_its_experts(fp8: bool, read: Callable[[torch.Tensor], torch.Tensor]) -> None:
    gate_up, down = FLOAT
    if fp8:
        stored = (*quantize_experts(gate_up), *quantize_experts(down))
        flat = [
            dequantize_weight(*pair)
            for pair in zip(stored[0].flatten(0, 1), stored[1].flatten(0, 1), strict=True)
        ]
        gate_up = torch.stack(flat).view_as(gate_up)
        down = torch.stack([dequantize_weight(*pair) for pair in zip(*stored[2:], strict=True)])
        prepared = prepare_experts(*stored)
    else:
        prepared = prepare_experts(gate_up, None, down, None)
    x, weights, start = torch.randn(9, HIDDEN), torch.rand(9, 2), torch.randn(9, HIDDEN)
    experts = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(9)])
    out = expert_mlp(x, experts, weights, prepared, start)
    expected = start.double()
    for token in range(9):
        for pick in range(2):
            gate, up = (read(x[token]) @ part.T for part in gate_up[experts[token, pick]])
            inner = read(swiglu(gate, up)).double()
            expected[token] += weights[token, pick] * (inner @ down[experts[token, pick]].double().T)
    torch.testing.assert_close(out.double(), expected, atol=1e-3 if fp8 else 1e-5, rtol=1e-5)
    assert out.dtype == torch.float32


def test_bits_of_a_token_do_not_depend_on_the_others() -> None:
    prepared = prepare_experts(*quantize_experts(FLOAT[0]), *quantize_experts(FLOAT[1]))
    x, weights = torch.randn(90, HIDDEN), torch.rand(90, 2)
    experts = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(90)])
    whole = expert_mlp(x, experts, weights, prepared)
    for rows in (slice(0, 1), slice(3, 20), slice(89, 90), slice(1, 90)):
        assert torch.equal(expert_mlp(x[rows], experts[rows], weights[rows], prepared), whole[rows])


@pytest.mark.parametrize("absent", [-1, -(2**31), EXPERTS, 2**31 - 1])
def test_experts_elsewhere_add_nothing(absent: int) -> None:
    prepared = prepare_experts(FLOAT[0], None, FLOAT[1], None)
    x, weights = torch.randn(3, HIDDEN), torch.rand(3, 2)
    experts = torch.tensor([[0, absent], [absent, absent], [1, 4]], dtype=torch.int32)
    out = expert_mlp(x, experts, weights, prepared)
    assert not out[1].any()
    assert torch.equal(out[:1], expert_mlp(x[:1], experts[:1, :1], weights[:1, :1], prepared))


def test_no_tokens() -> None:
    prepared = prepare_experts(FLOAT[0], None, FLOAT[1], None)
    out = expert_mlp(
        torch.empty(0, HIDDEN), torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2), prepared
    )
    assert out.shape == (0, HIDDEN)


# Gate


def choose(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight experts in four groups, two groups kept, two experts a token; the logits are the input itself."""
    return choose_experts(logits, torch.eye(8), bias, num_groups=4, kept_groups=2, num_chosen=2, scale=2.5)


@given(
    logits=st.lists(st.integers(-4, 4), min_size=8, max_size=8),
    bias=st.lists(st.integers(-2, 2), min_size=8, max_size=8),
)
def test_gate(logits: list[int], bias: list[int]) -> None:
    """Few distinct values, so that ties are everywhere."""
    experts, weights = choose(torch.tensor([logits]).float(), torch.tensor(bias).float())
    scores = sigmoid(torch.tensor(logits).float())
    choice = (scores + torch.tensor(bias)).tolist()
    groups = [choice[i] + choice[i + 1] for i in range(0, 8, 2)]
    kept = sorted(range(4), key=lambda g: (-groups[g], g))[:2]
    best = sorted((e for e in range(8) if e // 2 in kept), key=lambda e: (-choice[e], e))[:2]
    assert experts.tolist() == [best]
    torch.testing.assert_close(weights[0], scores[best] / scores[best].sum() * 2.5)


def test_the_bias_chooses_but_does_not_weigh() -> None:
    experts, weights = choose(torch.zeros(1, 8), torch.tensor([0.0, 0, 0, 0, 0, 0, 9, 9]))
    assert experts.tolist() == [[6, 7]]
    assert experts.dtype == torch.int32
    assert weights.tolist() == [[1.25, 1.25]]
