"""The lightning indexer on Hopper: caching of its keys, selection by its scores. Knows nothing of MLA."""

import functools

import torch
import triton
import triton.language as tl

from kernels import reference
from kernels.layout import PAGE_SIZE, CacheLayout
from kernels.rows import Rows
from kernels.triton_ops.quant import quantize_tile
from kernels.triton_ops.scores import PAGE, fill_scores, index_views, quantized_queries
from kernels.triton_ops.topk import top_k_slots

SCORE_BYTES = 2**29  # of scores held at a time, beside as much again to choose among them; one row of a batch always passes


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """As kernels.reference.hadamard, but for the order of additions."""
    rows = x.reshape(-1, x.shape[-1])
    return (
        (rows.float() @ _hadamard_matrix(x.shape[-1], x.device).float() * x.shape[-1] ** -0.5)
        .to(x.dtype)
        .view(x.shape)
    )


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
            ROWS=16,
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
    step = max(1, SCORE_BYTES // (4 * width))
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
    return reference.hadamard(torch.eye(dim)).sign().to(torch.bfloat16).to(device)


@triton.jit
def _write_kernel(x, keys, scales, slots, num_rows, stride, PAGE_BYTES: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    channel = tl.arange(0, 128)[None, :]
    source = x + row.to(tl.int64)[:, None] * stride + channel
    values, scale = quantize_tile(tl.load(source, mask=exists[:, None], other=0.0).to(tl.float32))
    slot = tl.load(slots + row, mask=exists, other=0)
    base, offset = (slot // PAGE).to(tl.int64) * PAGE_BYTES, slot % PAGE
    tl.store(keys + (base + offset * 128)[:, None] + channel, values, mask=exists[:, None])
    tl.store(scales + (base + PAGE * 128) // 4 + offset, scale, mask=exists)
