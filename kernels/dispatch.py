"""The one interface of all back ends, and which of them gives each operator. Knows nothing of what an operator computes.

A back end is a module whose `__all__` names the operators it has, all or some of those of `Ops`. It is imported when it is first
asked for. One that was asked for by name and is missing is an error, never a slower back end.
"""

import functools
import importlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Protocol, cast

import torch

from kernels.layout import CacheLayout
from kernels.rows import Rows

log = logging.getLogger(__name__)

BACK_ENDS = {
    "flash_mla": "kernels.flash_mla_ops",
    "triton": "kernels.triton_ops",
    "reference": "kernels.reference",
}  # the best first
OPTIONAL_PACKAGES = {
    "flash_mla",
    "deep_gemm",
    "triton",
}  # what is not installed is not used; what is broken is an error
FORMS = (
    ("prepare_fp8_weight", "fp8_linear"),
    ("prepare_experts", "expert_mlp"),
)  # one makes what the other of a back end reads


@dataclass(frozen=True)
class Sizes:
    """What of a model decides whether a back end has kernels for it. topk: tokens that a query row selects."""

    heads: int
    index_heads: int
    topk: int
    layout: CacheLayout


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
        num_blocks: int = 1,
    ) -> torch.Tensor: ...

    def rotate_index_keys(
        self,
        keys: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        pages: torch.Tensor,
        slots: torch.Tensor,
        layout: CacheLayout,
    ) -> None: ...

    def rotate_index_queries(
        self, queries: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor: ...

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

    def expanded_mla(
        self,
        query_nope: torch.Tensor,
        query_pe: torch.Tensor,
        latent_pages: torch.Tensor,
        rows: Rows,
        slots: torch.Tensor | None,
        key_up: torch.Tensor,
        value_up: torch.Tensor,
        softmax_scale: float,
        layout: CacheLayout,
    ) -> torch.Tensor: ...

    def checksums(self, pages: torch.Tensor) -> torch.Tensor: ...

    def pack_pages(
        self, pages: torch.Tensor, layers: tuple[int, int], page_ids: list[int]
    ) -> torch.Tensor: ...

    def unpack_pages(
        self, payload: torch.Tensor, pages: torch.Tensor, layers: tuple[int, int], page_ids: list[int]
    ) -> torch.Tensor: ...


OPERATORS = tuple(name for name in vars(Ops) if not name.startswith("_"))


@functools.cache
def select(name: str = "reference") -> Ops:
    """The back end of that name. ValueError lists the known ones; ImportError if its library is not installed."""
    return cast(Ops, _load(name))


def choose(device: str | torch.device, sizes: Sizes, wanted: str | None = None) -> Ops:
    """Each operator from one back end, decided once and logged as a table. Call it once, when a worker starts.

    device: on a CPU everything is the reference; on a CUDA device an operator comes from the first of flash_mla, triton and
    reference that is installed, has it, and has a kernel for the sizes.
    wanted: "NAME" takes every operator that NAME has from it, "OPERATOR=NAME" this one, several separated by commas. ImportError if
    its library is not installed; ValueError if it is not known or does not run on the device or with the sizes.
    """
    device, wishes = torch.device(device), _parse(wanted)
    chosen, passed_over = dict[str, str](), dict[str, None]()
    for operator in OPERATORS:
        wish = wishes.get(operator, wishes.get(""))
        name, reasons = _pick(operator, wish, device, sizes)
        if operator in wishes and name != wish:
            raise ValueError(f"back end {wish!r} has no {operator}")
        chosen[operator] = name
        passed_over |= dict.fromkeys(reasons)
    for form in FORMS:
        if len({chosen[operator] for operator in form}) > 1:
            raise ValueError(f"{' and '.join(form)} must come from one back end")
    log.info("kernels on %s\n%s", device, "\n".join(_table(chosen, passed_over)))
    return cast(Ops, SimpleNamespace(**{name: getattr(_load(chosen[name]), name) for name in OPERATORS}))


def _parse(wanted: str | None) -> dict[str, str]:
    """ "triton,sparse_mla=flash_mla" -> {"": "triton", "sparse_mla": "flash_mla"}."""
    wishes = dict[str, str]()
    for wish in wanted.split(",") if wanted else ():
        operator, _, name = wish.strip().rpartition("=")
        if operator and operator not in OPERATORS:
            raise ValueError(f"no operator is called {operator!r}; there are {', '.join(OPERATORS)}")
        wishes[operator] = _known(name)
    return wishes


def _known(name: str) -> str:
    if name not in BACK_ENDS:
        raise ValueError(f"no back end is called {name!r}; there are {', '.join(sorted(BACK_ENDS))}")
    return name


def _load(name: str) -> ModuleType:
    return importlib.import_module(BACK_ENDS[_known(name)])


def _pick(operator: str, wish: str | None, device: torch.device, sizes: Sizes) -> tuple[str, list[str]]:
    """-> the operator's back end, and why better ones were passed over."""
    # Only the reference knows unquantised caches, which are there to be compared with an oracle.
    order = list(BACK_ENDS) if device.type == "cuda" and sizes.layout.quantized else ["reference"]
    if wish is not None and wish not in order:
        raise ValueError(f"back end {wish!r} needs a CUDA device and quantised caches")
    reasons = list[str]()
    for name in order[order.index(wish) :] if wish else order:
        try:
            module = _load(name)
        except ModuleNotFoundError as error:
            if name == wish or error.name not in OPTIONAL_PACKAGES:
                raise
            reasons.append(f"{name}: {error.name} is not installed")
            continue
        if operator not in module.__all__:
            continue
        misfit = _misfit(module, operator, device, sizes)
        if misfit is None:
            return name, reasons
        if name == wish:
            raise ValueError(f"back end {name!r} has no {operator} here: {misfit}")
        reasons.append(f"{name}: {operator}: {misfit}")
    raise ValueError(f"no back end has {operator}")


def _misfit(module: ModuleType, operator: str, device: torch.device, sizes: Sizes) -> str | None:
    """Why the back end cannot run the operator; None if it can. A back end with limits has a function `misfits`."""
    return module.misfits(device, sizes).get(operator) if hasattr(module, "misfits") else None


def _table(chosen: dict[str, str], passed_over: Iterable[str]) -> Iterator[str]:
    for name in BACK_ENDS:
        if operators := [operator for operator in OPERATORS if chosen[operator] == name]:
            yield f"  {name:<10} {', '.join(operators)}"
    yield from (f"  not from {reason}" for reason in passed_over)
