"""Matrix products with fp32 accumulation: block-FP8 by cuBLAS or by an own kernel, plain ones by cuBLAS.

Knows nothing of experts but that a block of rows may have a matrix of its own.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.dispatch import Fp8Weight, QuantizedRows
from kernels.layout import QUANT_BLOCK
from kernels.triton_ops.exact import exact_linear
from kernels.triton_ops.quant import allocated_rows, quantize_rows, weight_blocks

_SCALE_ALIGNMENT = 4  # cuBLAS reads a column of weight scales 16 bytes at a time
_CUBLAS_COLUMNS = 16
_FEW_ROWS = 64  # up to here reading the matrix is what takes the time
_FEW_TILES = 40  # of 128 x 128
_MULTIPROCESSORS = 132
_MANY_COLUMNS = _MULTIPROCESSORS * 2 * 128  # tiles of 128 columns then occupy every multiprocessor twice
_BLOCKS_WORTH_A_SPLIT = 14  # with fewer, adding up the parts costs more than a split gains
_ADD_BLOCK = 1024


class Tiling(NamedTuple):
    """How the own kernel cuts a product: tiles of rows x columns, and into how many parts the channels."""

    rows: int
    columns: int  # 64 or 128: a tile has one weight scale for each block of channels
    splits: int
    stages: int
    warps: int
    transposed: bool  # weights as the left operand, which cannot be lower than 64 rows: for few activations


@triton.jit(do_not_specialize=["num_rows", "blocks_per_split"])
def fp8_product_kernel(
    x_desc,
    weight_desc,
    x_scales_ptr,
    weight_scales_ptr,
    out_ptr,
    matrices_ptr,
    num_rows,
    num_columns,
    num_blocks,
    blocks_per_split,
    scale_row_stride,
    scale_block_stride,
    weight_scale_stride,
    out_split_stride,
    out_row_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """x e4m3 [T, K] times weight e4m3 [matrices * N, K], K a multiple of 128 -> out [splits, T, N].

    Each block of 128 channels is summed up by the tensor cores and added in fp32, times the scales of both.
    GROUPED: matrices int32 [T / ROWS] says which matrix a tile of rows is for; a negative one is for none.
    """
    # Programs that run at the same time should share their matrix: all columns of a tile of rows, or all tiles of rows.
    tile, column_tile = tl.program_id(1 if GROUPED else 0), tl.program_id(0 if GROUPED else 1)
    row, column = tile * ROWS, column_tile * COLUMNS
    weight_row = column
    if GROUPED:
        matrix = tl.load(matrices_ptr + tile)
        if matrix < 0:
            return
        weight_row += matrix * num_columns
    rows = row + tl.arange(0, ROWS)
    first = tl.program_id(2) * blocks_per_split  # beyond the last block of channels everything reads as zero
    x_scales_ptrs = x_scales_ptr + rows * scale_row_stride
    weight_scales_ptrs = weight_scales_ptr + weight_row // 128 * weight_scale_stride
    total = tl.zeros((COLUMNS, ROWS) if TRANSPOSED else (ROWS, COLUMNS), tl.float32)
    for index in range(blocks_per_split):
        block = first + index
        x = x_desc.load([row, block * 128])
        weight = weight_desc.load([weight_row, block * 128])
        exist = (rows < num_rows) & (block < num_blocks)
        scales = tl.load(x_scales_ptrs + block * scale_block_stride, mask=exist, other=0.0)
        scales *= tl.load(weight_scales_ptrs + block, mask=block < num_blocks, other=0.0)
        if TRANSPOSED:
            total += tl.dot(weight, x.T) * scales[None, :]
        else:
            total += tl.dot(x, weight.T) * scales[:, None]
    if TRANSPOSED:
        total = total.T
    columns = column + tl.arange(0, COLUMNS)
    out_ptrs = out_ptr + tl.program_id(2) * out_split_stride + rows.to(tl.int64)[:, None] * out_row_stride
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(out_ptrs + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_splits_kernel(parts_ptr, out_ptr, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """parts fp32 [SPLITS, size] -> out [size], first part first."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + split * size + index, mask=mask, other=0.0)
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=mask)


def prepare_fp8_weight(weight: torch.Tensor, scale_inv: torch.Tensor) -> Fp8Weight:
    """The matrix, its channels zero-padded to whole blocks, and the scales as cuBLAS wants them: blocks of channels side by
    side and padded."""
    if tuple(scale_inv.shape) != weight_blocks(weight):
        raise ValueError(
            f"scale_inv is {list(scale_inv.shape)}, but a weight of {list(weight.shape)} "
            f"has {list(weight_blocks(weight))} blocks"
        )
    scales = F.pad(scale_inv, (0, -scale_inv.shape[1] % _SCALE_ALIGNMENT)).contiguous()
    return Fp8Weight((pad_channels(weight), scales))


def fp8_linear(x: torch.Tensor | QuantizedRows, weight: Fp8Weight) -> torch.Tensor:
    rows = x if isinstance(x, QuantizedRows) else quantize_rows(x)
    matrix, scales = weight.tensors
    num_rows, num_columns, channels = len(rows.values), *matrix.shape
    if _cublas_is_faster(num_rows, num_columns) and rows.dtype == torch.bfloat16:
        return _cublas_product(rows, matrix, scales)
    out = torch.empty(num_rows, num_columns, dtype=rows.dtype, device=matrix.device)
    if num_rows:
        values = pad_channels(rows.values)
        fp8_product(values, rows.scales, matrix, scales, out, tiling_of(num_rows, num_columns, channels))
    return out


def _cublas_is_faster(num_rows: int, num_columns: int) -> bool:
    """cuBLAS does not split the channels: as long as there are few tiles, most multiprocessors would have nothing to do."""
    tiles = triton.cdiv(num_rows, 128) * triton.cdiv(num_columns, 128)
    return num_rows > _FEW_ROWS and tiles > _FEW_TILES and num_columns % _CUBLAS_COLUMNS == 0


def tiling_of(num_rows: int, num_columns: int, channels: int) -> Tiling:
    """The fastest of those tried on an H200 for 1 to 256 rows and the model's matrices (docs/kernels.md)."""
    few = num_rows <= _FEW_ROWS
    rows = max(16, triton.next_power_of_2(num_rows)) if few else 128
    columns = 128 if rows == 128 or (rows == 64 and num_columns >= _MANY_COLUMNS) else 64
    tiles = triton.cdiv(num_columns, columns) * triton.cdiv(num_rows, rows)
    programs = _MULTIPROCESSORS * (3 if few else 1)  # as many as fit at once, for the memory to be busy
    splits = max(1, min(programs // tiles, channels // QUANT_BLOCK // _BLOCKS_WORTH_A_SPLIT))
    stages = 3 if rows == 64 and columns == 128 else 4
    return Tiling(rows, columns, splits, stages, warps=4 if few else 8, transposed=few)


def fp8_product(
    values: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    out: torch.Tensor,
    tiling: Tiling,
    matrices: torch.Tensor | None = None,
) -> None:
    """Writes the product into out, contiguous [T, N], by the own kernel.

    values:        e4m3 [T, K], K a multiple of 128, as weight's
    scales:        fp32 [T, K / 128]
    weight:        e4m3 [N, K], or [E * N, K] with `matrices`
    weight_scales: fp32 [ceil(N / 128), K / 128], or [E * N / 128, K / 128]; rows may be longer
    matrices:      int32 [ceil(T / tiling.rows)], the matrix of each tile of rows; rows of a negative one are not written
    """
    (num_rows, num_columns), blocks = out.shape, values.shape[1] // QUANT_BLOCK
    per_split = triton.cdiv(blocks, tiling.splits)
    splits = triton.cdiv(blocks, per_split)
    parts = out if splits == 1 else torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
    grid = (triton.cdiv(num_rows, tiling.rows), triton.cdiv(num_columns, tiling.columns))
    fp8_product_kernel[(*(grid if matrices is None else reversed(grid)), splits)](
        TensorDescriptor.from_tensor(values, [tiling.rows, QUANT_BLOCK]),
        TensorDescriptor.from_tensor(weight, [tiling.columns, QUANT_BLOCK]),
        scales,
        weight_scales,
        parts,
        matrices,
        num_rows,
        num_columns,
        blocks,
        per_split,
        *scales.stride(),
        weight_scales.stride(0),
        out.numel(),
        num_columns,
        ROWS=tiling.rows,
        COLUMNS=tiling.columns,
        TRANSPOSED=tiling.transposed,
        GROUPED=matrices is not None,
        num_stages=tiling.stages,
        num_warps=tiling.warps,
    )
    if splits > 1:
        add_splits(parts, out)


def add_splits(parts: torch.Tensor, out: torch.Tensor) -> None:
    """parts fp32 [splits, ...], contiguous, added up into out [...]."""
    grid = (triton.cdiv(out.numel(), _ADD_BLOCK),)
    _add_splits_kernel[grid](parts, out, out.numel(), SPLITS=len(parts), BLOCK=_ADD_BLOCK)


def _cublas_product(rows: QuantizedRows, weight: torch.Tensor, weight_scales: torch.Tensor) -> torch.Tensor:
    """bf16 [T, N]."""
    whole = allocated_rows(rows)
    out = F.scaled_mm(
        pad_channels(whole.values),
        weight.T,
        whole.scales,
        F.ScalingType.BlockWise1x128,
        weight_scales.T,
        F.ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )
    return out[: len(rows.values)]


def linear(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """cuBLAS, which sums in fp32; it multiplies fp32 as such unless torch was told to allow TF32. Activations of bf16 and a
    matrix of fp32 have a kernel of their own: as exact, and several times as fast as widening them."""
    dtype = dtype or x.dtype
    if x.dtype == torch.bfloat16 and weight.dtype == torch.float32:
        return exact_linear(x, weight).to(dtype)
    if x.dtype == weight.dtype == torch.bfloat16 and dtype == torch.float32:
        return torch.mm(x, weight.T, out_dtype=dtype)
    return F.linear(x, weight.to(x.dtype)).to(dtype)


def head_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One batched product that reads and writes the heads where they are."""
    num_rows, heads, _ = x.shape
    out = torch.empty(num_rows, heads, weight.shape[2], dtype=x.dtype, device=x.device)
    torch.bmm(x.transpose(0, 1), weight.to(x.dtype), out=out.transpose(0, 1))
    return out


def pad_channels(x: torch.Tensor) -> torch.Tensor:
    """e4m3 [n, K] with zeros up to a multiple of 128 channels; itself if there is nothing to add."""
    missing = -x.shape[1] % QUANT_BLOCK
    if not missing:
        return x.contiguous()
    return F.pad(x.view(torch.uint8), (0, missing)).view(x.dtype)
