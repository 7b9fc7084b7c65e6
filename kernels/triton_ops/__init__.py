"""The operators as kernels for Hopper, compiled when they are first called."""

from kernels.triton_ops.cache import read_latents, rotate_latents, write_latents
from kernels.triton_ops.experts import expert_mlp, prepare_experts
from kernels.triton_ops.gate import choose_experts
from kernels.triton_ops.indexer import (
    hadamard,
    index_scores,
    read_index_keys,
    select_tokens,
    write_index_keys,
)
from kernels.triton_ops.linear import fp8_linear, head_linear, linear, prepare_fp8_weight
from kernels.triton_ops.mla import dense_mla, sparse_mla
from kernels.triton_ops.norm import (
    add_rms_norm,
    add_rms_norm_quantized,
    layer_norm,
    rms_norm,
    swiglu,
    swiglu_quantized,
)
from kernels.triton_ops.quant import dequantize_blocks, dequantize_weight, quantize_blocks, quantize_weight
from kernels.triton_ops.topk import top_k

__all__ = [
    "hadamard",
    "index_scores",
    "read_index_keys",
    "select_tokens",
    "top_k",
    "write_index_keys",
    "dense_mla",
    "read_latents",
    "rotate_latents",
    "sparse_mla",
    "write_latents",
    "add_rms_norm",
    "add_rms_norm_quantized",
    "choose_experts",
    "dense_mla",
    "dequantize_blocks",
    "dequantize_weight",
    "expert_mlp",
    "fp8_linear",
    "head_linear",
    "layer_norm",
    "linear",
    "prepare_experts",
    "prepare_fp8_weight",
    "quantize_blocks",
    "quantize_weight",
    "read_latents",
    "rms_norm",
    "rotate_latents",
    "sparse_mla",
    "swiglu",
    "swiglu_quantized",
    "write_latents",
]
