"""Products with a small matrix of fp32, as exact as fp32. Knows nothing of what the matrix is for."""

import torch
import triton
import triton.language as tl

_COLUMNS = 64
_CHANNELS = 64  # with more, the parts of a weight tile do not fit the registers
_PROGRAMS = 132 * 2


@triton.jit(do_not_specialize=["num_rows"])
def _exact_kernel(
    x_ptr,
    weight_ptr,
    parts_ptr,
    num_rows,
    num_columns,
    channels,
    channels_per_split,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    EXACT_BF16: tl.constexpr,
):
    """x [T, K] times weight fp32 [N, K], contiguous -> parts fp32 [splits, T, N], one part for each range of channels.

    As exact as fp32: x in bf16 meets each weight as the sum of three bf16 numbers, which hold all its bits; products of bf16 are
    exact, and the tensor cores' sums of a few channels are added up outside of them.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    weight_ptrs = weight_ptr + columns[:, None] * channels
    first = tl.program_id(2) * channels_per_split
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for start in range(0, channels_per_split, CHANNELS):
        index = (first + start + tl.arange(0, CHANNELS))[None, :]
        x = tl.load(x_ptrs + index, mask=(rows < num_rows)[:, None] & (index < channels), other=0.0)
        mask = (columns < num_columns)[:, None] & (index < channels)
        weight = tl.load(weight_ptrs + index, mask=mask, other=0.0)
        if EXACT_BF16:
            high = weight.to(tl.bfloat16)
            rest = weight - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            total += tl.dot(high, x.T, tl.dot(middle, x.T, tl.dot(low, x.T)))
        else:
            total += tl.dot(weight, x.to(tl.float32).T, input_precision="ieee")
    out_ptrs = parts_ptr + (tl.program_id(2) * num_rows + rows).to(tl.int64)[None, :] * num_columns
    mask = (rows < num_rows)[None, :] & (columns < num_columns)[:, None]
    tl.store(out_ptrs + columns[:, None], total, mask=mask)


def exact_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x bf16 or fp32 [T, K], weight fp32 [N, K], contiguous -> fp32 [T, N]."""
    if not len(x):
        return torch.empty(0, len(weight), dtype=torch.float32, device=x.device)
    parts = exact_parts(x, weight)
    return parts[0] if len(parts) == 1 else parts.sum(0)


def exact_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """fp32 [splits, T, N], to be added up: few rows are split over the channels, so that enough programs read the matrix."""
    (num_rows, channels), num_columns = x.shape, len(weight)
    rows = 16 if num_rows <= 16 else 64
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(num_columns, _COLUMNS))
    blocks = triton.cdiv(channels, _CHANNELS)
    per_split = triton.cdiv(blocks, min(blocks, triton.cdiv(_PROGRAMS, grid[0] * grid[1])))
    splits = triton.cdiv(blocks, per_split)
    parts = torch.empty(splits, num_rows, num_columns, dtype=torch.float32, device=x.device)
    _exact_kernel[(*grid, splits)](
        x,
        weight,
        parts,
        num_rows,
        num_columns,
        channels,
        per_split * _CHANNELS,
        x.stride(0),
        ROWS=rows,
        COLUMNS=_COLUMNS,
        CHANNELS=_CHANNELS,
        EXACT_BF16=x.dtype == torch.bfloat16,
        num_stages=3,
    )
    return parts
