"""Exact deterministic top-k on a GPU: highest score first, the lower position wins a tie, as `kernels.reference.topk` defines it.

Radix select: four passes narrow the threshold by eight bits each, counting the scores that share its leading bits; then every
part of a row writes what it keeps where the counts of the parts before it say, so positions come out in order. A row is cut
into parts, one program each; counts are integers, so the order in which programs add them changes nothing. Knows nothing of
where scores come from.
"""

import torch
import triton
import triton.language as tl

from kernels.layout import PAGE_SIZE

BINS = 256
PASSES = 4
PARTS_WANTED = 132 * 4  # programs that fill an H200
SHORTEST_PART, LONGEST_PART = 4096, 2**20
BLOCK = 2048  # scores that a program looks at together
PAGE: tl.constexpr = tl.constexpr(PAGE_SIZE)


def top_k(scores: torch.Tensor, lengths: torch.Tensor, topk: int) -> torch.Tensor:
    """As kernels.reference.top_k."""
    return _top_k(scores, lengths, topk, None, None)


def top_k_slots(
    scores: torch.Tensor, lengths: torch.Tensor, topk: int, page_table: torch.Tensor, owners: torch.Tensor
) -> torch.Tensor:
    """top_k, but physical slots instead of positions: int32 [T, topk] by ascending position, then -1.

    page_table: int32 [R, max_pages]; owners: int32 [T], the row's request. A row of at most topk positions takes them all
    without a look at its scores.
    """
    return _top_k(scores, lengths, topk, page_table, owners)


def _top_k(
    scores: torch.Tensor,
    lengths: torch.Tensor,
    topk: int,
    page_table: torch.Tensor | None,
    owners: torch.Tensor | None,
) -> torch.Tensor:
    num_rows, width = scores.shape
    picks = torch.full((num_rows, topk), -1, dtype=torch.int32, device=scores.device)
    if not num_rows or not width:
        return picks
    part = min(
        max(triton.next_power_of_2(triton.cdiv(width * num_rows, PARTS_WANTED)), SHORTEST_PART), LONGEST_PART
    )
    parts = triton.cdiv(width, part)
    block = min(BLOCK, part)
    histograms = torch.zeros(PASSES, num_rows, BINS, dtype=torch.int32, device=scores.device)
    thresholds = torch.zeros(num_rows, 2, dtype=torch.int64, device=scores.device)
    counts = torch.zeros(num_rows, parts, 2, dtype=torch.int32, device=scores.device)
    row_facts = (scores, lengths, scores.stride(0))
    for number in range(PASSES):
        _count_kernel[(num_rows, parts)](
            *row_facts, histograms, thresholds, topk, num_rows, PASS=number, PART=part, BLOCK=block, BINS=BINS
        )
        _narrow_kernel[(num_rows,)](lengths, histograms, thresholds, topk, num_rows, PASS=number, BINS=BINS)
    _tally_kernel[(num_rows, parts)](*row_facts, thresholds, counts, topk, parts, PART=part, BLOCK=block)
    _write_kernel[(num_rows, parts)](
        *row_facts,
        thresholds,
        counts,
        picks,
        page_table if page_table is not None else picks,
        owners if owners is not None else lengths,
        page_table.stride(0) if page_table is not None else 0,
        topk,
        parts,
        PART=part,
        BLOCK=block,
        PARTS=triton.next_power_of_2(parts),
        SLOTS=page_table is not None,
    )
    return picks


@triton.jit
def _order(score):
    """fp32 -> int64 0 .. 2^32 - 1 in the order of scores: -0.0 equals 0.0, NaN beats infinity."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    signed = tl.where(score != score, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    return signed.to(tl.int64) + 2147483648


@triton.jit
def _orders(scores, row, stride, position, end):
    score = tl.load(scores + row * stride + position, mask=position < end, other=0.0)
    return tl.where(position < end, _order(score), -1)


@triton.jit
def _count_kernel(
    scores,
    lengths,
    stride,
    histograms,
    thresholds,
    topk,
    num_rows,
    PASS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Adds to the row's histogram of the bits that this pass is about, of the scores that share the threshold's bits above."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    begin = tl.program_id(1) * PART
    end = tl.minimum(length, begin + PART)
    if (length > topk) & (begin < end):
        SHIFT: tl.constexpr = 24 - 8 * PASS
        above = tl.load(thresholds + 2 * row) >> (SHIFT + 8)
        histogram = tl.zeros((BINS,), tl.int32)
        for start in range(begin, end, BLOCK):
            order = _orders(scores, row, stride, start + tl.arange(0, BLOCK), end)
            counted = (order >= 0) & ((order >> (SHIFT + 8)) == above)
            bin = ((order >> SHIFT) & (BINS - 1)).to(tl.int32)
            histogram += tl.histogram(tl.where(counted, bin, 0), BINS, mask=counted)
        target = histograms + (PASS * num_rows + row) * BINS + tl.arange(0, BINS)
        tl.atomic_add(target, histogram, mask=histogram > 0, sem="relaxed")


@triton.jit
def _narrow_kernel(lengths, histograms, thresholds, topk, num_rows, PASS: tl.constexpr, BINS: tl.constexpr):
    """Chooses the bin in which the topk-th best lies. thresholds: the order found so far, and how many above it are sure."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(lengths + row) > topk:
        SHIFT: tl.constexpr = 24 - 8 * PASS
        bin = tl.arange(0, BINS)
        count = tl.load(histograms + (PASS * num_rows + row) * BINS + bin)
        sure = tl.load(thresholds + 2 * row + 1).to(tl.int32)
        better = sure + tl.sum(count, 0) - tl.cumsum(count, 0)  # in bins above this one
        chosen = tl.max(tl.where(better + count >= topk, bin, -1), 0)
        now_sure = tl.sum(tl.where(bin == chosen, better, 0), 0)
        found = tl.load(thresholds + 2 * row) + (chosen.to(tl.int64) << SHIFT)
        tl.store(thresholds + 2 * row, found)
        tl.store(thresholds + 2 * row + 1, now_sure.to(tl.int64))


@triton.jit
def _tally_kernel(
    scores, lengths, stride, thresholds, counts, topk, parts, PART: tl.constexpr, BLOCK: tl.constexpr
):
    """How many scores of this part are better than the threshold, and how many equal it."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    begin = tl.program_id(1) * PART
    end = tl.minimum(length, begin + PART)
    if (length > topk) & (begin < end):
        threshold = tl.load(thresholds + 2 * row)
        better = tl.zeros((BLOCK,), tl.int32)
        equal = tl.zeros((BLOCK,), tl.int32)
        for start in range(begin, end, BLOCK):
            order = _orders(scores, row, stride, start + tl.arange(0, BLOCK), end)
            better += (order > threshold).to(tl.int32)
            equal += (order == threshold).to(tl.int32)
        target = counts + 2 * (row * parts + tl.program_id(1))
        tl.store(target, tl.sum(better, 0))
        tl.store(target + 1, tl.sum(equal, 0))


@triton.jit
def _write_kernel(
    scores,
    lengths,
    stride,
    thresholds,
    counts,
    picks,
    page_table,
    owners,
    table_stride,
    topk,
    parts,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    begin = number * PART
    end = tl.minimum(length, begin + PART)
    if begin < end:
        everything = length <= topk
        part = tl.arange(0, PARTS)
        before = part < number
        tallies = counts + 2 * (row * parts + part)
        better_before = tl.sum(tl.load(tallies, mask=before, other=0), 0)
        equal_before = tl.sum(tl.load(tallies + 1, mask=before, other=0), 0)
        threshold = tl.load(thresholds + 2 * row)
        ties = topk - tl.load(thresholds + 2 * row + 1).to(tl.int32)  # so many of the equal ones are kept
        kept = tl.where(everything, begin, better_before + tl.minimum(equal_before, ties))
        equal_seen = equal_before
        for start in range(begin, end, BLOCK):
            position = start + tl.arange(0, BLOCK)
            order = _orders(scores, row, stride, position, tl.where(everything, 0, end))
            equal = (order == threshold) & (order >= 0)
            rank = equal_seen + tl.cumsum(equal.to(tl.int32), 0) - 1
            keep = ((order > threshold) | (equal & (rank < ties)) | everything) & (position < end)
            where = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
            value = position
            if SLOTS:
                owner = tl.load(owners + row).to(tl.int64)
                page = tl.load(page_table + owner * table_stride + position // PAGE, mask=keep, other=0)
                value = page * PAGE + position % PAGE
            tl.store(picks + row * topk + where, value, mask=keep)
            kept += tl.sum(keep.to(tl.int32), 0)
            equal_seen += tl.sum(equal.to(tl.int32), 0)
