"""The operators in plain PyTorch, for CPU and CUDA tensors: the definition of correct."""

from kernels.reference.cache import (
    read_index_keys,
    read_latents,
    rotate_latents,
    write_index_keys,
    write_latents,
)
from kernels.reference.experts import expert_mlp, prepare_experts
from kernels.reference.gate import choose_experts
from kernels.reference.indexer import (
    index_scores,
    rotate_index_keys,
    rotate_index_queries,
    select_tokens,
)
from kernels.reference.linear import fp8_linear, head_linear, linear, prepare_fp8_weight
from kernels.reference.mla import dense_mla, expanded_mla, sparse_mla
from kernels.reference.norm import (
    add_rms_norm,
    add_rms_norm_quantized,
    rms_norm,
    swiglu,
    swiglu_quantized,
)
from kernels.reference.pack import checksums, pack_pages, unpack_pages
from kernels.reference.quant import (
    dequantize_blocks,
    dequantize_weight,
    quantize_blocks,
    quantize_weight,
)
from kernels.reference.topk import top_k

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
