"""Norms and activations, one kernel each, over any strided rows. Knows nothing of matrix products."""

import torch
import triton
import triton.language as tl

from kernels.dispatch import QuantizedRows
from kernels.layout import QUANT_BLOCK
from kernels.triton_ops.quant import BLOCKS_PER_PROGRAM, block_grid, block_indices, new_rows, quantize_tile


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    total_ptr,
    values_ptr,
    scales_ptr,
    channels,
    eps,
    x_stride,
    residual_stride,
    row_stride,
    block_stride,
    BLOCKS: tl.constexpr,
    ADD: tl.constexpr,
    QUANTIZE: tl.constexpr,
):
    """One row, as blocks of 128 channels. Outputs are contiguous but for the scales."""
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS)
    columns = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = columns < channels
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(total_ptr + row * channels + columns, x.to(total_ptr.dtype.element_ty), mask=mask)
    square_sum = tl.sum(tl.sum(x * x, 1), 0)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    normed = (x * tl.rsqrt(square_sum / channels + eps) * weight).to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + row * channels + columns, normed, mask=mask)
    if QUANTIZE:
        values, scales = quantize_tile(normed.to(tl.float32))
        tl.store(values_ptr + row * channels + columns, values, mask=mask)
        tl.store(scales_ptr + row * row_stride + blocks * block_stride, scales, mask=blocks * 128 < channels)


@triton.jit(do_not_specialize=["num_rows"])
def _swiglu_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    scales_ptr,
    matrices_ptr,
    num_rows,
    channels,
    gate_stride,
    up_stride,
    row_stride,
    block_stride,
    rows_per_tile,
    BLOCKS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """gate, up [T, I] -> out [T, I], contiguous; quantised, with scales [T, ceil(I / 128)], after rounding to gate's dtype.
    GROUPED: rows of tiles without a matrix are left alone."""
    rows, blocks, exist = block_indices(num_rows, tl.cdiv(channels, 128), BLOCKS)
    if GROUPED:
        exist = exist & (tl.load(matrices_ptr + rows // rows_per_tile, mask=exist, other=-1) >= 0)
    columns = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = exist[:, None] & (columns < channels)
    gate = tl.load(gate_ptr + rows[:, None] * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows[:, None] * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    product = (gate / (1.0 + tl.exp(-gate)) * up).to(gate_ptr.dtype.element_ty)
    if QUANTIZE:
        product, scales = quantize_tile(product.to(tl.float32))
        tl.store(scales_ptr + rows * row_stride + blocks * block_stride, scales, mask=exist)
    tl.store(out_ptr + rows[:, None] * channels + columns, product, mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm(x, None, weight, eps, normed, None, None)
    return normed


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _rms_norm(x, residual, weight, eps, normed, total, None)
    return normed, total


def add_rms_norm_quantized(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, QuantizedRows]:
    normed, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rows = new_rows(x.shape, x.dtype, x.device)
    _rms_norm(x, residual, weight, eps, normed, total, rows)
    return normed, total, rows


def _rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    normed: torch.Tensor,
    total: torch.Tensor | None,
    rows: QuantizedRows | None,
) -> None:
    num_rows, channels = x.shape
    if not num_rows:
        return
    _check_rows(x, *(() if residual is None else (residual,)))
    blocks = triton.next_power_of_2(triton.cdiv(channels, QUANT_BLOCK))
    _rms_norm_kernel[(num_rows,)](
        x,
        residual,
        weight,
        normed,
        total,
        rows and rows.values,
        rows and rows.scales,
        channels,
        eps,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        *(rows.scales.stride() if rows else (0, 0)),
        BLOCKS=blocks,
        ADD=residual is not None,
        QUANTIZE=rows is not None,
        num_warps=min(8, max(1, blocks // 8)),
    )


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _swiglu(gate, up, out, None)
    return out


def swiglu_quantized(gate: torch.Tensor, up: torch.Tensor) -> QuantizedRows:
    rows = new_rows(gate.shape, gate.dtype, gate.device)
    _swiglu(gate, up, rows.values, rows.scales)
    return rows


def swiglu_of_tiles(gate: torch.Tensor, up: torch.Tensor, matrices: torch.Tensor) -> QuantizedRows:
    """swiglu_quantized of those tiles of rows that have a matrix: matrices int32 [tiles], -1 for none."""
    rows = new_rows(gate.shape, gate.dtype, gate.device)
    _swiglu(gate, up, rows.values, rows.scales, matrices)
    return rows


def _swiglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor | None,
    matrices: torch.Tensor | None = None,
) -> None:
    if gate.numel():
        _check_rows(gate, up)
        _swiglu_kernel[block_grid(*gate.shape)](
            gate,
            up,
            out,
            scales,
            matrices,
            *gate.shape,
            gate.stride(0),
            up.stride(0),
            *((0, 0) if scales is None else scales.stride()),
            0 if matrices is None else len(gate) // len(matrices),
            BLOCKS=BLOCKS_PER_PROGRAM,
            QUANTIZE=scales is not None,
            GROUPED=matrices is not None,
        )


def _check_rows(*tensors: torch.Tensor) -> None:
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        raise ValueError("the channels of a row must lie side by side, but the last stride is not 1")
