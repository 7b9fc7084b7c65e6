"""The one interface of all back ends, and how to get one. Knows nothing of what an operator computes.

A back end is a module with the functions of `Ops`. It is imported when it is first asked for; a name that is missing is an
error, never a slower back end.
"""

import functools
import importlib
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from kernels.layout import CacheLayout
from kernels.rows import Rows

BACK_ENDS = {"reference": "kernels.reference"}


@dataclass(frozen=True)
class Fp8Weight:
    """An FP8 matrix in the form that one back end multiplies with. Made by its prepare_fp8_weight; only it looks inside."""

    tensors: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class QuantizedRows:
    """Activations in FP8, as the next FP8 product reads them.

    values: e4m3 [T, K]
    scales: fp32 [T, ceil(K / 128)], in the strides that the back end likes best
    dtype:  of the activations that were quantised, and of the product
    """

    values: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class ExpertWeights:
    """The matrices of E experts in the form that one back end multiplies with. Made by its prepare_experts; only it looks
    inside."""

    tensors: tuple[torch.Tensor, ...]
    quantized: bool  # FP8 matrices: activations are quantised too


class Ops(Protocol):
    """The operators of a back end. `kernels.reference` documents and defines each of them."""

    def quantize_blocks(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def dequantize_blocks(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor: ...

    def quantize_weight(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def dequantize_weight(self, weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor: ...

    def prepare_fp8_weight(self, weight: torch.Tensor, scale_inv: torch.Tensor) -> Fp8Weight: ...

    def fp8_linear(self, x: torch.Tensor | QuantizedRows, weight: Fp8Weight) -> torch.Tensor: ...

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype | None = None
    ) -> torch.Tensor: ...

    def head_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor: ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def add_rms_norm_quantized(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, QuantizedRows]: ...

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor: ...

    def swiglu(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor: ...

    def swiglu_quantized(self, gate: torch.Tensor, up: torch.Tensor) -> QuantizedRows: ...

    def choose_experts(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        *,
        num_groups: int,
        kept_groups: int,
        num_chosen: int,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def prepare_experts(
        self,
        gate_up: torch.Tensor,
        gate_up_scale: torch.Tensor | None,
        down: torch.Tensor,
        down_scale: torch.Tensor | None,
    ) -> ExpertWeights: ...

    def expert_mlp(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        prepared: ExpertWeights,
        start: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def hadamard(self, x: torch.Tensor) -> torch.Tensor: ...

    def write_latents(
        self,
        pages: torch.Tensor,
        slots: torch.Tensor,
        latent: torch.Tensor,
        k_pe: torch.Tensor,
        layout: CacheLayout,
    ) -> None: ...

    def write_index_keys(
        self, pages: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, layout: CacheLayout
    ) -> None: ...

    def read_latents(self, pages: torch.Tensor, slots: torch.Tensor, layout: CacheLayout) -> torch.Tensor: ...

    def read_index_keys(
        self, pages: torch.Tensor, slots: torch.Tensor, layout: CacheLayout
    ) -> torch.Tensor: ...

    def index_scores(
        self,
        q: torch.Tensor,
        weights: torch.Tensor,
        index_pages: torch.Tensor,
        rows: Rows,
        layout: CacheLayout,
    ) -> torch.Tensor: ...

    def top_k(self, scores: torch.Tensor, lengths: torch.Tensor, topk: int) -> torch.Tensor: ...

    def select_tokens(
        self,
        q: torch.Tensor,
        weights: torch.Tensor,
        index_pages: torch.Tensor,
        rows: Rows,
        topk: int,
        layout: CacheLayout,
    ) -> torch.Tensor: ...

    def sparse_mla(
        self,
        q: torch.Tensor,
        latent_pages: torch.Tensor,
        slots: torch.Tensor,
        softmax_scale: float,
        layout: CacheLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def dense_mla(
        self,
        q: torch.Tensor,
        latent_pages: torch.Tensor,
        rows: Rows,
        softmax_scale: float,
        layout: CacheLayout,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def checksums(self, pages: torch.Tensor) -> torch.Tensor: ...

    def pack_pages(
        self, pages: torch.Tensor, layers: tuple[int, int], page_ids: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def unpack_pages(
        self,
        buffer: torch.Tensor,
        expected: torch.Tensor,
        pages: torch.Tensor,
        layers: tuple[int, int],
        page_ids: list[int],
    ) -> list[tuple[int, int]]: ...


@functools.cache
def select(name: str = "reference") -> Ops:
    """The back end of that name. ValueError lists the known ones; ImportError if its library is not installed."""
    if name not in BACK_ENDS:
        raise ValueError(f"no back end is called {name!r}; there are {', '.join(sorted(BACK_ENDS))}")
    return cast(Ops, importlib.import_module(BACK_ENDS[name]))
