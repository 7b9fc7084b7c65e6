"""The operators in plain PyTorch, for CPU and CUDA tensors: the definition of correct."""

from kernels.reference.cache import (
    read_index_keys,
    read_latents,
    rotate_latents,
    write_index_keys,
    write_latents,
)
from kernels.reference.indexer import hadamard, index_scores, select_tokens
from kernels.reference.linear import fp8_linear, head_linear, linear, prepare_fp8_weight
from kernels.reference.mla import dense_mla, sparse_mla
from kernels.reference.pack import checksums, pack_pages, unpack_pages
from kernels.reference.quant import (
    dequantize_blocks,
    dequantize_weight,
    quantize_blocks,
    quantize_weight,
)
from kernels.reference.topk import top_k

__all__ = [
    "checksums",
    "dense_mla",
    "dequantize_blocks",
    "dequantize_weight",
    "fp8_linear",
    "hadamard",
    "head_linear",
    "index_scores",
    "linear",
    "pack_pages",
    "prepare_fp8_weight",
    "quantize_blocks",
    "quantize_weight",
    "read_index_keys",
    "read_latents",
    "rotate_latents",
    "select_tokens",
    "sparse_mla",
    "top_k",
    "unpack_pages",
    "write_index_keys",
    "write_latents",
]
