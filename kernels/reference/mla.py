"""Absorbed MLA over paged latents: every head reads the same row, its latent as key and value and its roped key.

Knows nothing of how the rows were selected. On a CPU the bits of a query row depend on its own slots alone: each row is one
product of a fixed shape, whatever else is in the batch.
"""

import itertools

import torch

from kernels.layout import PAGE_SIZE, CacheLayout
from kernels.reference.cache import read_latents
from kernels.rows import Rows

CHUNK_BYTES = 64 * 2**20  # gathered rows held at a time; the row count of a chunk follows from it


def sparse_mla(
    q: torch.Tensor, latent_pages: torch.Tensor, slots: torch.Tensor, softmax_scale: float, layout: CacheLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query row over the tokens in its slots.

    q:            [T, H, latent_dim + rope_dim]
    latent_pages: uint8 [P, 64, latent_row_bytes]
    slots:        int32 [T, topk]; any outside 0 .. P x 64 - 1 counts as none
    Returns out [T, H, latent_dim] in q's dtype and the log-sum-exp fp32 [T, H], natural log. A row without a valid slot gives
    0 and +inf, as FlashMLA does.
    """
    num_slots = len(latent_pages) * PAGE_SIZE
    valid = (slots >= 0) & (slots < num_slots)
    slots = slots.masked_fill(~valid, -1)
    out = q.new_empty(*q.shape[:2], layout.latent_dim)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    step = max(1, CHUNK_BYTES // (4 * max(1, slots.shape[1]) * (layout.latent_dim + layout.rope_dim)))
    table, where = _latent_table(latent_pages, slots, layout)
    for start in range(0, len(q), step):
        chunk = slice(start, start + step)
        rows = table[where[chunk]]
        out[chunk], lse[chunk] = _attend(q[chunk], rows, valid[chunk].unsqueeze(1), softmax_scale, layout)
    return out, lse


def dense_mla(
    q: torch.Tensor, latent_pages: torch.Tensor, rows: Rows, softmax_scale: float, layout: CacheLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """As sparse_mla, over every token that a row sees. For comparison and for short contexts."""
    out = q.new_empty(*q.shape[:2], layout.latent_dim)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    offsets = torch.arange(PAGE_SIZE, device=q.device)
    for request, (first, end) in enumerate(itertools.pairwise(rows.query_starts)):
        if first == end:
            continue
        length = int(rows.positions[first:end].max()) + 1
        pages = rows.page_table[request, : -(-length // PAGE_SIZE)].long()
        latents = read_latents(latent_pages, (pages.unsqueeze(1) * PAGE_SIZE + offsets).flatten(), layout)[:length]
        step = max(1, CHUNK_BYTES // (8 * q.shape[1] * length))
        for start in range(first, end, step):
            chunk = slice(start, min(start + step, end))
            visible = torch.arange(length, device=q.device) <= rows.positions[chunk].unsqueeze(1)
            out[chunk], lse[chunk] = _attend(q[chunk], latents, visible.unsqueeze(1), softmax_scale, layout)
    return out, lse


def _latent_table(
    latent_pages: torch.Tensor, slots: torch.Tensor, layout: CacheLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that are used, each dequantised once, and where in them each slot is."""
    used, where = slots.unique(return_inverse=True)
    return read_latents(latent_pages, used, layout), where


def _attend(
    q: torch.Tensor, rows: torch.Tensor, valid: torch.Tensor, softmax_scale: float, layout: CacheLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [t, H, D], rows fp32 [t, n, D] or, for all query rows, [n, D]; valid bool [t, 1, n]."""
    queries = q.float()
    logits = (torch.matmul(queries, rows.transpose(-1, -2)) * softmax_scale).masked_fill_(~valid, -torch.inf)
    lse = logits.logsumexp(-1)
    empty = lse == -torch.inf
    weights = torch.exp(logits - lse.masked_fill(empty, 0.0).unsqueeze(-1))
    out = torch.matmul(weights, rows[..., : layout.latent_dim])
    return out.to(q.dtype), lse.masked_fill(empty, torch.inf)
