"""Sparse MLA by FlashMLA: its decode kernel on FP8 pages for few rows, its prefill kernel on bf16 latents for many."""

from typing import Any

import flash_mla
import torch

from kernels.flash_mla_ops.workspace import gather_latents, valid_slots
from kernels.layout import PAGE_SIZE, CacheLayout

DECODE_ROWS = 256  # more rows are faster with the prefill kernel, gathering included
WORKSPACE_TOKENS = 2**20  # latents in bf16 at a time: 1.2 GB

_schedules = dict[tuple[tuple[int, int, int], torch.device], Any]()


def sparse_mla(
    q: torch.Tensor,
    latent_pages: torch.Tensor,
    slots: torch.Tensor,
    softmax_scale: float,
    layout: CacheLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels.reference.sparse_mla. q goes in and out comes back as bf16, whatever q's dtype."""
    slots, queries = slots.contiguous(), q.to(torch.bfloat16).contiguous()
    if len(q) <= DECODE_ROWS:
        out, lse = _decode(queries, latent_pages, slots, softmax_scale, layout)
    else:
        out, lse = _prefill(queries, latent_pages, slots, softmax_scale, layout)
    return out.to(q.dtype), lse


def _decode(
    q: torch.Tensor,
    latent_pages: torch.Tensor,
    slots: torch.Tensor,
    softmax_scale: float,
    layout: CacheLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row is a batch of one query token."""
    out, lse = flash_mla.flash_mla_with_kvcache(
        q.unsqueeze(1),
        latent_pages.unsqueeze(2),
        None,
        None,
        layout.latent_dim,
        _schedule((len(q), q.shape[1], slots.shape[1]), q.device),
        softmax_scale=softmax_scale,
        is_fp8_kvcache=True,
        indices=valid_slots(slots, len(latent_pages) * PAGE_SIZE).unsqueeze(1),
    )
    return out.squeeze(1), lse.squeeze(2)


def _schedule(shape: tuple[int, int, int], device: torch.device) -> Any:
    """How the work is spread over the chip: without lengths it depends on shapes alone, so that all layers and steps share it.

    shape: rows, heads, topk. One that is made while a CUDA graph is captured belongs to that graph and is not kept.
    """
    kept = _schedules.get((shape, device))
    if kept is None:
        kept = flash_mla.get_mla_metadata()[0]
        if not torch.cuda.is_current_stream_capturing():
            _schedules[shape, device] = kept
    return kept


def _prefill(
    q: torch.Tensor,
    latent_pages: torch.Tensor,
    slots: torch.Tensor,
    softmax_scale: float,
    layout: CacheLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As many rows at a time as cannot name more tokens than the workspace holds."""
    out = q.new_empty(*q.shape[:2], layout.latent_dim)
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    step = len(q)
    if len(latent_pages) * PAGE_SIZE > WORKSPACE_TOKENS:
        step = max(1, WORKSPACE_TOKENS // slots.shape[1])
    for start in range(0, len(q), step):
        chunk = slice(start, start + step)
        latents, numbers = gather_latents(latent_pages, slots[chunk], layout)
        out[chunk], _, lse[chunk] = flash_mla.flash_mla_sparse_fwd(
            q[chunk], latents.unsqueeze(1), numbers.unsqueeze(1), softmax_scale, layout.latent_dim
        )
    return out, lse
