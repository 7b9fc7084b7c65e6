"""MLA with keys and values expanded for each head, for many rows of short contexts: fewer operations a pair than over latents, but
on every visible token. What was not selected is hidden by a bit mask. Knows nothing of how tokens were selected.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.layout import PAGE_SIZE, CacheLayout
from kernels.rows import Rows
from kernels.triton_ops.cache import read_latents
from kernels.triton_ops.mla import LOG2_E

PAGE: tl.constexpr = tl.constexpr(PAGE_SIZE)
WORD: tl.constexpr = tl.constexpr(32)  # tokens of a word of the mask
LATER: tl.constexpr = tl.constexpr(2147483647)


class Tile(NamedTuple):
    """rows and tokens of a program's step, tokens being two words of a mask; stages: steps whose keys are under way."""

    rows: int
    tokens: int
    warps: int
    stages: int


TILE = Tile(rows=128, tokens=64, warps=8, stages=3)


def expanded_mla(
    query_nope: torch.Tensor,
    query_pe: torch.Tensor,
    latent_pages: torch.Tensor,
    rows: Rows,
    slots: torch.Tensor | None,
    key_up: torch.Tensor,
    value_up: torch.Tensor,
    softmax_scale: float,
    layout: CacheLayout,
) -> torch.Tensor:
    """As kernels.reference.expanded_mla. Takes memory for 2 x H x 128 channels of every token of the page table."""
    num_rows, heads, nope = query_nope.shape
    for name, size in (("nope", nope), ("v", value_up.shape[2])):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name} is {size}, but the Triton back end takes powers of two from 16 on")
    out = query_nope.new_empty(num_rows, heads, value_up.shape[2])
    if not num_rows:
        return out
    latents, keys_pe, places = _read(latent_pages, rows.page_table, layout, query_nope.dtype)
    keys, values = torch.matmul(latents, key_up.transpose(1, 2)), torch.matmul(latents, value_up)
    window = rows.page_table.shape[1] * PAGE_SIZE
    bits = _mask(slots, places, window) if slots is not None else None
    _attend_heads[(triton.cdiv(num_rows, TILE.rows), heads)](
        query_nope,
        query_pe,
        keys,
        keys_pe,
        values,
        bits,
        rows.owners,
        rows.positions,
        out,
        num_rows,
        window,
        len(latents),
        query_nope.stride(0),
        query_nope.stride(1),
        query_pe.stride(0),
        query_pe.stride(1),
        heads,
        softmax_scale * LOG2_E,
        slots.shape[1] if slots is not None else window,
        MASKED=bits is not None,
        NOPE=nope,
        ROPE=layout.rope_dim,
        VALUE=value_up.shape[2],
        ROWS=TILE.rows,
        TOKENS=TILE.tokens,
        STAGES=TILE.stages,
        num_warps=TILE.warps,
    )
    return out


def _read(
    latent_pages: torch.Tensor, page_table: torch.Tensor, layout: CacheLayout, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every token of a page table: latents [R x W x 64, latent], roped keys [R x W x 64, rope], zeros where there is no page, and
    int32 [pages of the cache + 1]: which of its request's pages a page is. One that requests share is the same of each."""
    num_pages = len(latent_pages)
    pages = torch.where(page_table < 0, num_pages, page_table).long()
    slots = pages.unsqueeze(2) * PAGE_SIZE + torch.arange(PAGE_SIZE, device=pages.device)
    cached = read_latents(latent_pages, slots.flatten(), layout).to(dtype)
    places = torch.zeros(num_pages + 1, dtype=torch.int32, device=pages.device)
    places[pages] = torch.arange(pages.shape[1], dtype=torch.int32, device=pages.device).expand_as(pages)
    latents, keys_pe = cached.split((layout.latent_dim, layout.rope_dim), dim=1)
    return latents.contiguous(), keys_pe.contiguous(), places


def _mask(slots: torch.Tensor, places: torch.Tensor, window: int) -> torch.Tensor:
    """int32 [T, window / 32]: a bit for each token of the row's request that its slots name."""
    bits = torch.zeros(len(slots), window // WORD.value, dtype=torch.int32, device=slots.device)
    topk = slots.shape[1]
    _set_bits[(len(slots),)](
        slots,
        places,
        bits,
        slots.stride(0),
        topk,
        (len(places) - 1) * PAGE_SIZE,
        window // WORD.value,
        PICKS=triton.next_power_of_2(topk),
        num_warps=4,
    )
    return bits


@triton.jit(do_not_specialize=["slots_stride", "topk", "num_slots", "words"])
def _set_bits(slots, places, bits, slots_stride, topk, num_slots, words, PICKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pick = tl.arange(0, PICKS)
    slot = tl.load(slots + row * slots_stride + pick, mask=pick < topk, other=-1)
    exists = (slot >= 0) & (slot < num_slots)
    position = tl.load(places + slot // PAGE, mask=exists, other=0) * PAGE + slot % PAGE
    bit = tl.full((PICKS,), 1, tl.int32) << (position % WORD)
    tl.atomic_or(bits + row * words + position // WORD, bit, mask=exists, sem="relaxed")


@triton.jit(do_not_specialize=["num_rows", "window", "num_tokens", "topk"])
def _attend_heads(
    query_nope,
    query_pe,
    keys,
    keys_pe,
    values,
    bits,
    owners,
    positions,
    out,
    num_rows,
    window,
    num_tokens,
    nope_row_stride,
    nope_head_stride,
    pe_row_stride,
    pe_head_stride,
    heads,
    scale_log2,
    topk,
    MASKED: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Some rows and one head. Rows of several requests take turns; those that see most come first."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    exists = row < num_rows
    owner = tl.load(owners + row, mask=exists, other=-1)
    position = tl.load(positions + row, mask=exists, other=-1).to(tl.int32)
    wide = row.to(tl.int64)[:, None]
    channel = tl.arange(0, NOPE)[None, :]
    nope = tl.load(
        query_nope + wide * nope_row_stride + head * nope_head_stride + channel,
        mask=exists[:, None],
        other=0.0,
    )
    channel = tl.arange(0, ROPE)[None, :]
    pe = tl.load(
        query_pe + wide * pe_row_stride + head * pe_head_stride + channel, mask=exists[:, None], other=0.0
    )
    highest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VALUE), tl.float32)
    column = tl.arange(0, TOKENS)
    bit = (tl.full((TOKENS,), 1, tl.int32) << (column % WORD))[None, :]
    turn = tl.min(tl.where(owner < 0, LATER, owner), 0)
    last = tl.max(owner, 0)
    while turn <= last:
        visible = tl.where(owner == turn, position, -1)
        stop = tl.max(visible, 0) + 1
        base = turn.to(tl.int64) * window
        own = (owner == turn)[:, None]
        for start in tl.range(0, stop, TOKENS, num_stages=STAGES):
            token = start + column
            # The last tile may reach into the next request, or beyond all of them; a weight of zero does not hide a NaN.
            at = tl.minimum(base + token, num_tokens - 1)[:, None]
            key = tl.load(keys + (head * num_tokens + at) * NOPE + tl.arange(0, NOPE)[None, :])
            key_pe = tl.load(keys_pe + at * ROPE + tl.arange(0, ROPE)[None, :])
            value = tl.load(
                values + (head * num_tokens + at) * VALUE + tl.arange(0, VALUE)[None, :],
                mask=(token < stop)[:, None],
                other=0.0,
            )
            logits = tl.dot(nope, tl.trans(key))
            logits = tl.dot(pe, tl.trans(key_pe), logits) * scale_log2
            if MASKED and stop > topk:
                words = bits + wide * (window // WORD) + start // WORD
                low, high = tl.load(words, mask=own, other=0), tl.load(words + 1, mask=own, other=0)
                seen = (tl.where((column < WORD)[None, :], low, high) & bit) != 0
            else:
                seen = token[None, :] <= visible[:, None]
            logits = tl.where(seen, logits, float("-inf"))
            raised = tl.maximum(highest, tl.max(logits, 1))
            weights = tl.exp2(logits - raised[:, None])
            factor = tl.exp2(highest - raised)
            total = total * factor + tl.sum(weights, 1)
            acc = tl.dot(weights.to(value.dtype), value, acc * factor[:, None])
            highest = raised
        turn = tl.min(tl.where(owner > turn, owner, LATER), 0)
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    target = out + (wide * heads + head) * VALUE + tl.arange(0, VALUE)[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=exists[:, None])
