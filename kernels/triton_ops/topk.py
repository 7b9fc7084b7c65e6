"""Exact, deterministic top-k on a GPU, as `kernels.reference.topk` defines it. Knows nothing of where scores come from.

A row is read twice. The first pass keeps the best score of each of a few thousand groups of positions: the topk-th best of
those is a bound that at least topk scores reach, and that hardly more than topk exceed. The second pass writes the positions
that reach it, in order, to a short list, on which the search for the exact threshold is cheap. Where the list does not hold
them, because very many scores reach the bound, the search goes over the row itself: slower, with the same result.
"""

from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl

from kernels.layout import PAGE_SIZE
from kernels.triton_ops.topk_lists import (
    NAN_KEY,
    group_kernel,
    keys_of,
    list_kernel,
    middle_of,
    order,
    search,
)

PAGE: tl.constexpr = tl.constexpr(PAGE_SIZE)
PROGRAMS = 264  # that a launch should have at least, where rows are few: two on each multiprocessor
TILE = 4096  # positions that a program reads at once
GROUPS_PER_PICK = 4
MIN_GROUPS = 1024
MIN_SLICE = 128  # groups of a program: 512 contiguous bytes


class Plan(NamedTuple):
    """Sizes of the launches, from shapes alone."""

    groups: int  # of positions, position modulo groups; also what one program selects from directly
    slices: int  # programs that a row's groups are divided among
    parts: int  # programs that a row's positions are divided among, and lists of a row
    capacity: int  # entries of a list
    tile: int

    @classmethod
    def of(cls, num_rows: int, width: int, topk: int) -> Self:
        groups = max(GROUPS_PER_PICK * triton.next_power_of_2(topk), MIN_GROUPS)
        tile = min(TILE, groups)
        wanted = triton.next_power_of_2(max(PROGRAMS // max(num_rows, 1), 1))
        parts = min(wanted, triton.next_power_of_2(triton.cdiv(max(width, 1), tile)))
        # A list takes twice what is chosen. Its size does not follow the row's, or the kernels would be compiled for every length.
        capacity = groups // 2
        slices = max(min(wanted, groups // MIN_SLICE), groups // tile)
        return cls(groups, slices, parts, capacity, tile)


def top_k(scores: torch.Tensor, lengths: torch.Tensor, topk: int) -> torch.Tensor:
    """As kernels.reference.top_k."""
    return _select(scores, lengths, topk, None, None)


def top_k_slots(
    scores: torch.Tensor, lengths: torch.Tensor, topk: int, page_table: torch.Tensor, owners: torch.Tensor
) -> torch.Tensor:
    """top_k, with each position replaced by the physical slot of that token of the row's request.

    scores:     fp32 [T, L], rows at any stride; those of a row of at most topk positions are not read
    lengths:    int64 or int32 [T]: the row has the positions 0 .. length - 1
    page_table: int32 [R, max_pages]; owners: int32 [T], the row's request
    Returns int32 [T, topk]: slots in ascending order of position, -1 after the last.
    """
    return _select(scores, lengths, topk, page_table, owners)


def _select(
    scores: torch.Tensor,
    lengths: torch.Tensor,
    topk: int,
    page_table: torch.Tensor | None,
    owners: torch.Tensor | None,
) -> torch.Tensor:
    num_rows, width = scores.shape
    if scores.dtype != torch.float32 or (width > 1 and scores.stride(1) != 1):
        raise ValueError("scores must be float32 with contiguous rows")
    picks = torch.empty(num_rows, topk, dtype=torch.int32, device=scores.device)
    if picks.numel() == 0:
        return picks
    plan = Plan.of(num_rows, width, topk)
    lists = counts = None
    if width > plan.groups:
        lists, counts = _list_candidates(scores, lengths, topk, plan)
    _pick_kernel[(num_rows,)](
        scores,
        lengths,
        lists,
        counts,
        page_table,
        owners,
        picks,
        scores.stride(0),
        page_table.stride(0) if page_table is not None else 0,
        topk,
        PICKS=triton.next_power_of_2(topk),
        LISTED=lists is not None,
        PARTS=plan.parts,
        CAPACITY=plan.capacity,
        CHUNK=plan.groups // 2 if lists is not None else triton.next_power_of_2(max(width, topk, 16)),
        SLOTS=page_table is not None,
        num_warps=8,
    )
    return picks


def _list_candidates(
    scores: torch.Tensor, lengths: torch.Tensor, topk: int, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [T, parts, capacity] lists of score and position, and int32 [T, parts, 2]: see topk_lists.list_kernel."""
    num_rows = len(scores)
    groups, slices, parts, capacity, tile = plan
    best = torch.empty(num_rows, groups, dtype=torch.uint32, device=scores.device)
    lists = torch.empty(num_rows, parts, capacity, dtype=torch.int64, device=scores.device)
    counts = torch.empty(num_rows, parts, 2, dtype=torch.int32, device=scores.device)
    columns = groups // slices
    group_kernel[(num_rows, slices)](
        scores,
        lengths,
        best,
        scores.stride(0),
        topk,
        GROUPS=groups,
        COLUMNS=columns,
        STEPS=tile // columns,
        num_warps=8,
    )
    list_kernel[(num_rows, parts)](
        scores,
        lengths,
        best,
        lists,
        counts,
        scores.stride(0),
        topk,
        GROUPS=groups,
        PARTS=parts,
        CAPACITY=capacity,
        TILE=tile,
        num_warps=8,
        maxnreg=80,  # three programs on a multiprocessor
    )
    return lists, counts


@triton.jit
def _places(keys, threshold, better, ties, rest):
    """Which keys are chosen: those above the threshold and the first `rest` equal to it; and their places among all chosen.

    better, ties: how many of either kind came before. Returns chosen, places, and the two numbers after these keys.
    """
    above, equal = keys > threshold, keys == threshold
    # Two counts in one word: a tile has less than 2^16 keys.
    packed = above.to(tl.int32) + (equal.to(tl.int32) << 16)
    before = tl.cumsum(packed, 0) - packed
    total = tl.sum(packed, 0)
    ties_before = ties + (before >> 16)
    places = better + (before & 0xFFFF) + tl.minimum(ties_before, rest)
    chosen = above | (equal & (ties_before < rest))
    return chosen, places, better + (total & 0xFFFF), ties + (total >> 16)


@triton.jit
def _entries(source, first, PARTS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr):
    """Keys and positions of the entries first .. first + CHUNK - 1. They are those of the row itself, if direct, or of its
    lists joined, which begin at starts [PARTS]: source is (row of scores, lists, starts, number of entries, direct).
    CAPACITY 0: there are no lists."""
    scores, lists, starts, total, direct = source
    index = first + tl.arange(0, CHUNK)
    if CAPACITY == 0 or direct:
        keys, positions = keys_of(scores + index, index < total, first + CHUNK <= total), index
    else:
        part = tl.zeros((CHUNK,), tl.int32)
        for halving in tl.static_range(1, 10):
            if PARTS >> halving:
                later = part + (PARTS >> halving)
                part = tl.where(tl.gather(starts, later, 0) <= index, later, part)
        place = part * CAPACITY + index - tl.gather(starts, part, 0)
        entry = tl.load(lists + place, mask=index < total, other=0)
        score = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        keys = tl.where(index < total, order(score), 0).to(tl.uint32)
        positions = entry.to(tl.int32)
    return keys, positions


@triton.jit
def _reached(source, keys, threshold, PARTS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr):
    """How many entries are at least the threshold. keys: of the first CHUNK."""
    count = tl.sum((keys >= threshold).to(tl.int32), 0)
    for first in range(CHUNK, source[3], CHUNK):
        more, _ = _entries(source, first, PARTS, CAPACITY, CHUNK)
        count += tl.sum((more >= threshold).to(tl.int32), 0)
    return count


@triton.jit
def _exceeding(source, keys, threshold, PARTS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr):
    """How many entries are above the threshold. keys: of the first CHUNK."""
    above = 0
    if threshold < NAN_KEY:
        above = _reached(source, keys, threshold + 1, PARTS, CAPACITY, CHUNK)
    return above


@triton.jit
def _search_all(source, keys, bound, topk, PARTS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr):
    """The topk-th best of entries of which at least topk reach the bound. keys: of the first CHUNK."""
    low, high = bound, tl.full((), NAN_KEY, tl.uint32)
    if source[3] <= CHUNK:
        low = search(keys, topk, 0)
        high = low
    while low < high:
        middle = middle_of(low, high)
        reached = _reached(source, keys, middle, PARTS, CAPACITY, CHUNK)
        low = tl.where(reached >= topk, middle, low)
        above = tl.where(reached > topk, high, middle - 1)
        high = tl.where(reached == topk, middle, above).to(tl.uint32)
    return low


@triton.jit
def _write(picks, chosen, places, positions, pages, SLOTS: tl.constexpr):
    """Stores chosen positions, or their slots, at their places. pages: the request's row of the page table."""
    if SLOTS:
        page = tl.load(pages + positions // PAGE, mask=chosen, other=0)
        positions = page * PAGE + positions % PAGE
    tl.store(picks + places, positions, mask=chosen)


@triton.jit
def _pick_all(picks, length, topk, pages, PICKS: tl.constexpr, SLOTS: tl.constexpr):
    """All positions of a row that has at most topk."""
    places = tl.arange(0, PICKS)
    _write(picks, places < length, places, places, pages, SLOTS)
    tl.store(picks + places, -1, mask=(places < topk) & (places >= length))


@triton.jit
def _pick_best(
    source,
    picks,
    bound,
    topk,
    pages,
    PARTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """The topk best of more entries, of which at least topk reach the bound."""
    keys, positions = _entries(source, 0, PARTS, CAPACITY, CHUNK)
    threshold, above = bound, _exceeding(source, keys, bound, PARTS, CAPACITY, CHUNK)
    # Where fewer than topk exceed the bound, it is the threshold.
    if above >= topk:
        threshold = _search_all(source, keys, bound, topk, PARTS, CAPACITY, CHUNK)
        above = _exceeding(source, keys, threshold, PARTS, CAPACITY, CHUNK)
    rest = topk - above
    chosen, places, better, ties = _places(keys, threshold, 0, 0, rest)
    _write(picks, chosen, places, positions, pages, SLOTS)
    first = CHUNK
    while (first < source[3]) & (better + tl.minimum(ties, rest) < topk):
        keys, positions = _entries(source, first, PARTS, CAPACITY, CHUNK)
        chosen, places, better, ties = _places(keys, threshold, better, ties, rest)
        _write(picks, chosen, places, positions, pages, SLOTS)
        first += CHUNK


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["lengths", "owners"])
def _pick_kernel(
    scores,
    lengths,
    lists,
    counts,
    page_table,
    owners,
    picks,
    row_stride,
    table_stride,
    topk,
    PICKS: tl.constexpr,
    LISTED: tl.constexpr,
    PARTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Picks from a row's lists, or from the row where it is short or a list has overflowed. A program takes one row."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    row_scores, row_picks, pages = scores + row * row_stride, picks + row * topk, page_table
    if SLOTS:
        pages = page_table + tl.load(owners + row).to(tl.int64) * table_stride
    if length <= topk:
        _pick_all(row_picks, length, topk, pages, PICKS, SLOTS)
    elif LISTED:
        listed = tl.load(counts + (row * PARTS + tl.arange(0, PARTS)) * 2)
        starts = tl.cumsum(listed, 0) - listed
        direct = (length <= CHUNK) | (tl.max(listed, 0) > CAPACITY)
        total = tl.where(direct, length, tl.sum(listed, 0))
        source = (row_scores, lists + row * PARTS * CAPACITY, starts, total, direct)
        bound = tl.load(counts + row * PARTS * 2 + 1).to(tl.uint32, bitcast=True)
        _pick_best(source, row_picks, bound, topk, pages, PARTS, CAPACITY, CHUNK, SLOTS)
    else:
        source = (row_scores, row_scores, length, length, length)
        bound = tl.full((), 0, tl.uint32)
        _pick_best(source, row_picks, bound, topk, pages, PARTS, 0, CHUNK, SLOTS)
