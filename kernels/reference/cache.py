"""Writes and reads the two paged caches, byte for byte as `kernels.layout` says. Knows nothing of who owns a page.

A slot is page x 64 + offset. Latent pages are uint8 [P, 64, latent_row_bytes], index pages uint8 [P, index_page_bytes], both
contiguous. Reading a slot outside 0 .. P x 64 - 1 gives zeros; writing takes valid, distinct slots only.
"""

import torch
import torch.nn.functional as F

from kernels.layout import PAGE_SIZE, CacheLayout
from kernels.reference.quant import dequantize_blocks, quantize_blocks
from kernels.reference.rope import rotate_neighbours

LATENTS_AT_ONCE = 512  # what is computed on the way to them stays in the CPU's cache


def write_latents(
    pages: torch.Tensor, slots: torch.Tensor, latent: torch.Tensor, k_pe: torch.Tensor, layout: CacheLayout
) -> None:
    """slots int64 [T], latent [T, latent_dim], k_pe [T, rope_dim] (already roped). k_pe is stored as bf16 if quantised."""
    if layout.quantized:
        parts = [*quantize_blocks(latent), k_pe.to(torch.bfloat16)]
    else:
        parts = [latent.float(), k_pe.float()]
    row_bytes = torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)
    pages.view(-1, layout.latent_row_bytes).index_copy_(0, slots, row_bytes)


def rotate_latents(
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
) -> torch.Tensor:
    """Everything between MLA's projections and its attention: RoPE of queries and keys, norm of the latents, and their cache.

    query_pe:    [T, H, rope_dim], key_pe [T, rope_dim], latent [T, latent_dim]: as projected, of one dtype, strided views too
    norm_weight: fp32 [latent_dim] of the RMSNorm, which is computed and scaled in fp32 and cast last
    cos, sin:    fp32 [T, 1, rope_dim / 2], of each row's position
    slots:       int64 [T], valid and distinct: where each row's latent and roped key go
    Returns the roped query_pe in its dtype. MLA pairs neighbouring channels (2i, 2i+1), in fp32.
    """
    normed = F.rms_norm(latent.float(), norm_weight.shape, norm_weight, eps).to(latent.dtype)
    roped_key = rotate_neighbours(key_pe.unsqueeze(1), cos, sin).squeeze(1)
    write_latents(pages, slots, normed, roped_key, layout)
    return rotate_neighbours(query_pe, cos, sin)


def write_index_keys(
    pages: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, layout: CacheLayout
) -> None:
    """slots int64 [T], keys [T, index_dim] (already roped and Hadamard-transformed)."""
    where = (slots // PAGE_SIZE, slots % PAGE_SIZE)
    if layout.quantized:
        values, scales = quantize_blocks(keys)
        _index_key_bytes(pages, layout)[where] = values.view(torch.uint8)
        _index_scales(pages, layout)[where] = scales
    else:
        _index_key_bytes(pages, layout)[where] = keys.float().contiguous().view(torch.uint8)


def read_latents(pages: torch.Tensor, slots: torch.Tensor, layout: CacheLayout) -> torch.Tensor:
    """slots int [...] -> fp32 [..., latent_dim + rope_dim], dequantised."""
    table, dim = pages.view(-1, layout.latent_row_bytes), layout.latent_dim + layout.rope_dim
    if not layout.quantized:
        return _take(table, slots.flatten()).view(torch.float32).view(*slots.shape, dim)
    out = pages.new_empty(slots.numel(), dim, dtype=torch.float32)
    for some, target in zip(slots.flatten().split(LATENTS_AT_ONCE), out.split(LATENTS_AT_ONCE), strict=True):
        values, scales, k_pe = _take(table, some).split(
            (layout.latent_dim, layout.latent_scale_bytes, 2 * layout.rope_dim), dim=-1
        )
        latent, roped_key = target.split((layout.latent_dim, layout.rope_dim), dim=-1)
        latent.copy_(dequantize_blocks(values.view(torch.float8_e4m3fn), scales.view(torch.float32)))
        roped_key.copy_(k_pe.view(torch.bfloat16))
    return out.view(*slots.shape, dim)


def read_index_keys(pages: torch.Tensor, slots: torch.Tensor, layout: CacheLayout) -> torch.Tensor:
    """slots int [...] -> fp32 [..., index_dim], dequantised."""
    page_ids, which = (slots // PAGE_SIZE).unique(return_inverse=True)
    return read_index_pages(pages, page_ids, layout)[which, slots % PAGE_SIZE]


def read_index_pages(pages: torch.Tensor, page_ids: torch.Tensor, layout: CacheLayout) -> torch.Tensor:
    """page_ids int [n] -> fp32 [n, 64, index_dim], dequantised; zeros for a page that is not there."""
    taken = _take(pages, page_ids)
    keys = _index_key_bytes(taken, layout)
    if layout.quantized:
        return dequantize_blocks(keys.view(torch.float8_e4m3fn), _index_scales(taken, layout))
    return keys.view(torch.float32)


def _take(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows of a uint8 table, zeros where the index is outside it. Bytes of zero are zero in every layout."""
    invalid = (indices < 0) | (indices >= len(table))
    taken = table.index_select(0, indices.masked_fill(invalid, 0))
    return taken.index_fill_(0, invalid.nonzero().squeeze(1), 0)


def _index_key_bytes(pages: torch.Tensor, layout: CacheLayout) -> torch.Tensor:
    """A view of index pages, uint8 [P, 64, index_key_bytes]."""
    return pages[:, : PAGE_SIZE * layout.index_key_bytes].unflatten(1, (PAGE_SIZE, -1))


def _index_scales(pages: torch.Tensor, layout: CacheLayout) -> torch.Tensor:
    """A view of index pages, fp32 [P, 64, index_dim / 128]."""
    return pages[:, PAGE_SIZE * layout.index_key_bytes :].view(torch.float32).unflatten(1, (PAGE_SIZE, -1))
