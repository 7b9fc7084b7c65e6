"""The operators in Triton, for Hopper GPUs. Importing it needs Triton; `kernels.dispatch` does so only when asked."""

from kernels.triton_ops.cache import read_latents, rotate_latents, write_latents
from kernels.triton_ops.mla import dense_mla, sparse_mla

__all__ = ["dense_mla", "read_latents", "rotate_latents", "sparse_mla", "write_latents"]
