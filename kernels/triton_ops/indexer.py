"""The lightning indexer on Hopper: its queries and keys turned, keys cached, tokens selected. Knows nothing of MLA."""

import functools

import torch
import triton
import triton.language as tl

from kernels import reference
from kernels.layout import PAGE_SIZE, CacheLayout
from kernels.reference.indexer import hadamard
from kernels.rows import Rows
from kernels.triton_ops.quant import quantize_tile
from kernels.triton_ops.scores import PAGE, fill_scores, index_views, quantized_queries
from kernels.triton_ops.topk import top_k_slots

SCORE_BYTES = (
    2**29
)  # of scores held at a time, beside as much again to choose among them; one row of a batch always passes
ROWS_OF_PROGRAM, HEADS_OF_PROGRAM = 16, 64  # keys and queries turned together


def rotate_index_keys(
    keys: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    layout: CacheLayout,
) -> None:
    """As kernels.reference.rotate_index_keys, but for the order of additions, in one kernel."""
    values, scales = index_views(pages, layout)
    num_rows, dim = keys.shape
    if num_rows:
        _rotate_keys_kernel[(triton.cdiv(num_rows, ROWS_OF_PROGRAM),)](
            keys,
            norm_weight,
            norm_bias,
            eps,
            cos,
            sin,
            _hadamard_matrix(dim, keys.device),
            values,
            scales,
            slots,
            num_rows,
            keys.stride(0),
            DIM=dim,
            ROPE=2 * cos.shape[-1],
            ROWS=ROWS_OF_PROGRAM,
            PAGE_BYTES=layout.index_page_bytes,
        )


def rotate_index_queries(queries: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As kernels.reference.rotate_index_queries, but for the order of additions, in one kernel."""
    num_rows, heads, dim = queries.shape
    rotated = torch.empty(num_rows, heads, dim, dtype=queries.dtype, device=queries.device)
    if num_rows:
        _rotate_queries_kernel[(num_rows, triton.cdiv(heads, HEADS_OF_PROGRAM))](
            queries,
            cos,
            sin,
            _hadamard_matrix(dim, queries.device),
            rotated,
            queries.stride(0),
            queries.stride(1),
            heads,
            DIM=dim,
            ROPE=2 * cos.shape[-1],
            HEADS=min(HEADS_OF_PROGRAM, max(16, triton.next_power_of_2(heads))),
        )
    return rotated


def write_index_keys(
    pages: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, layout: CacheLayout
) -> None:
    """As kernels.reference.write_index_keys."""
    values, scales = index_views(pages, layout)
    if len(slots):
        _write_kernel[(triton.cdiv(len(slots), 16),)](
            keys,
            values,
            scales,
            slots,
            len(slots),
            keys.stride(0),
            PAGE_BYTES=layout.index_page_bytes,
            ROWS=ROWS_OF_PROGRAM,
        )


def read_index_keys(pages: torch.Tensor, slots: torch.Tensor, layout: CacheLayout) -> torch.Tensor:
    """As kernels.reference.read_index_keys. For tests and tools: the scores read pages themselves."""
    return reference.read_index_keys(pages, slots, layout)


def index_scores(
    q: torch.Tensor, weights: torch.Tensor, index_pages: torch.Tensor, rows: Rows, layout: CacheLayout
) -> torch.Tensor:
    """As kernels.reference.index_scores."""
    if len(rows.query_starts) != 2:
        raise ValueError(f"rows holds {len(rows.query_starts) - 1} requests, but index_scores takes one")
    scores = torch.empty(len(q), rows.page_table.shape[1] * PAGE_SIZE, dtype=torch.float32, device=q.device)
    fill_scores(*quantized_queries(q, weights), index_pages, rows, 0, layout, out=scores)
    length = int(rows.positions.max()) + 1
    hidden = torch.arange(length, device=q.device) > rows.positions.unsqueeze(1)
    return scores[:, :length].masked_fill(hidden, -torch.inf)


def select_tokens(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_pages: torch.Tensor,
    rows: Rows,
    topk: int,
    layout: CacheLayout,
) -> torch.Tensor:
    """As kernels.reference.select_tokens. Scores of SCORE_BYTES at a time; none where no row can see more than topk tokens."""
    width = rows.page_table.shape[1] * PAGE_SIZE
    lengths = rows.positions + 1
    if width <= topk:
        nothing = torch.empty(len(q), width, dtype=torch.float32, device=q.device)
        return top_k_slots(nothing, lengths, topk, rows.page_table, rows.owners)
    values, factors = quantized_queries(q, weights)
    pieces = triton.cdiv(len(q), max(1, SCORE_BYTES // (4 * width)))
    step = triton.cdiv(len(q), max(1, pieces))  # all of one size: a short last one would be divided otherwise
    scores = torch.empty(min(step, len(q)), width, dtype=torch.float32, device=q.device)
    selected = torch.empty(len(q), topk, dtype=torch.int32, device=q.device)
    for first in range(0, len(q), step):
        chunk = slice(first, min(first + step, len(q)))
        out = scores[: chunk.stop - first]
        fill_scores(values, factors, index_pages, rows, first, layout, out=out, unless_at_most=topk)
        selected[chunk] = top_k_slots(out, lengths[chunk], topk, rows.page_table, rows.owners[chunk])
    return selected


@functools.cache
def _hadamard_matrix(dim: int, device: torch.device) -> torch.Tensor:
    """bf16 [dim, dim] of 1 and -1: Sylvester's matrix, symmetric."""
    return hadamard(torch.eye(dim)).sign().to(torch.bfloat16).to(device)


@triton.jit
def _partners(channel, ROPE: tl.constexpr):
    """Channel i turns with i + ROPE / 2 and that one with i; the rest stands still."""
    return tl.where(channel < ROPE, channel ^ (ROPE // 2), channel)


@triton.jit
def _rotated(x, partners, cos, sin, row, matrix, DIM: tl.constexpr, ROPE: tl.constexpr):
    """x and each channel's partner [n, DIM], row [n, 1] -> RoPE by halves, rounded, then Hadamard, in x's dtype."""
    channel = tl.arange(0, DIM)[None, :]
    half: tl.constexpr = ROPE // 2
    angle = row * half + channel % half
    row_cos = tl.load(cos + angle, mask=channel < ROPE, other=1.0)
    row_sin = tl.load(sin + angle, mask=channel < ROPE, other=0.0)
    row_sin = tl.where(channel < half, -row_sin, row_sin)
    roped = (x.to(tl.float32) * row_cos + partners.to(tl.float32) * row_sin).to(x.dtype)
    signs = tl.load(matrix + tl.arange(0, DIM)[:, None] * DIM + channel)
    # Products with 1 and -1 are exact in any precision but TF32, which would cut fp32 short.
    return (tl.dot(roped, signs.to(x.dtype), input_precision="ieee") * DIM**-0.5).to(x.dtype)


@triton.jit
def _rotate_queries_kernel(
    queries,
    cos,
    sin,
    matrix,
    rotated,
    row_stride,
    head_stride,
    heads,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, DIM)[None, :]
    source = queries + row * row_stride + head * head_stride
    x = tl.load(source + channel, mask=head < heads, other=0.0)
    partners = tl.load(source + _partners(channel, ROPE), mask=head < heads, other=0.0)
    mixed = _rotated(x, partners, cos, sin, row + tl.zeros_like(head), matrix, DIM, ROPE)
    tl.store(rotated + (row * heads + head) * DIM + channel, mixed, mask=head < heads)


@triton.jit
def _normed(keys, norm_weight, norm_bias, mean, scale, source, channel, exists):
    x = tl.load(keys + source + channel, mask=exists, other=0.0).to(tl.float32)
    normed = (x - mean) * scale * tl.load(norm_weight + channel) + tl.load(norm_bias + channel)
    return normed.to(keys.dtype.element_ty)


@triton.jit(do_not_specialize=["num_rows"])
def _rotate_keys_kernel(
    keys,
    norm_weight,
    norm_bias,
    eps,
    cos,
    sin,
    matrix,
    values,
    scales,
    slots,
    num_rows,
    stride,
    DIM: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    exists = row < num_rows
    real, source = exists[:, None], row[:, None] * stride
    channel = tl.arange(0, DIM)[None, :]
    x = tl.load(keys + source + channel, mask=real, other=0.0).to(tl.float32)
    mean = (tl.sum(x, 1) / DIM)[:, None]
    scale = tl.rsqrt(tl.sum((x - mean) * (x - mean), 1) / DIM + eps)[:, None]
    x = _normed(keys, norm_weight, norm_bias, mean, scale, source, channel, real)
    partners = _normed(keys, norm_weight, norm_bias, mean, scale, source, _partners(channel, ROPE), real)
    angles_of = tl.where(exists, row, 0)[:, None]
    mixed = _rotated(x, partners, cos, sin, angles_of, matrix, DIM, ROPE)
    _write_keys(mixed.to(tl.float32), slots, row, exists, values, scales, PAGE_BYTES)


@triton.jit
def _write_keys(x, slots, row, exists, values, scales, PAGE_BYTES: tl.constexpr):
    """x fp32 [n, 128], quantised, to where their slots say."""
    quantized, scale = quantize_tile(x)
    slot = tl.load(slots + row, mask=exists, other=0)
    base, offset = (slot // PAGE).to(tl.int64) * PAGE_BYTES, slot % PAGE
    where = (base + offset * 128)[:, None] + tl.arange(0, 128)[None, :]
    tl.store(values + where, quantized, mask=exists[:, None])
    tl.store(scales + (base + PAGE * 128) // 4 + offset, scale, mask=exists)


@triton.jit(do_not_specialize=["num_rows"])
def _write_kernel(x, values, scales, slots, num_rows, stride, PAGE_BYTES: tl.constexpr, ROWS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    exists = row < num_rows
    source = x + row[:, None] * stride + tl.arange(0, 128)[None, :]
    wide = tl.load(source, mask=exists[:, None], other=0.0).to(tl.float32)
    _write_keys(wide, slots, row, exists, values, scales, PAGE_BYTES)
