"""FP8 e4m3 with power-of-two scales: activations per 128 channels, weights per 128 x 128 block. Knows nothing of caches.

A power of two makes scaling exact: whatever is computed from dequantised numbers is what FP8 hardware computes from the values
and multiplies by the scales afterwards. Source: act_quant with scale_fmt ue8m0 in DeepSeek-V3.2-Exp.
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import QuantizedRows
from kernels.layout import QUANT_BLOCK

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
_EXPONENT_BITS = 0x7F800000
_MANY = 8192  # values from which on it pays to convert them by shifts


def quantize_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x float [..., D] -> values e4m3 [..., D] and scales fp32 [..., ceil(D / 128)], so that x is about values * scales.

    A block with a NaN or an infinity gets the scale infinity and dequantises to NaN throughout.
    """
    blocks = _split(x.float())
    scales = _power_of_two_scales(blocks.abs().amax(-1))
    values = _round_in_place(blocks / scales.unsqueeze(-1))
    return values.flatten(-2)[..., : x.shape[-1]], scales


def quantize_rows(x: torch.Tensor) -> QuantizedRows:
    return QuantizedRows(*quantize_blocks(x), x.dtype)


def dequantize_blocks(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """values e4m3 [..., D] and scales fp32 [..., ceil(D / 128)] -> fp32 [..., D]."""
    blocks = _split(_to_fp32(values)).mul_(scales.unsqueeze(-1))
    return blocks.flatten(-2)[..., : values.shape[-1]]


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight float [N, K] -> e4m3 [N, K] and scale_inv fp32 [ceil(N / 128), ceil(K / 128)], as checkpoints hold them."""
    rows, columns = weight.shape
    blocks = _tiles(weight.float())
    scale_inv = _power_of_two_scales(blocks.abs().amax((1, 3)))
    values = _round_in_place(blocks / scale_inv[:, None, :, None])
    return values.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scale_inv


def dequantize_weight(weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """weight e4m3 [N, K] and scale_inv fp32 [ceil(N / 128), ceil(K / 128)] -> fp32 [N, K]."""
    rows, columns = weight.shape
    expected = (-(-rows // QUANT_BLOCK), -(-columns // QUANT_BLOCK))
    if tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"scale_inv is {list(scale_inv.shape)}, but a weight of [{rows}, {columns}] has {list(expected)} blocks"
        )
    blocks = _tiles(_to_fp32(weight)).mul_(scale_inv[:, None, :, None])
    return blocks.flatten(2).flatten(0, 1)[:rows, :columns].contiguous()


def _power_of_two_scales(amax: torch.Tensor) -> torch.Tensor:
    """2^ceil(log2(amax / 448)) from the exponent bits, so that amax = 448 * 2^k gives 2^k and no rounding of a logarithm."""
    quotient = amax.clamp(min=AMAX_FLOOR) * (1 / E4M3_MAX)
    below = (quotient.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    return torch.where(below < quotient, 2 * below, below)


def _round_in_place(x: torch.Tensor) -> torch.Tensor:
    return x.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _to_fp32(values: torch.Tensor) -> torch.Tensor:
    """Exact for every code. Shifted into an fp16, an e4m3 is 256 times too small; of many, torch's conversion takes thrice as long."""
    if values.numel() < _MANY:
        return values.float()
    bits = values.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    nan = (bits + 0x80).bitwise_and_(
        0x4000
    )  # only the code of NaN carries into this bit, which makes it a NaN again
    return bits.bitwise_or_(nan).view(torch.float16).float().mul_(256)


def _split(x: torch.Tensor) -> torch.Tensor:
    """[..., D] -> [..., ceil(D / 128), 128], zero-padded."""
    pad = -x.shape[-1] % QUANT_BLOCK
    return (F.pad(x, (0, pad)) if pad else x).unflatten(-1, (-1, QUANT_BLOCK))


def _tiles(x: torch.Tensor) -> torch.Tensor:
    """[N, K] -> [ceil(N / 128), 128, ceil(K / 128), 128], zero-padded."""
    rows, columns = x.shape
    padded = F.pad(x, (0, -columns % QUANT_BLOCK, 0, -rows % QUANT_BLOCK))
    return padded.unflatten(1, (-1, QUANT_BLOCK)).unflatten(0, (-1, QUANT_BLOCK))
