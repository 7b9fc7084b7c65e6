"""Matrix products with fp32 accumulation. Knows nothing of attention or of caches.

On a CPU the bits of a row depend neither on the other rows nor on their number. The library picks its kernel by the number of
rows, so rows go to it in tiles of one fixed size; and it may share out the channels of one product, but not of many, among its
threads, so they go to it 128 at a time. On a GPU there is no such promise: all rows are one tile, all channels one block.
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import Fp8Weight
from kernels.reference.quant import dequantize_blocks, dequantize_weight, quantize_blocks

CHANNEL_BLOCK = 128  # measured: 192 is too many for two threads of an Intel CPU
ROW_TILE = 16  # measured: 32 saves a long prompt 15 % and costs a decode step of 16 rows 60 %


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K], weight float [N, K] -> [T, N] in x's dtype."""
    tiles = _row_tiles(x.float())
    out = blocked_bmm(tiles, weight.float().T.expand(len(tiles), -1, -1))
    return out.flatten(0, 1)[: len(x)].to(x.dtype)


def prepare_fp8_weight(weight: torch.Tensor, scale_inv: torch.Tensor) -> Fp8Weight:
    """weight e4m3 [N, K] and scale_inv fp32 [ceil(N / 128), ceil(K / 128)] -> what fp8_linear takes: here, dequantised.

    Dequantising a matrix takes longer than multiplying a few rows with it.
    """
    return Fp8Weight((dequantize_weight(weight, scale_inv),))


def fp8_linear(x: torch.Tensor, weight: Fp8Weight) -> torch.Tensor:
    """x [T, K], weight [N, K] -> [T, N] in x's dtype. The activations are quantised per 128 channels."""
    (dequantized,) = weight.tensors
    return linear(dequantize_blocks(*quantize_blocks(x)), dequantized).to(x.dtype)


def head_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, H, A], weight float [H, A, B] -> [T, H, B] in x's dtype: each head has its own matrix."""
    per_head = weight.float()
    out = [blocked_bmm(tile.transpose(0, 1), per_head).transpose(0, 1) for tile in _row_tiles(x.float())]
    return torch.cat(out)[: len(x)].to(x.dtype)


def blocked_bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a fp32 [n, M, K] @ b fp32 [n, K, N] -> [n, M, N]. On a CPU and for M > 1, the bits do not depend on n."""
    step = a.shape[2] if a.is_cuda else CHANNEL_BLOCK
    out = torch.bmm(a[..., :step], b[:, :step])
    for start in range(step, a.shape[2], step):
        out.baddbmm_(a[..., start : start + step], b[:, start : start + step])
    return out


def _row_tiles(x: torch.Tensor) -> torch.Tensor:
    """[T, ...] -> [tiles, rows of a tile, ...], zero-padded."""
    if x.is_cuda:
        return x.unsqueeze(0)
    pad = -len(x) % ROW_TILE
    padded = F.pad(x, (0, 0) * (x.ndim - 1) + (0, pad)) if pad else x
    return padded.unflatten(0, (-1, ROW_TILE))
