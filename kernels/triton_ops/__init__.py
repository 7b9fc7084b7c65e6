"""The operators as kernels for Hopper, compiled when they are first called."""

from kernels.triton_ops.cache import read_latents, rotate_latents, write_latents
from kernels.triton_ops.experts import expert_mlp, prepare_experts
from kernels.triton_ops.gate import choose_experts
from kernels.triton_ops.indexer import (
    index_scores,
    read_index_keys,
    rotate_index_keys,
    rotate_index_queries,
    select_tokens,
    write_index_keys,
)
from kernels.triton_ops.linear import fp8_linear, head_linear, linear, prepare_fp8_weight
from kernels.triton_ops.mla import dense_mla, sparse_mla
from kernels.triton_ops.mla_expanded import expanded_mla
from kernels.triton_ops.norm import (
    add_rms_norm,
    add_rms_norm_quantized,
    rms_norm,
    swiglu,
    swiglu_quantized,
)
from kernels.triton_ops.pack import checksums, pack_pages, unpack_pages
from kernels.triton_ops.quant import dequantize_blocks, dequantize_weight, quantize_blocks, quantize_weight
from kernels.triton_ops.topk import top_k

__all__ = [
    "add_rms_norm",
    "add_rms_norm_quantized",
    "checksums",
    "choose_experts",
    "dense_mla",
    "dequantize_blocks",
    "dequantize_weight",
    "expanded_mla",
    "expert_mlp",
    "fp8_linear",
    "head_linear",
    "index_scores",
    "linear",
    "pack_pages",
    "prepare_experts",
    "prepare_fp8_weight",
    "quantize_blocks",
    "quantize_weight",
    "read_index_keys",
    "read_latents",
    "rms_norm",
    "rotate_index_keys",
    "rotate_index_queries",
    "rotate_latents",
    "select_tokens",
    "sparse_mla",
    "swiglu",
    "swiglu_quantized",
    "top_k",
    "unpack_pages",
    "write_index_keys",
    "write_latents",
]
