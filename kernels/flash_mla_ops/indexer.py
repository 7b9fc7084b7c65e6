"""The lightning indexer with DeepGEMM's scores: paged for decode, over gathered keys for prefill. The top-k is Triton's."""

import itertools

import deep_gemm
import torch

from kernels.layout import PAGE_SIZE, CacheLayout
from kernels.rows import Rows
from kernels.triton_ops import quantize_blocks
from kernels.triton_ops.topk import top_k_slots

SCORE_BYTES = 2**29  # scores held at a time; one row always passes
PAGED_ROWS = 2  # rows of a request up to which its keys are read where they are


def select_tokens(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_pages: torch.Tensor,
    rows: Rows,
    topk: int,
    layout: CacheLayout,
) -> torch.Tensor:
    """As kernels.reference.select_tokens."""
    values, factors = _quantized(q, weights)
    max_length = rows.page_table.shape[1] * PAGE_SIZE
    step = max(1, SCORE_BYTES // (4 * max_length))
    paged = all(end - start <= PAGED_ROWS for start, end in itertools.pairwise(rows.query_starts))
    keys = None if paged else _gathered_keys(index_pages, rows.page_table, layout)
    selected = torch.empty(len(q), topk, dtype=torch.int32, device=q.device)
    for start in range(0, len(q), step):
        chunk = slice(start, start + step)
        owners, lengths = rows.owners[chunk], rows.positions[chunk] + 1
        if keys is None:
            scores = _paged_scores(
                values[chunk], factors[chunk], index_pages, rows.page_table[owners], lengths
            )
        else:
            scores = _ragged_scores(values[chunk], factors[chunk], keys, owners, lengths, max_length)
        selected[chunk] = top_k_slots(scores, lengths, topk, rows.page_table, owners)
    return selected


def index_scores(
    q: torch.Tensor, weights: torch.Tensor, index_pages: torch.Tensor, rows: Rows, layout: CacheLayout
) -> torch.Tensor:
    """As kernels.reference.index_scores. The host waits for the width of the result."""
    if len(rows.query_starts) != 2:
        raise ValueError(f"rows holds {len(rows.query_starts) - 1} requests, but index_scores takes one")
    lengths = rows.positions + 1
    longest = int(lengths.max())
    keys = _gathered_keys(index_pages, rows.page_table, layout)
    max_length = rows.page_table.shape[1] * PAGE_SIZE
    scores = _ragged_scores(*_quantized(q, weights), keys, rows.owners, lengths, max_length)[:, :longest]
    hidden = torch.arange(longest, device=q.device) >= lengths.unsqueeze(1)
    return scores.masked_fill(hidden, -torch.inf)


def _quantized(q: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> q as e4m3 [T, H, D] and the weights with q's scales in them, fp32 [T, H]: DeepGEMM takes no scales of q."""
    values, scales = quantize_blocks(q)
    return values, weights * scales.squeeze(-1)


def _paged_scores(
    values: torch.Tensor,
    weights: torch.Tensor,
    index_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Rows with a page table each, int32 [T, max_pages] -> fp32 [T, max_pages x 64]; behind a row's length is anything."""
    lengths = lengths.int().unsqueeze(1)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, PAGE_SIZE, deep_gemm.get_num_sms())
    return deep_gemm.fp8_paged_mqa_logits(
        values.unsqueeze(1),
        index_pages.view(len(index_pages), PAGE_SIZE, 1, -1),
        weights,
        lengths,
        page_table,
        schedule,
        page_table.shape[1] * PAGE_SIZE,
    )


def _gathered_keys(
    index_pages: torch.Tensor, page_table: torch.Tensor, layout: CacheLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of all requests one after the other, each with max_pages x 64: e4m3 [n, D] and scales fp32 [n]."""
    pages = index_pages.index_select(0, page_table.clamp(min=0).flatten())
    key_bytes = PAGE_SIZE * layout.index_key_bytes
    values = pages[:, :key_bytes].reshape(-1, layout.index_dim).view(torch.float8_e4m3fn)
    return values, pages[:, key_bytes:].view(torch.float32).flatten()


def _ragged_scores(
    values: torch.Tensor,
    weights: torch.Tensor,
    keys: tuple[torch.Tensor, torch.Tensor],
    owners: torch.Tensor,
    lengths: torch.Tensor,
    max_length: int,
) -> torch.Tensor:
    """fp32 [T, max_length], the row's own keys from column 0 on; behind a row's length is anything."""
    starts = owners * max_length
    return deep_gemm.fp8_mqa_logits(
        values,
        keys,
        weights,
        starts,
        (starts + lengths).int(),
        clean_logits=False,
        max_seqlen_k=max_length,
    )
