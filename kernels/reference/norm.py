"""Norms and activations, element by element or within one row. Knows nothing of matrices or of caches.

The bits of a row do not depend on the other rows. That rules out torch.sigmoid and silu: on a CPU their vectorised body and
their scalar tail differ in the last bit, and where the tail begins depends on the batch. torch.exp has no such tail.
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import QuantizedRows
from kernels.reference.quant import quantize_rows


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, D], weight fp32 [D] -> [T, D] in x's dtype. Computed and scaled in fp32, cast last."""
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(x + residual) and the sum to carry on, both [T, D] in x's dtype. The norm reads the sum before it is rounded."""
    total = x.float() + residual.float()
    return rms_norm(total, weight, eps).to(x.dtype), total.to(x.dtype)


def add_rms_norm_quantized(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, QuantizedRows]:
    """add_rms_norm, and its first result also quantised for the FP8 products that read it."""
    normed, total = add_rms_norm(x, residual, weight, eps)
    return normed, total, quantize_rows(normed)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, D], weight and bias fp32 [D] -> [T, D] in x's dtype. Computed in fp32, cast last."""
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up: both [T, I] -> [T, I] in gate's dtype. Computed in fp32, cast last."""
    wide = gate.float()
    return (wide * sigmoid(wide) * up.float()).to(gate.dtype)


def swiglu_quantized(gate: torch.Tensor, up: torch.Tensor) -> QuantizedRows:
    """swiglu, quantised for the FP8 product that reads it."""
    return quantize_rows(swiglu(gate, up))


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1.0 / (1.0 + torch.exp(-x))
