"""Norms, linear layers and the gated MLP. Knows nothing of the model's shape, of checkpoints or of caches.

Whatever reduces over a matrix product goes through `Ops`; what is left is element by element or within one row, so the bits of a
row do not depend on the other rows. That rules out torch.sigmoid and silu: on a CPU their vectorised body and their scalar
tail differ in the last bit, and where the tail begins depends on the batch. torch.exp has no such tail.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.dispatch import Fp8Weight, Ops

LAYER_NORM_EPS = 1e-6  # of the indexer keys; not in config.json


@dataclass(frozen=True)
class Linear:
    """x [T, K] -> [T, N]: FP8 with activations quantised on the fly, or plain, as the weight is."""

    weight: torch.Tensor | Fp8Weight
    ops: Ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.weight, torch.Tensor):
            return self.ops.linear(x, self.weight)
        return self.ops.fp8_linear(x, self.weight)


@dataclass(frozen=True)
class FusedLinear:
    """Linear layers of one input as one product: x [T, K] -> a [T, N_i] of each.

    starts: the output channel of the product at which each layer begins; blocks of 128 rows have one scale and cannot be
    shared, so there may be unused channels between two layers.
    """

    linear: Linear
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        out = self.linear(x)
        return [out.narrow(-1, start, size) for start, size in zip(self.starts, self.sizes, strict=True)]


@dataclass(frozen=True)
class RMSNorm:
    """weight fp32 [D]. Computed and scaled in fp32, cast last."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._normalize(x.float()).to(x.dtype)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """norm(x + residual) and the residual to carry on. The norm reads the sum before it is rounded to x's dtype."""
        total = x.float() + residual.float()
        return self._normalize(total).to(x.dtype), total.to(x.dtype)

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class LayerNorm:
    """weight and bias fp32 [D]. Computed in fp32, cast last."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, LAYER_NORM_EPS).to(x.dtype)


@dataclass(frozen=True)
class MLP:
    """x [T, D] -> [T, D]: down(silu(gate(x)) * up(x)), the product in fp32."""

    gate_up: FusedLinear
    down: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = (part.float() for part in self.gate_up(x))
        return self.down((gate * sigmoid(gate) * up).to(x.dtype))


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1.0 / (1.0 + torch.exp(-x))
