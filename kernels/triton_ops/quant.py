"""FP8 e4m3 with power-of-two scales, bit for bit as the reference has it. Knows nothing of matrix products or caches."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kernels.dispatch import QuantizedRows
from kernels.layout import QUANT_BLOCK

ROW_MULTIPLE = 16  # the bulk copy engine wants 4; with 16 a stride is always one that Triton compiles the same kernel for
BLOCKS_PER_PROGRAM = 8  # of 128 channels: 16 bytes of bf16 for each of 128 threads


@triton.jit
def power_of_two_scales(amax_bits):
    """Bits of max |x| as int32 -> fp32 2^ceil(log2(amax / 448)) and its reciprocal, both exact; NaN and infinity give infinity
    and zero. Maxima are taken of bits because as integers NaN is the largest, while as numbers it gets lost."""
    floor: tl.constexpr = 0x38D1B717  # fp32 1e-4
    quotient = tl.maximum(amax_bits, floor).to(tl.float32, bitcast=True) * (1 / 448.0)
    bits = quotient.to(tl.int32, bitcast=True)
    exponent = bits & 0x7F800000
    rounded_up = tl.where(bits == exponent, exponent, exponent + 0x00800000)
    exponent = tl.where(exponent == 0x7F800000, exponent, rounded_up)
    inverse = tl.where(exponent == 0x7F800000, 0, 0x7F000000 - exponent)
    return exponent.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def absolute_bits(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def quantize_tile(x):
    """x fp32 [B, 128] -> e4m3 [B, 128] and scales fp32 [B]. What is scaled stays below 448 * (1 + 2^-22): no clamp is needed."""
    scales, inverse = power_of_two_scales(tl.max(absolute_bits(x), 1))
    return (x * inverse[:, None]).to(tl.float8e4nv), scales


@triton.jit
def block_indices(num_rows, num_blocks, BLOCKS: tl.constexpr):
    """The program's share of all (row, block of 128 channels): rows int64 [B], blocks [B] and which of them exist."""
    index = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    return index // num_blocks, (index % num_blocks).to(tl.int32), index < num_rows * num_blocks


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    channels,
    x_stride,
    row_stride,
    block_stride,
    BLOCKS: tl.constexpr,
):
    """x [T, D] -> values [T, D], contiguous, and scales [T, ceil(D / 128)]."""
    rows, blocks, exist = block_indices(num_rows, tl.cdiv(channels, 128), BLOCKS)
    columns = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = exist[:, None] & (columns < channels)
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    values, scales = quantize_tile(x)
    tl.store(values_ptr + rows[:, None] * channels + columns, values, mask=mask)
    tl.store(scales_ptr + rows * row_stride + blocks * block_stride, scales, mask=exist)


@triton.jit(do_not_specialize=["num_rows"])
def _dequantize_kernel(
    values_ptr, scales_ptr, out_ptr, num_rows, channels, values_stride, BLOCKS: tl.constexpr
):
    """values [T, D], scales [T, ceil(D / 128)], contiguous -> out fp32 [T, D], contiguous."""
    num_blocks = tl.cdiv(channels, 128)
    rows, blocks, exist = block_indices(num_rows, num_blocks, BLOCKS)
    columns = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = exist[:, None] & (columns < channels)
    values = tl.load(values_ptr + rows[:, None] * values_stride + columns, mask=mask, other=0.0)
    scales = tl.load(scales_ptr + rows * num_blocks + blocks, mask=exist)
    tl.store(out_ptr + rows[:, None] * channels + columns, values.to(tl.float32) * scales[:, None], mask=mask)


@triton.jit
def _quantize_weight_kernel(weight_ptr, values_ptr, scales_ptr, num_rows, channels, stride):
    """One 128 x 128 block of weight [N, K] -> values [N, K] and scales [ceil(N / 128), ceil(K / 128)], contiguous."""
    rows = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)[:, None]
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)[None, :]
    mask = (rows < num_rows) & (columns < channels)
    x = tl.load(weight_ptr + rows * stride + columns, mask=mask, other=0.0).to(tl.float32)
    scale, inverse = power_of_two_scales(tl.max(tl.max(absolute_bits(x), 1), 0))
    tl.store(values_ptr + rows * channels + columns, (x * inverse).to(tl.float8e4nv), mask=mask)
    tl.store(scales_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)


@triton.jit
def _dequantize_weight_kernel(values_ptr, scales_ptr, out_ptr, num_rows, channels, stride):
    rows = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)[:, None]
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)[None, :]
    mask = (rows < num_rows) & (columns < channels)
    values = tl.load(values_ptr + rows * stride + columns, mask=mask, other=0.0)
    scale = tl.load(scales_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))
    tl.store(out_ptr + rows * channels + columns, values.to(tl.float32) * scale, mask=mask)


def quantize_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the reference, scales contiguous."""
    flat = _rows_of(x)
    values = torch.empty(flat.shape, dtype=torch.float8_e4m3fn, device=x.device)
    blocks = triton.cdiv(flat.shape[1], QUANT_BLOCK)
    scales = torch.empty(len(flat), blocks, dtype=torch.float32, device=x.device)
    _quantize(flat, values, scales)
    return values.view(x.shape), scales.view(*x.shape[:-1], blocks)


def quantize_rows(x: torch.Tensor) -> QuantizedRows:
    """x [T, K] -> what the FP8 products read."""
    flat = _rows_of(x)
    rows = new_rows(flat.shape, x.dtype, x.device)
    _quantize(flat, rows.values, rows.scales)
    return rows


def new_rows(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> QuantizedRows:
    """Room for QuantizedRows as cuBLAS wants them: a multiple of ROW_MULTIPLE rows is allocated, and the scales of one block
    of channels lie side by side."""
    num_rows, channels = shape
    allocated = num_rows + -num_rows % ROW_MULTIPLE
    values = torch.empty(allocated, channels, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(triton.cdiv(channels, QUANT_BLOCK), allocated, dtype=torch.float32, device=device)
    return QuantizedRows(values[:num_rows], scales.T[:num_rows], dtype)


def allocated_rows(rows: QuantizedRows) -> QuantizedRows:
    """All rows that new_rows allocated, the last few unwritten; others are copied into such room first."""
    num_rows, channels = rows.values.shape
    allocated = num_rows + -num_rows % ROW_MULTIPLE
    if rows.scales.stride() != (1, allocated):
        room = new_rows((num_rows, channels), rows.dtype, rows.values.device)
        room.values.copy_(rows.values)
        room.scales.copy_(rows.scales)
        rows = room
    return QuantizedRows(
        rows.values.as_strided((allocated, channels), (channels, 1)),
        rows.scales.as_strided((allocated, rows.scales.shape[1]), (1, allocated)),
        rows.dtype,
    )


def _quantize(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    if x.numel():
        _quantize_kernel[block_grid(*x.shape)](
            x, values, scales, *x.shape, x.stride(0), *scales.stride(), BLOCKS=BLOCKS_PER_PROGRAM
        )


def block_grid(num_rows: int, channels: int) -> tuple[int]:
    return (triton.cdiv(num_rows * triton.cdiv(channels, QUANT_BLOCK), BLOCKS_PER_PROGRAM),)


def dequantize_blocks(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    flat = _rows_of(values)
    out = torch.empty(flat.shape, dtype=torch.float32, device=values.device)
    if out.numel():
        _dequantize_kernel[block_grid(*flat.shape)](
            flat, scales.contiguous(), out, *flat.shape, flat.stride(0), BLOCKS=BLOCKS_PER_PROGRAM
        )
    return out.view(values.shape)


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight = _rows_of(weight)
    grid = weight_blocks(weight)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(grid, dtype=torch.float32, device=weight.device)
    _quantize_weight_kernel[grid](weight, values, scales, *weight.shape, weight.stride(0), num_warps=8)
    return values, scales


def dequantize_weight(weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    grid = weight_blocks(weight)
    if tuple(scale_inv.shape) != grid:
        raise ValueError(
            f"scale_inv is {list(scale_inv.shape)}, but a weight of {list(weight.shape)} has {list(grid)} blocks"
        )
    weight = _rows_of(weight)
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    _dequantize_weight_kernel[grid](
        weight, scale_inv.contiguous(), out, *weight.shape, weight.stride(0), num_warps=8
    )
    return out


def weight_blocks(weight: torch.Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    return triton.cdiv(rows, QUANT_BLOCK), triton.cdiv(columns, QUANT_BLOCK)


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    """[..., D] -> [T, D] with the channels side by side; a copy only if the strides leave no other way."""
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()
