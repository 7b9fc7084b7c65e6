"""What the memory of one GPU of a worker goes to: weights by part, what a step needs, pages with the rest.

Sizes only, from the model's config; the workspace is `workers.memory`'s own formula. Knows nothing of time, tensors or devices.
"""

from dataclasses import dataclass
from typing import Literal

from kernels.layout import PAGE_SIZE, QUANT_BLOCK
from workers.config import EngineConfig
from workers.memory import RESERVE_BYTES, Workspace, workspace
from workers.model_config import ModelConfig
from workers.shares import experts_of

_BF16, _FP32 = 2, 4


class DoesNotFit(ValueError):
    """Not even a page is left. The sentence says what the memory went to."""


@dataclass(frozen=True)
class WeightBytes:
    """On one rank: of the routed experts its share, of everything else all."""

    routed_experts: int
    shared_experts: int
    gates: int
    dense_mlps: int
    attention: int
    indexers: int
    norms: int
    embedding_and_head: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of one GPU. Parts and what is left over add up to `device`."""

    device: int
    weights: WeightBytes
    workspace: Workspace
    reserve: int
    page_bytes: int  # of a page in all layers, both caches
    num_pages: int

    @property
    def pages(self) -> int:
        return self.page_bytes * self.num_pages

    @property
    def left_over(self) -> int:
        return self.device - self.weights.total - self.workspace.total - self.reserve - self.pages

    @property
    def cached_tokens(self) -> int:
        return self.num_pages * PAGE_SIZE


def weight_bytes(model: ModelConfig, ranks: int) -> WeightBytes:
    """FP8 matrices with their scales, as `workers` holds them on a GPU. ValueError for a number of ranks the experts do not allow."""
    hidden, latent, heads = model.hidden_size, model.kv_lora_rank, model.num_attention_heads
    layers, dense = model.num_hidden_layers, model.first_k_dense_replace
    moe = layers - dense
    expert = _mlp(hidden, model.moe_intermediate_size)
    attention = (
        _fp8(model.q_lora_rank, hidden)
        + _fp8(latent + model.qk_rope_head_dim, hidden)
        + _fp8(heads * model.qk_head_dim, model.q_lora_rank)
        + heads * (model.qk_nope_head_dim + model.v_head_dim) * latent * _BF16  # absorbed: not FP8
        + _fp8(hidden, heads * model.v_head_dim)
    )
    indexer = (
        _fp8(model.index_n_heads * model.index_head_dim, model.q_lora_rank)
        + _fp8(model.index_head_dim, hidden)
        + model.index_n_heads * hidden * _FP32
    )
    layer_norms = 2 * hidden + model.q_lora_rank + latent + 2 * model.index_head_dim
    return WeightBytes(
        routed_experts=moe * len(experts_of(0, ranks, model.n_routed_experts)) * expert,
        shared_experts=moe * _mlp(hidden, model.moe_intermediate_size * model.n_shared_experts),
        gates=moe * model.n_routed_experts * (hidden + 1) * _FP32,
        dense_mlps=dense * _mlp(hidden, model.intermediate_size),
        attention=layers * attention,
        indexers=layers * indexer,
        norms=(layers * layer_norms + hidden) * _FP32,
        embedding_and_head=2 * model.vocab_size * hidden * _BF16,
    )


def gpu_memory(model: ModelConfig, engine: EngineConfig, device_bytes: int) -> GpuMemory:
    """Raises DoesNotFit."""
    weights = weight_bytes(model, engine.ranks)
    needed = workspace(model, engine)
    page_bytes = model.cache_layout(quantized=True).page_bytes * model.num_hidden_layers
    left = device_bytes - weights.total - needed.total - RESERVE_BYTES
    if left < page_bytes:
        raise DoesNotFit(
            f"a GPU of {device_bytes / 1e9:.0f} GB has no room for pages beside {weights.total / 1e9:.1f} GB of weights "
            f"(1/{engine.ranks} of the routed experts), {needed.total / 1e9:.1f} GB of workspace and {RESERVE_BYTES / 1e9:.1f} GB of reserve"
        )
    return GpuMemory(device_bytes, weights, needed, RESERVE_BYTES, page_bytes, left // page_bytes)


def requests_that_fit(memory: GpuMemory, role: Literal["prefill", "decode"], ranks: int, tokens: int) -> int:
    """How many requests of so many tokens a worker holds at once. Prefill ranks all hold the same pages, decode ranks their own."""
    pages = -(-tokens // PAGE_SIZE)
    each = memory.num_pages // pages
    return each if role == "prefill" else each * ranks


def _mlp(hidden: int, intermediate: int) -> int:
    return 2 * _fp8(intermediate, hidden) + _fp8(hidden, intermediate)


def _fp8(rows: int, columns: int) -> int:
    """A matrix of e4m3 with an fp32 scale for each block."""
    blocks = -(-rows // QUANT_BLOCK) * -(-columns // QUANT_BLOCK)
    return rows * columns + blocks * _FP32
