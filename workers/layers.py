"""Norms, linear layers and the gated MLP. Knows nothing of the model's shape, of checkpoints or of caches."""

from dataclasses import dataclass

import torch

from kernels.dispatch import Fp8Weight, Ops, QuantizedRows


@dataclass(frozen=True)
class Linear:
    """x [T, K] -> [T, N]: FP8 with activations quantised on the fly if they are not yet, or plain, as the weight is."""

    weight: torch.Tensor | Fp8Weight
    ops: Ops

    def __call__(self, x: torch.Tensor | QuantizedRows) -> torch.Tensor:
        if isinstance(self.weight, Fp8Weight):
            return self.ops.fp8_linear(x, self.weight)
        assert isinstance(x, torch.Tensor)
        return self.ops.linear(x, self.weight)

    @property
    def is_fp8(self) -> bool:
        return isinstance(self.weight, Fp8Weight)


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
    ops: Ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """norm(x + residual) and the residual to carry on. The norm reads the sum before it is rounded to x's dtype."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


@dataclass(frozen=True)
class LayerNorm:
    """weight and bias fp32 [D], of the indexer's keys. What turns the keys also norms them."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float = 1e-6  # not in config.json


@dataclass(frozen=True)
class MLP:
    """x [T, D] -> [T, D]: down(silu(gate(x)) * up(x)), the product in fp32."""

    gate_up: FusedLinear
    down: Linear
    ops: Ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x)
        return self.down((self.ops.swiglu_quantized if self.down.is_fp8 else self.ops.swiglu)(gate, up))
