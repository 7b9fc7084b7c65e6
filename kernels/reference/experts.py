"""The routed experts of a mixture: each token through the experts chosen for it. Knows nothing of how they are chosen."""

import torch

from kernels.dispatch import ExpertWeights
from kernels.reference.linear import linear
from kernels.reference.norm import swiglu
from kernels.reference.quant import dequantize_blocks, dequantize_weight, quantize_blocks


def prepare_experts(
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
) -> ExpertWeights:
    """The matrices of E experts -> what expert_mlp takes: here, dequantised, each expert's gate over its up matrix.

    gate_up:       e4m3 or float [E, 2, I, D], gate and up
    gate_up_scale: fp32 [E, 2, ceil(I / 128), ceil(D / 128)], None for float matrices
    down:          e4m3 or float [E, D, I]
    down_scale:    fp32 [E, ceil(D / 128), ceil(I / 128)], None for float matrices
    """
    if gate_up_scale is None or down_scale is None:
        return ExpertWeights((gate_up.flatten(1, 2), down), quantized=False)
    flat = zip(gate_up.flatten(0, 1), gate_up_scale.flatten(0, 1), strict=True)
    wide = torch.stack([dequantize_weight(weight, scale) for weight, scale in flat])
    back = [dequantize_weight(weight, scale) for weight, scale in zip(down, down_scale, strict=True)]
    return ExpertWeights(
        (wide.unflatten(0, (-1, 2)).flatten(1, 2), torch.stack(back)),
        quantized=True,
    )


def expert_mlp(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    prepared: ExpertWeights,
    start: torch.Tensor | None = None,
    num_blocks: int = 1,
) -> torch.Tensor:
    """start plus the sum over a token's picks of weight * down(silu(gate(x)) * up(x)), in fp32, the first pick first.

    x:       [T, D]
    experts: integer [T, k]; whatever lies outside 0 .. E - 1 is another rank's and adds nothing
    weights: fp32 [T, k]
    start:   [T, D], zeros by default
    num_blocks: a power of two that divides E. If it is more than one, the picks of each such part of the experts are added up by
             themselves, then neighbouring parts in pairs, the pairs in pairs and so on, and start last: so ranks that have a
             branch of that tree each can add up the same bits.
    Returns fp32 [T, D]. An expert's output is rounded to x's dtype before it is weighed. FP8 experts see x and what lies
    between their matrices quantised.
    """
    num_experts = len(prepared.tensors[0])
    picks = experts.shape[1]
    chosen = experts.flatten().long()
    mine = (chosen >= 0) & (chosen < num_experts)
    order = chosen.masked_fill(~mine, num_experts).argsort()  # picks of all tokens, expert after expert
    counts = chosen[mine].bincount(minlength=num_experts).tolist()
    rows = _as_read(x, prepared.quantized)[order[: sum(counts)] // picks]
    outputs = x.new_zeros(len(chosen), x.shape[1])
    parts = zip(*prepared.tensors, rows.split(counts), order[: len(rows)].split(counts), strict=True)
    for gate_up, down, part, where in parts:
        if len(part):
            outputs[where] = _mlp(part, gate_up, down, prepared.quantized)
    by_pick = outputs.unflatten(0, (-1, picks))
    total = torch.zeros_like(x, dtype=torch.float32) if start is None else start.float()
    if num_blocks > 1:
        return total + _add_by_block(
            by_pick, weights, chosen.view(-1, picks) // (num_experts // num_blocks), num_blocks
        )
    for pick in range(picks):
        total = total + by_pick[:, pick].float() * weights[:, pick, None]
    return total


def _add_by_block(
    by_pick: torch.Tensor, weights: torch.Tensor, blocks: torch.Tensor, num_blocks: int
) -> torch.Tensor:
    """by_pick [T, k, D], weights fp32 [T, k], blocks int64 [T, k] -> fp32 [T, D]."""
    number = torch.arange(num_blocks, device=blocks.device).unsqueeze(1)
    sums = by_pick.new_zeros(num_blocks, len(by_pick), by_pick.shape[2], dtype=torch.float32)
    for pick in range(by_pick.shape[1]):
        part = by_pick[:, pick].float() * weights[:, pick, None]
        sums = torch.where((blocks[:, pick] == number).unsqueeze(-1), sums + part, sums)
    while len(sums) > 1:
        sums = sums[0::2] + sums[1::2]
    return sums[0]


def _mlp(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, quantized: bool) -> torch.Tensor:
    """x [t, D] as _as_read gives it, gate_up [2 * I, D], down [D, I] -> [t, D] in x's dtype."""
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    return linear(_as_read(swiglu(gate, up), quantized), down)


def _as_read(x: torch.Tensor, quantized: bool) -> torch.Tensor:
    """What a product sees of its activations, in their dtype: exact, since an e4m3 times a power of two fits bf16 as well."""
    return dequantize_blocks(*quantize_blocks(x)).to(x.dtype) if quantized else x
