"""Routed experts by DeepGEMM's grouped products: rows in blocks of an expert for many tokens, a slab an expert for few.

Nothing waits for the host: how many tokens an expert gets is known on the device alone, and the buffers have room for the most
there can be.
"""

from typing import NamedTuple

import deep_gemm
import torch
import triton
import triton.language as tl

from kernels import triton_ops
from kernels.dispatch import ExpertWeights
from kernels.layout import QUANT_BLOCK
from kernels.triton_ops.experts import add_picks

SLAB_TOKENS = 128  # tokens up to which each expert has room for all of them


class Places(NamedTuple):
    """Where the picks' rows lie, expert after expert.

    rows:   int32 [T x k], the row of each pick; -1 for an expert of another rank
    counts: int32 [E], rows that each expert has
    ends:   int64 [E], where its block ends
    """

    rows: torch.Tensor
    counts: torch.Tensor
    ends: torch.Tensor


def prepare_experts(
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
) -> ExpertWeights:
    """As kernels.reference.prepare_experts: the matrices as they are. Float ones are Triton's, DeepGEMM's are FP8."""
    if gate_up_scale is None or down_scale is None:
        return triton_ops.prepare_experts(gate_up, gate_up_scale, down, down_scale)
    if down.shape[2] % QUANT_BLOCK:
        raise ValueError(f"experts are {down.shape[2]} wide, but DeepGEMM takes multiples of {QUANT_BLOCK}")
    parts = (gate_up.flatten(1, 2), gate_up_scale.flatten(1, 2), down, down_scale)
    return ExpertWeights(tuple(part.contiguous() for part in parts), quantized=True)


def expert_mlp(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    prepared: ExpertWeights,
    start: torch.Tensor | None = None,
    num_blocks: int = 1,
) -> torch.Tensor:
    """As kernels.reference.expert_mlp. What lies between the matrices and comes out of them is rounded to bf16."""
    if not prepared.quantized:
        return triton_ops.expert_mlp(x, experts, weights, prepared, start, num_blocks)
    gate_up, gate_up_scale, down, down_scale = prepared.tensors
    num_experts, slabs = len(down), len(x) <= SLAB_TOKENS
    places = place(experts, num_experts, slab=len(x) if slabs else None)
    num_rows = num_experts * len(x) if slabs else most_rows(experts.numel(), num_experts)
    rows = scatter(*triton_ops.quantize_blocks(x), places.rows, num_rows, experts.shape[1])
    expected = max(1, experts.numel() // num_experts)
    wide = multiply(rows, (gate_up, gate_up_scale), places, slabs, expected)
    inner = triton_ops.swiglu_quantized(*wide.chunk(2, dim=-1))
    narrow = multiply((inner.values, inner.scales), (down, down_scale), places, slabs, expected)
    if num_blocks == 1:
        return combine(narrow, places.rows, weights, start)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    positions, block_size = places.rows.view(experts.shape), num_experts // num_blocks
    add_picks(narrow, positions, weights, experts, start, out, num_blocks, block_size)
    return out


def most_rows(num_picks: int, num_experts: int) -> int:
    """Rows of all experts' blocks, each filled up to a multiple of DeepGEMM's: a partly filled block takes at least one pick."""
    block = deep_gemm.get_mk_alignment_for_contiguous_layout()
    return -(-(num_picks + min(num_picks, num_experts) * (block - 1)) // block) * block


def place(experts: torch.Tensor, num_experts: int, slab: int | None) -> Places:
    """experts [T, k]. slab: rows of each expert's block; None: as many as it needs."""
    chosen = experts.flatten().long()
    keys = chosen.masked_fill((chosen < 0) | (chosen >= num_experts), num_experts)
    in_order, order = keys.sort(stable=True)
    firsts = torch.searchsorted(in_order, torch.arange(num_experts + 1, device=keys.device))
    counts = firsts.diff()
    if slab is None:
        block = deep_gemm.get_mk_alignment_for_contiguous_layout()
        ends = ((counts + block - 1) // block * block).cumsum(0)
        starts = torch.cat((ends.new_zeros(1), ends))
    else:
        starts = torch.arange(num_experts + 1, device=keys.device) * slab
        ends = starts[1:]
    numbers = torch.arange(len(keys), device=keys.device) + (starts - firsts)[in_order]
    rows = torch.empty_like(keys).scatter_(0, order, numbers.masked_fill_(in_order == num_experts, -1))
    return Places(rows.int(), counts.int(), ends)


def multiply(
    rows: tuple[torch.Tensor, torch.Tensor],
    matrices: tuple[torch.Tensor, torch.Tensor],
    places: Places,
    slabs: bool,
    expected: int,
) -> torch.Tensor:
    """rows: e4m3 [M, K] and scales; matrices: e4m3 [E, N, K] and scales -> bf16 [M, N], anything where a row is nobody's."""
    num_experts, columns, _ = matrices[0].shape
    out = torch.empty(len(rows[0]), columns, dtype=torch.bfloat16, device=rows[0].device)
    if slabs:
        values, scales = (part.unflatten(0, (num_experts, -1)) for part in rows)
        target = out.unflatten(0, (num_experts, -1))
        deep_gemm.m_grouped_fp8_gemm_nt_masked((values, scales), matrices, target, places.counts, expected)
    else:
        numbers = torch.arange(len(out), device=out.device)
        owners = torch.searchsorted(places.ends, numbers, right=True, out_int32=True)
        owners.masked_fill_(owners == num_experts, -1)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(rows, matrices, out, owners)
    return out


def scatter(
    values: torch.Tensor, scales: torch.Tensor, places: torch.Tensor, num_rows: int, picks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's row to where its picks are: e4m3 [num_rows, K], scales fp32 [num_rows, K / 128]; the others are not written."""
    channels, blocks = values.shape[1], scales.shape[1]
    out = values.new_empty(num_rows, channels)
    out_scales = scales.new_empty(num_rows, blocks)
    _scatter_rows[(len(places),)](
        values.view(torch.uint8),
        scales,
        *scales.stride(),
        places,
        out.view(torch.uint8),
        out_scales,
        picks,
        channels,
        blocks,
        triton.next_power_of_2(blocks),
        1024,
    )
    return out, out_scales


def combine(
    outputs: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, start: torch.Tensor | None
) -> torch.Tensor:
    """outputs bf16 [M, D], places int32 [T x k], weights fp32 [T, k], start [T, D] -> fp32 [T, D]."""
    tokens, picks = weights.shape
    channels = outputs.shape[1]
    out = torch.empty(tokens, channels, dtype=torch.float32, device=outputs.device)
    _combine_rows[(tokens, triton.cdiv(channels, 1024))](
        outputs, places, weights.contiguous(), start, out, picks, channels, start is not None, 1024
    )
    return out


@triton.jit
def _scatter_rows(
    values,
    scales,
    token_stride,
    block_stride,
    places,
    out,
    out_scales,
    picks,
    channels,
    blocks,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pick = tl.program_id(0)
    row = tl.load(places + pick).to(tl.int64)
    if row < 0:
        return
    token = (pick // picks).to(tl.int64)
    for first in range(0, channels, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        value = tl.load(values + token * channels + channel, mask=channel < channels)
        tl.store(out + row * channels + channel, value, mask=channel < channels)
    block = tl.arange(0, BLOCKS)
    scale = tl.load(scales + token * token_stride + block * block_stride, mask=block < blocks)
    tl.store(out_scales + row * blocks + block, scale, mask=block < blocks)


@triton.jit
def _combine_rows(
    outputs, places, weights, start, out, picks, channels, HAS_START: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_START:
        total = tl.load(start + token * channels + channel, mask=channel < channels).to(tl.float32)
    for pick in range(picks):
        row = tl.load(places + token * picks + pick).to(tl.int64)
        weight = tl.load(weights + token * picks + pick)
        part = tl.load(outputs + row * channels + channel, mask=(row >= 0) & (channel < channels), other=0.0)
        total += part.to(tl.float32) * weight
    tl.store(out + token * channels + channel, total, mask=channel < channels)
