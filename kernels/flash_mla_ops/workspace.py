"""Cached latents as FlashMLA's prefill kernel wants them: one contiguous bf16 tensor of the rows that are used, and their numbers.

Nothing waits for the host: how many tokens are used is known on the device alone, and the workspace has room for the most there
can be.
"""

import torch
import triton
import triton.language as tl

from kernels.layout import PAGE_SIZE, CacheLayout

_BLOCK = 1024


def valid_slots(slots: torch.Tensor, num_slots: int) -> torch.Tensor:
    """int32 [...], contiguous -> the same, with -1 for whatever is not in 0 .. num_slots - 1: FlashMLA reads any other number."""
    out = torch.empty_like(slots)
    _valid_slots[(triton.cdiv(slots.numel(), _BLOCK),)](slots, out, slots.numel(), num_slots, _BLOCK)
    return out


def gather_latents(
    latent_pages: torch.Tensor, slots: torch.Tensor, layout: CacheLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token that a slot names, once.

    latent_pages: uint8 [P, 64, latent_row_bytes]; slots: int32 [T, topk], contiguous, any outside 0 .. P x 64 - 1 counts as none
    Returns latents bf16 [at most T x topk, latent_dim + rope_dim], of which only rows that the second result names are written,
    and their numbers int32 [T, topk], -1 where the slot was none.
    """
    num_slots = len(latent_pages) * PAGE_SIZE
    used = torch.zeros(num_slots, dtype=torch.uint8, device=slots.device)
    grid = (triton.cdiv(slots.numel(), _BLOCK),)
    _mark[grid](slots, used, slots.numel(), num_slots, _BLOCK)
    ends = torch.cumsum(used, 0, dtype=torch.int32)
    numbers = torch.empty_like(slots)
    _number[grid](slots, ends, numbers, slots.numel(), num_slots, _BLOCK)
    width = layout.latent_dim + layout.rope_dim
    latents = torch.empty(
        min(num_slots, slots.numel()), width, dtype=torch.bfloat16, device=latent_pages.device
    )
    _upconvert[(len(latent_pages),)](
        latent_pages.view(torch.float8_e4m3fn),
        latent_pages.view(torch.float32),
        latent_pages.view(torch.bfloat16),
        used,
        ends,
        latents,
        PAGE_SIZE,
        layout.latent_row_bytes,
        layout.latent_dim,
        layout.rope_dim,
        num_warps=8,
    )
    return latents, numbers


@triton.jit
def _valid_slots(slots, out, count, num_slots, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + at, mask=at < count, other=-1)
    tl.store(out + at, tl.where((slot >= 0) & (slot < num_slots), slot, -1), mask=at < count)


@triton.jit
def _mark(slots, used, count, num_slots, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + at, mask=at < count, other=-1)
    tl.store(used + slot, tl.full((BLOCK,), 1, tl.uint8), mask=(slot >= 0) & (slot < num_slots))


@triton.jit
def _number(slots, ends, numbers, count, num_slots, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + at, mask=at < count, other=-1)
    end = tl.load(ends + slot, mask=(slot >= 0) & (slot < num_slots), other=0)
    tl.store(numbers + at, end - 1, mask=at < count)


@triton.jit
def _upconvert(
    values,
    scales,
    rotary,
    used,
    ends,
    latents,
    PAGE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
):
    """One program a page: the same bytes as e4m3 values, fp32 scales (one per 128 channels) and bf16 roped keys."""
    slot = tl.program_id(0).to(tl.int64) * PAGE + tl.arange(0, PAGE)
    wanted = tl.load(used + slot) != 0
    if tl.max(wanted.to(tl.int32), 0) == 0:
        return
    target = latents + (tl.load(ends + slot).to(tl.int64) - 1)[:, None] * (LATENT + ROPE)
    mask = wanted[:, None]
    channel = tl.arange(0, 128)[None, :]
    for block in tl.static_range(LATENT // 128):
        value = tl.load(values + slot[:, None] * ROW_BYTES + block * 128 + channel, mask=mask)
        scale = tl.load(scales + slot * (ROW_BYTES // 4) + LATENT // 4 + block, mask=wanted)
        row = (value.to(tl.float32) * scale[:, None]).to(tl.bfloat16)
        tl.store(target + block * 128 + channel, row, mask=mask)
    pair = tl.arange(0, ROPE)[None, :]
    start = (LATENT + LATENT // 32) // 2  # of the roped key, in bf16 elements
    key = tl.load(rotary + slot[:, None] * (ROW_BYTES // 2) + start + pair, mask=mask)
    tl.store(target + LATENT + pair, key, mask=mask)
