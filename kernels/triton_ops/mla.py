"""Absorbed MLA over paged FP8 latents on a GPU: all heads read the same rows, latent and roped key as key, latent as value.

Knows nothing of how tokens were selected. Dense attention is sparse attention whose tokens come from the page table: both run
the same kernels. Grids follow from shapes alone; how many tokens a row really has is read on the device.
"""

import functools
import math

import torch
import triton

from kernels.layout import PAGE_SIZE, CacheLayout
from kernels.rows import Rows
from kernels.triton_ops import mla_hopper, mla_tiles
from kernels.triton_ops.cache import latent_views

LOG2_E = math.log2(math.e)
MAX_SPLITS = 64  # parts of one row's tokens; more would cost the combination more than they save
SMALL_DEVICE = 16  # multiprocessors assumed where there is no CUDA device: the interpreter


def sparse_mla(
    q: torch.Tensor,
    latent_pages: torch.Tensor,
    slots: torch.Tensor,
    softmax_scale: float,
    layout: CacheLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels.reference.sparse_mla; q bf16, its last dimension contiguous. A row's work ends with its last valid slot."""
    return _attend(q, latent_pages, slots, None, softmax_scale, layout)


def dense_mla(
    q: torch.Tensor, latent_pages: torch.Tensor, rows: Rows, softmax_scale: float, layout: CacheLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels.reference.dense_mla; q bf16, its last dimension contiguous."""
    return _attend(q, latent_pages, None, rows, softmax_scale, layout)


def _attend(
    q: torch.Tensor,
    latent_pages: torch.Tensor,
    slots: torch.Tensor | None,
    rows: Rows | None,
    softmax_scale: float,
    layout: CacheLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    values, scales, keys = latent_views(latent_pages, layout)
    if q.dtype != torch.bfloat16 or q.stride(-1) != 1:
        raise ValueError(f"q must be bfloat16 with a contiguous last dimension, not {q.dtype}, {q.stride()}")
    num_rows, heads, _ = q.shape
    out = q.new_empty(num_rows, heads, layout.latent_dim)
    lse = q.new_empty(num_rows, heads, dtype=torch.float32)
    if not num_rows:
        return out, lse
    hopper = mla_hopper.fits(q, layout)
    head_tile = mla_hopper.HEAD_TILE if hopper else mla_tiles.HEAD_TILE
    if rows is None:
        assert slots is not None
        capacity, where = slots.shape[1], (slots, slots, slots, slots)
    else:
        capacity = rows.page_table.shape[1] * PAGE_SIZE
        where = (rows.page_table, rows.owners, rows.positions, rows.page_table)
    head_tiles = triton.cdiv(heads, head_tile)
    splits = _num_splits(num_rows * head_tiles, capacity, _multiprocessors(q.device))
    target, target_lse = out, lse
    if splits > 1:
        target = q.new_empty(splits, num_rows, heads, layout.latent_dim, dtype=torch.float32)
        target_lse = q.new_empty(splits, num_rows, heads, dtype=torch.float32)
    launch = mla_hopper.launch if hopper else _launch_tiles
    launch(
        (num_rows, head_tiles, splits),
        q,
        (values, scales, keys),
        where,
        target,
        target_lse,
        capacity,
        softmax_scale * LOG2_E,
        rows is not None,
        layout,
    )
    if splits > 1:
        mla_tiles.combine_splits[(num_rows * heads,)](
            target,
            target_lse,
            out,
            lse,
            num_rows * heads,
            splits,
            MAX_SPLITS=MAX_SPLITS,
            LATENT=layout.latent_dim,
            num_warps=4,
        )
    return out, lse


def _num_splits(tiles: int, capacity: int, multiprocessors: int) -> int:
    """Into how many parts a row's tokens go, so that few rows still fill the device. From shapes alone."""
    blocks = triton.cdiv(capacity, mla_tiles.TOKEN_TILE)
    return max(1, min(multiprocessors // tiles, blocks, MAX_SPLITS))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return SMALL_DEVICE
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch_tiles(
    grid: tuple[int, int, int],
    q: torch.Tensor,
    pages: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    where: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    capacity: int,
    scale_log2: float,
    dense: bool,
    layout: CacheLayout,
) -> None:
    mla_tiles.attend_tile[grid](
        q,
        *pages,
        *where,
        out,
        lse,
        q.stride(0),
        q.stride(1),
        where[0].stride(0),
        where[3].stride(0),
        pages[0].shape[0] * PAGE_SIZE,
        capacity,
        q.shape[1],
        scale_log2,
        grid[2],
        WHOLE=grid[2] == 1,
        DENSE=dense,
        TOPK_PADDED=1 if dense else triton.next_power_of_2(max(capacity, 1)),
        LATENT=layout.latent_dim,
        ROPE=layout.rope_dim,
        ROW_BYTES=layout.latent_row_bytes,
        HEADS=mla_tiles.HEAD_TILE,
        TOKENS=mla_tiles.TOKEN_TILE,
        num_warps=4,
        num_stages=2,
    )
