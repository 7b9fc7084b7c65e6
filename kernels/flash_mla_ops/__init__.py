"""Adapters to DeepSeek's own kernels, in the packages `flash_mla` and `deep_gemm`. ImportError if either is not installed.

They have some of the operators, for Hopper and for the sizes of the large models; `misfits` says which not.
"""

import torch

from kernels.dispatch import Sizes
from kernels.flash_mla_ops.attention import sparse_mla
from kernels.flash_mla_ops.indexer import index_scores, select_tokens
from kernels.flash_mla_ops.linear import fp8_linear, prepare_fp8_weight
from kernels.layout import CacheLayout

__all__ = [
    "fp8_linear",
    "index_scores",
    "prepare_fp8_weight",
    "select_tokens",
    "sparse_mla",
]

LAYOUT = CacheLayout(latent_dim=512, rope_dim=64, index_dim=128)
HEADS = (64, 128)
INDEX_HEADS = (32, 64)
TOPK_MULTIPLE = 128


def misfits(device: torch.device, sizes: Sizes) -> dict[str, str]:
    """The operators that have no kernel for this device and these sizes, each with the reason."""
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        reason = f"needs compute capability 9.0, and {device} has {capability[0]}.{capability[1]}"
        return dict.fromkeys(__all__, reason)
    attention, indexer = _attention_misfit(sizes), _indexer_misfit(sizes)
    reasons = {"sparse_mla": attention, "index_scores": indexer, "select_tokens": indexer}
    return {operator: reason for operator, reason in reasons.items() if reason is not None}


def _attention_misfit(sizes: Sizes) -> str | None:
    layout = sizes.layout
    if (layout.latent_dim, layout.rope_dim) != (LAYOUT.latent_dim, LAYOUT.rope_dim):
        return f"has rows of 512 + 64 channels only, not {layout.latent_dim} + {layout.rope_dim}"
    if sizes.heads not in HEADS:
        return f"takes 64 or 128 heads, not {sizes.heads}"
    if sizes.topk % TOPK_MULTIPLE:
        return f"takes multiples of {TOPK_MULTIPLE} tokens, not {sizes.topk}"
    return None


def _indexer_misfit(sizes: Sizes) -> str | None:
    if sizes.layout.index_dim != LAYOUT.index_dim:
        return f"has keys of 128 channels only, not {sizes.layout.index_dim}"
    if sizes.index_heads not in INDEX_HEADS:
        return f"takes 32 or 64 index heads, not {sizes.index_heads}"
    return None
