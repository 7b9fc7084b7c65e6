"""Attention over latents in plain Triton, for few heads and for layouts other than V3.2's; 16 heads fill a tile.

Knows nothing of how the tokens were chosen: a row's tokens come either from its slots or, all of them, from its page table.
"""

import triton
import triton.language as tl

from kernels.layout import PAGE_SIZE, QUANT_BLOCK

HEAD_TILE = 16
TOKEN_TILE = 64  # one page, when all tokens are read
PAGE: tl.constexpr = tl.constexpr(PAGE_SIZE)
BLOCK: tl.constexpr = tl.constexpr(QUANT_BLOCK)
LOWEST: tl.constexpr = tl.constexpr(-1e30)  # the maximum of nothing: finite, so that weights stay zero
LOG2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["slots_stride", "table_stride", "topk", "splits"])
def attend_tile(
    query,
    values,
    scales,
    keys,
    slots,
    owners,
    positions,
    page_table,
    out,
    lse,
    query_row_stride,
    query_head_stride,
    slots_stride,
    table_stride,
    num_slots,
    topk,
    heads,
    scale_log2,
    splits,
    WHOLE: tl.constexpr,
    DENSE: tl.constexpr,
    TOPK_PADDED: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One tile of HEADS heads of one row over one split of its tokens.

    out and lse: of the row itself (WHOLE: there is one split), or fp32 [splits, T, heads, ...] with an lse of -inf for a split without tokens.
    topk: slots of a row, or tokens that its page table has room for.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    if DENSE:
        end = tl.minimum(tl.load(positions + row) + 1, topk).to(tl.int32)
        source = page_table + tl.load(owners + row).to(tl.int64) * table_stride
    else:
        source = slots + row * slots_stride
        every = tl.arange(0, TOPK_PADDED)
        whole_row = tl.load(source + every, mask=every < topk, other=-1)
        end = tl.max(tl.where((whole_row >= 0) & (whole_row < num_slots), every + 1, 0), 0)
    tokens_of_split = tl.cdiv(tl.cdiv(end, TOKENS), splits) * TOKENS
    first = split * tokens_of_split
    end = tl.minimum(end, first + tokens_of_split)

    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real = tl.expand_dims(head < heads, 1)
    latent_channels, rope_channels = tl.arange(0, LATENT), tl.arange(0, ROPE)
    query += row * query_row_stride + tl.expand_dims(head.to(tl.int64) * query_head_stride, 1)
    query_latent = tl.load(query + latent_channels[None, :], mask=real, other=0.0)
    query_rope = tl.load(query + LATENT + rope_channels[None, :], mask=real, other=0.0)

    highest = tl.full((HEADS,), LOWEST, tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, LATENT), tl.float32)
    groups = tl.arange(0, LATENT // BLOCK)
    SCALE_BYTES: tl.constexpr = 4 * (LATENT // BLOCK)
    for start in tl.range(first, end, TOKENS):
        tokens = start + tl.arange(0, TOKENS)
        if DENSE:
            slot = tl.load(source + tokens // PAGE, mask=tokens < end, other=-1) * PAGE + tokens % PAGE
        else:
            slot = tl.load(source + tokens, mask=tokens < end, other=-1)
        valid = (slot >= 0) & (slot < num_slots) & (tokens < end)
        latent_row = tl.expand_dims(slot.to(tl.int64) * ROW_BYTES, 1)
        exists = tl.expand_dims(valid, 1)
        scale = tl.load(scales + (latent_row + LATENT) // 4 + groups[None, :], mask=exists, other=0.0)
        latent = tl.load(values + latent_row + latent_channels[None, :], mask=exists, other=0.0)
        latent = tl.reshape(latent.to(tl.float32), (TOKENS, LATENT // BLOCK, BLOCK)) * tl.expand_dims(
            scale, 2
        )
        latent = tl.reshape(latent, (TOKENS, LATENT)).to(tl.bfloat16)
        key = tl.load(
            keys + (latent_row + LATENT + SCALE_BYTES) // 2 + rope_channels[None, :], mask=exists, other=0.0
        )
        logits = tl.dot(query_latent, tl.trans(latent))
        logits = tl.dot(query_rope, tl.trans(key), logits) * scale_log2
        logits = tl.where(tl.expand_dims(valid, 0), logits, float("-inf"))
        raised = tl.maximum(highest, tl.max(logits, 1))
        rescale = tl.exp2(highest - raised)
        weights = tl.exp2(logits - tl.expand_dims(raised, 1))
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(weights.to(tl.bfloat16), latent, acc * tl.expand_dims(rescale, 1))
        highest = raised

    empty = total == 0
    acc = acc / tl.expand_dims(tl.where(empty, 1.0, total), 1)
    nothing = float("inf") if WHOLE else float("-inf")
    target = (split.to(tl.int64) * tl.num_programs(0) + row) * heads + head
    tl.store(lse + target, tl.where(empty, nothing, (highest + tl.log2(total)) * LOG2), mask=head < heads)
    target = tl.expand_dims(target * LATENT, 1) + latent_channels[None, :]
    tl.store(out + target, acc.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows_by_heads", "splits"])
def combine_splits(
    partial,
    partial_lse,
    out,
    lse,
    rows_by_heads,
    splits,
    MAX_SPLITS: tl.constexpr,
    LATENT: tl.constexpr,
):
    """One head of one row: partial fp32 [splits, T x H, LATENT] and their lse fp32 [splits, T x H] -> out and lse."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, MAX_SPLITS)
    parts = tl.load(partial_lse + split * rows_by_heads + row, mask=split < splits, other=float("-inf"))
    highest = tl.max(parts, 0)
    empty = highest == float("-inf")
    total = tl.sum(tl.exp(parts - tl.where(empty, 0.0, highest)), 0)
    whole = tl.where(empty, float("inf"), highest + tl.log(total))
    channels = tl.arange(0, LATENT)
    acc = tl.zeros((LATENT,), tl.float32)
    for first in range(0, splits, 8):
        for index in tl.static_range(8):  # eight parts under way
            at = (first + index) * rows_by_heads + row
            part = tl.load(partial_lse + at, mask=first + index < splits, other=float("-inf"))
            values = tl.load(partial + at * LATENT + channels, mask=part > float("-inf"), other=0.0)
            acc += tl.exp(part - whole) * values
    tl.store(out + row * LATENT + channels, acc.to(out.dtype.element_ty))
    tl.store(lse + row, whole)
