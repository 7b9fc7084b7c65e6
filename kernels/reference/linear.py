"""Matrix products with fp32 accumulation. Knows nothing of attention or of caches.

On a CPU the bits of a row depend neither on the other rows nor on their number. The library picks its kernel by the number of
rows, so they go to it in tiles of two sizes that were measured to have the same bits. It shares out a single product, but not
one among many, among its threads, and slivers of rows or columns and parts of the channels are computed differently: so rows
come in fours, columns in 64s, channels 128 at a time. On a GPU there is no such promise: all rows are one tile, all channels one block.
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import Fp8Weight, QuantizedRows
from kernels.reference.quant import dequantize_blocks, dequantize_weight, quantize_rows

CHANNEL_BLOCK = 128  # measured: 192 is too many for two threads of an Intel CPU
ROW_MULTIPLE, COLUMN_MULTIPLE = 4, 64
ROW_TILES = (64, 16)  # 64 rows and more take the large ones, which are faster; few would be padded to them


def linear(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """x [T, K], weight float [N, K] -> [T, N] in `dtype`, by default x's. Multiplied as fp32, whatever both are."""
    tiles, columns = _row_tiles(x.float()), len(weight)
    padded = _pad(weight.float(), 0, COLUMN_MULTIPLE)
    out = blocked_bmm(tiles, padded.T.expand(len(tiles), -1, -1))
    return out.flatten(0, 1)[: len(x), :columns].to(dtype or x.dtype)


def prepare_fp8_weight(weight: torch.Tensor, scale_inv: torch.Tensor) -> Fp8Weight:
    """weight e4m3 [N, K] and scale_inv fp32 [ceil(N / 128), ceil(K / 128)] -> what fp8_linear takes: here, dequantised.

    Dequantising a matrix takes longer than multiplying a few rows with it.
    """
    return Fp8Weight((dequantize_weight(weight, scale_inv),))


def fp8_linear(x: torch.Tensor | QuantizedRows, weight: Fp8Weight) -> torch.Tensor:
    """x [T, K], weight [N, K] -> [T, N] in x's dtype. The activations are quantised per 128 channels, if they are not yet."""
    (dequantized,) = weight.tensors
    rows = x if isinstance(x, QuantizedRows) else quantize_rows(x)
    return linear(dequantize_blocks(rows.values, rows.scales), dequantized, rows.dtype)


def head_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, H, A], weight float [H, A, B] -> [T, H, B] in x's dtype: each head has its own matrix."""
    per_head = weight.float()
    out = [blocked_bmm(tile.transpose(0, 1), per_head).transpose(0, 1) for tile in _row_tiles(x.float())]
    return torch.cat(out)[: len(x)].to(x.dtype)


def blocked_bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a fp32 [n, M, K] @ b fp32 [n, K, N] -> [n, M, N]. On a CPU, if N is a multiple of 64, no bit depends on n."""
    rows, channels = a.shape[1:]
    if a.is_cuda:
        return torch.bmm(a, b)
    padded = _pad(a, 1, ROW_MULTIPLE)
    out = torch.bmm(padded[..., :CHANNEL_BLOCK], b[:, :CHANNEL_BLOCK])
    for start in range(CHANNEL_BLOCK, channels, CHANNEL_BLOCK):
        block = slice(start, start + CHANNEL_BLOCK)
        out.baddbmm_(padded[..., block], b[:, block])
    return out[:, :rows]


def _row_tiles(x: torch.Tensor) -> torch.Tensor:
    """[T, ...] -> [tiles, rows of a tile, ...], zero-padded."""
    large, small = ROW_TILES
    rows = large if len(x) >= large else small
    return x.unsqueeze(0) if x.is_cuda else _pad(x, 0, rows).unflatten(0, (-1, rows))


def _pad(x: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    """Zeros at the end of a dimension. Without any, F.pad would still copy."""
    missing = -x.shape[dim] % multiple
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x
