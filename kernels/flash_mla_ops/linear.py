"""Block-FP8 matrix products by DeepGEMM."""

import deep_gemm
import torch

from kernels.dispatch import Fp8Weight, QuantizedRows
from kernels.triton_ops import quantize_blocks

CHANNEL_MULTIPLE = 16  # bytes that a row of x, of the weight, and of the result must be a multiple of


def prepare_fp8_weight(weight: torch.Tensor, scale_inv: torch.Tensor) -> Fp8Weight:
    """As kernels.reference.prepare_fp8_weight: the matrix as it is, with its scales. ValueError if DeepGEMM cannot read its rows."""
    rows, channels = weight.shape
    if rows % CHANNEL_MULTIPLE or channels % CHANNEL_MULTIPLE:
        raise ValueError(
            f"weight is [{rows}, {channels}], but DeepGEMM takes multiples of {CHANNEL_MULTIPLE}"
        )
    return Fp8Weight((weight.contiguous(), scale_inv.float().contiguous()))


def fp8_linear(x: torch.Tensor | QuantizedRows, weight: Fp8Weight) -> torch.Tensor:
    """As kernels.reference.fp8_linear. The product is rounded to bf16, whatever x's dtype."""
    rows = x if isinstance(x, QuantizedRows) else QuantizedRows(*quantize_blocks(x), x.dtype)
    values, scale_inv = weight.tensors
    out = torch.empty(len(rows.values), len(values), dtype=torch.bfloat16, device=values.device)
    deep_gemm.fp8_gemm_nt((rows.values, rows.scales), (values, scale_inv), out)
    return out.to(rows.dtype)
