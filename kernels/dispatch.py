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


class Ops(Protocol):
    """The operators of a back end. `kernels.reference` documents and defines each of them."""

    def quantize_blocks(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def dequantize_blocks(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor: ...

    def quantize_weight(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def dequantize_weight(self, weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor: ...

    def prepare_fp8_weight(self, weight: torch.Tensor, scale_inv: torch.Tensor) -> Fp8Weight: ...

    def fp8_linear(self, x: torch.Tensor, weight: Fp8Weight) -> torch.Tensor: ...

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor: ...

    def head_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor: ...

    def hadamard(self, x: torch.Tensor) -> torch.Tensor: ...

    def write_latents(
        self,
        pages: torch.Tensor,
        slots: torch.Tensor,
        latent: torch.Tensor,
        k_pe: torch.Tensor,
        layout: CacheLayout,
    ) -> None: ...

    def rotate_latents(
        self,
        query_pe: torch.Tensor,
        latent: torch.Tensor,
        key_pe: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        pages: torch.Tensor,
        slots: torch.Tensor,
        layout: CacheLayout,
    ) -> torch.Tensor: ...

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
