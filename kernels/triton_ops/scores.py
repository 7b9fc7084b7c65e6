"""The lightning indexer's scores on Hopper: FP8 products of a few query rows and all their heads with tiles of paged keys.

Keys are the rows of the tensor cores' tile and (query row, head) pairs its columns, so that the sum over heads stays
within a thread but for two shuffles, and what lies in memory that belongs to nobody spoils its own row only. Knows nothing of
how tokens are selected.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels.layout import PAGE_SIZE, CacheLayout
from kernels.rows import Rows
from kernels.triton_ops import scores_hopper
from kernels.triton_ops.quant import quantize_tile

PAGE: tl.constexpr = tl.constexpr(PAGE_SIZE)
MIN_COLUMNS = 16  # of a tensor-core tile
KEYS_OF_PROGRAM = (
    256,
    2048,
)  # at least, at most: few for short batches, many where queries are worth loading once


class Tile(NamedTuple):
    """rows: query rows that share a tile of keys. stages: tiles of keys under way."""

    rows: int
    keys: int
    warps: int
    stages: int


MANY = Tile(rows=2, keys=128, warps=4, stages=2)  # prefill: products bound it
FEW = Tile(rows=1, keys=128, warps=4, stages=5)  # decode: reading the keys bounds it


def quantized_queries(q: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, H, 128], weights fp32 [T, H] -> e4m3 [T, H, 128] and the weights times the queries' scales, fp32 [T, H]."""
    num_rows, heads, dim = q.shape
    if dim != 128:
        raise ValueError(f"index_dim is {dim}, but the Triton back end has a kernel for 128 only")
    values = torch.empty(num_rows, heads, dim, dtype=torch.float8_e4m3fn, device=q.device)
    factors = torch.empty(num_rows, heads, dtype=torch.float32, device=q.device)
    if num_rows:
        _quantize_kernel[(triton.cdiv(num_rows * heads, 16),)](
            q,
            weights,
            values,
            factors,
            num_rows * heads,
            heads,
            q.stride(0),
            q.stride(1),
            weights.stride(0),
            PAIRS=16,
        )
    return values, factors


def fill_scores(
    q: torch.Tensor,
    factors: torch.Tensor,
    index_pages: torch.Tensor,
    rows: Rows,
    first: int,
    layout: CacheLayout,
    *,
    out: torch.Tensor,
    unless_at_most: int = 0,
) -> None:
    """Scores of the rows first .. first + len(out) - 1 with every token that they see; beyond, `out` is left or holds anything.

    q, factors:     of all rows, from quantized_queries
    out:            fp32 [t, page_table width x 64]
    unless_at_most: rows that see no more tokens than this need no scores
    """
    keys, scales = index_views(index_pages, layout)
    num_rows, heads, dim = q.shape
    requests, width = rows.page_table.shape
    many = num_rows >= 2 * requests
    if many and scores_hopper.fits(q):
        scores_hopper.launch(q, factors, keys, scales, rows, first, out, unless_at_most)
        return
    tile = MANY if many else FEW
    columns = triton.next_power_of_2(max(heads, MIN_COLUMNS // tile.rows))
    groups = triton.cdiv(len(out), tile.rows)
    fewest, most = KEYS_OF_PROGRAM
    share = triton.next_power_of_2(triton.cdiv(width * PAGE_SIZE * groups, scores_hopper.PROGRAMS_WANTED))
    span = min(max(fewest, share), most)
    _score_kernel[(groups, triton.cdiv(width * PAGE_SIZE, span))](
        q,
        factors,
        keys,
        scales,
        rows.owners,
        rows.positions,
        rows.page_table,
        out,
        first,
        first + len(out),
        heads,
        len(index_pages),
        rows.page_table.stride(0),
        out.stride(0),
        unless_at_most,
        span,
        HEADS=columns,
        DIM=dim,
        PAGE_BYTES=layout.index_page_bytes,
        ROWS=tile.rows,
        KEYS=tile.keys,
        STAGES=tile.stages,
        num_warps=tile.warps,
    )


def index_views(pages: torch.Tensor, layout: CacheLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The same bytes as e4m3, for keys, and as fp32, for scales. ValueError where there is no FP8 key of 128 channels."""
    if not layout.quantized:
        raise ValueError("the Triton back end serves quantised caches only: layout.quantized must be True")
    if layout.index_dim != 128:
        raise ValueError(
            f"index_dim is {layout.index_dim}, but the Triton back end has a kernel for 128 only"
        )
    if not pages.is_contiguous():
        raise ValueError("index pages must be contiguous")
    return pages.view(torch.float8_e4m3fn), pages.view(torch.float32)


@triton.jit(do_not_specialize=["num_pairs"])
def _quantize_kernel(
    q, weights, values, factors, num_pairs, heads, row_stride, head_stride, weight_stride, PAIRS: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    exists = pair < num_pairs
    row, head, channel = pair // heads, pair % heads, tl.arange(0, 128)[None, :]
    source = q + (row * row_stride + head * head_stride)[:, None] + channel
    x = tl.load(source, mask=exists[:, None], other=0.0).to(tl.float32)
    e4m3, scale = quantize_tile(x)
    tl.store(values + pair[:, None] * 128 + channel, e4m3, mask=exists[:, None])
    weight = tl.load(weights + row * weight_stride + head, mask=exists, other=0.0)
    tl.store(factors + pair, weight * scale, mask=exists)


@triton.jit(do_not_specialize=["first", "end", "table_stride"])
def _score_kernel(
    q,
    factors,
    keys,
    scales,
    owners,
    positions,
    page_table,
    out,
    first,
    end,
    heads,
    num_pages,
    table_stride,
    out_stride,
    unless_at_most,
    span,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """ROWS query rows and `span` keys. Rows of several requests take turns: a page table belongs to one."""
    lead = first + tl.program_id(0) * ROWS
    begin = tl.program_id(1) * span
    row = lead + tl.arange(0, ROWS)
    owner = tl.load(owners + row, mask=row < end, other=-1)
    length = tl.load(positions + row, mask=row < end, other=-1).to(tl.int32) + 1
    length = tl.where(length <= unless_at_most, 0, length)
    if tl.max(length, 0) > begin:
        column = tl.arange(0, ROWS * HEADS)
        pair_row, pair_head = lead + column // HEADS, column % HEADS
        real = (pair_row < end) & (pair_head < heads)
        pair = pair_row.to(tl.int64) * heads + pair_head
        channel = tl.arange(0, DIM)
        query = tl.load(q + pair[:, None] * DIM + channel[None, :], mask=real[:, None], other=0.0)
        factor = tl.load(factors + pair, mask=real, other=0.0)
        turn = tl.min(tl.where(owner < 0, 2147483647, owner), 0)
        last = tl.max(owner, 0)
        while turn <= last:
            own = owner == turn
            stop = tl.minimum(tl.max(tl.where(own, length, 0), 0), begin + span)
            for start in tl.range(begin, stop, KEYS, num_stages=STAGES):
                token = start + tl.arange(0, KEYS)
                # The page table is as wide as the longest request: what a shorter one lacks is -1.
                page = tl.load(page_table + turn * table_stride + token // PAGE, mask=token < stop, other=-1)
                exists = (page >= 0) & (page < num_pages)
                base = page.to(tl.int64) * PAGE_BYTES
                offset = token % PAGE
                key = tl.load(
                    keys + (base + offset * DIM)[:, None] + channel[None, :], mask=exists[:, None], other=0.0
                )
                scale = tl.load(scales + (base + PAGE * DIM) // 4 + offset, mask=exists, other=0.0)
                logits = tl.dot(key, tl.trans(query))
                logits = tl.maximum(logits, 0.0) * factor[None, :]
                total = tl.sum(tl.reshape(logits, (KEYS, ROWS, HEADS)), 2) * scale[:, None]
                target = out + (row - first).to(tl.int64)[None, :] * out_stride + token[:, None]
                tl.store(target, total, mask=own[None, :] & (token[:, None] < length[None, :]))
            later = tl.where(owner > turn, owner, 2147483647)
            turn = tl.min(later, 0)
