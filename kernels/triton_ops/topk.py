"""Exact, deterministic top-k on a GPU, as `kernels.reference.topk` defines it. Knows nothing of where scores come from.

A row is read twice. The first pass keeps the best score of each of a few thousand groups of positions: the topk-th best of
those is a bound that at least topk scores reach, and that hardly more than topk exceed. The second pass writes the positions
that reach it, in order, to a short list, on which the search for the exact threshold is cheap. Where the list does not hold
them, because very many scores lie above the bound, the search goes over the row itself: slower, with the same result.
"""

from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl

from kernels.layout import PAGE_SIZE

PAGE: tl.constexpr = tl.constexpr(PAGE_SIZE)
NAN_KEY: tl.constexpr = tl.constexpr(0xFFFFFFFF)  # all bits: above infinity
SIGN_BIT: tl.constexpr = tl.constexpr(0x80000000)
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
        # A list takes all ties that may be chosen, and as many better ones again. Its size does not follow the row's, or the
        # kernels would be compiled for every length.
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
    """int64 [T, parts, capacity] lists of score and position, and int32 [T, parts, 2]: see _list_kernel."""
    num_rows = len(scores)
    groups, slices, parts, capacity, tile = plan
    best = torch.empty(num_rows, groups, dtype=torch.uint32, device=scores.device)
    lists = torch.empty(num_rows, parts, capacity, dtype=torch.int64, device=scores.device)
    counts = torch.empty(num_rows, parts, 2, dtype=torch.int32, device=scores.device)
    columns = groups // slices
    _group_kernel[(num_rows, slices)](
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
    _list_kernel[(num_rows, parts)](
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
def _order(x):
    """uint32 keys in the order of the scores, above that of no number."""
    x += 0.0  # makes 0.0 of -0.0
    bits = x.to(tl.uint32, bitcast=True)
    # The order of negative floats is the reverse of that of their bits.
    keys = tl.where(bits >= SIGN_BIT, bits ^ NAN_KEY, bits | SIGN_BIT)
    return tl.where(x != x, NAN_KEY, keys).to(tl.uint32)


@triton.jit
def _keys(scores, visible, whole):
    """Keys in the order of the scores, 0 where not visible: less than the key of any number.

    whole: whether all are visible. Without a mask the loads are of 16 bytes.
    """
    x = tl.load(scores) if whole else tl.load(scores, mask=visible, other=0.0)
    return tl.where(visible, _order(x), 0).to(tl.uint32)


@triton.jit
def _middle(low, high):
    """Above low, at most high, for low < high."""
    distance = high - low
    return (low + (distance >> 1) + (distance & 1)).to(tl.uint32)


@triton.jit
def _search(keys, count, slack):
    """The count-th best of the keys, or with slack some key below it that at most count + slack of them reach."""
    low, high = tl.min(keys, 0), tl.max(keys, 0)
    while low < high:
        middle = _middle(low, high)
        reached = tl.sum((keys >= middle).to(tl.int32), 0)
        enough = reached >= count
        found = enough & (reached <= count + slack)
        low = tl.where(enough, middle, low)
        high = tl.where(found, middle, tl.where(enough, high, middle - 1)).to(tl.uint32)
    return low


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


@triton.jit(do_not_specialize_on_alignment=["lengths"])
def _group_kernel(
    scores,
    lengths,
    best,
    row_stride,
    topk,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The best key of each group of a row, groups being positions modulo GROUPS. A program has COLUMNS of them."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    if length > topk:
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        offsets = tl.expand_dims(tl.arange(0, STEPS), 1) * GROUPS + tl.expand_dims(columns, 0)
        keys = tl.zeros((STEPS, COLUMNS), tl.uint32)
        for start in range(0, length, STEPS * GROUPS):
            positions = start + offsets
            whole = start + STEPS * GROUPS <= length
            tile = _keys(scores + row * row_stride + positions, positions < length, whole)
            keys = tl.maximum(keys, tile)
        tl.store(best + row * GROUPS + columns, tl.max(keys, 0))


@triton.jit
def _chosen(scores, start, end, bound, QUARTER: tl.constexpr, WHOLE: tl.constexpr):
    """Positions, scores and whether they reach the bound, 1 or 0, of a quarter of a tile: four neighbours for each thread."""
    positions = start + 4 * tl.arange(0, QUARTER // 4)[:, None] + tl.arange(0, 4)[None, :]
    if WHOLE:
        x = tl.load(scores + positions)
        chosen = ~(x < bound)  # what is no number is above all
    else:
        x = tl.load(scores + positions, mask=positions < end, other=0.0)
        chosen = ~(x < bound) & (positions < end)
    return positions, x, chosen.to(tl.int32)


@triton.jit
def _list(quarter, target, before, listed, CAPACITY: tl.constexpr):
    """Stores what is chosen of a quarter, the bits of a score << 32 | its position. before: how many of it each thread's first one follows."""
    positions, x, chosen = quarter
    places = (listed + (before & 0xFFFF).to(tl.int32))[:, None] + tl.cumsum(chosen, 1) - chosen
    entries = (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | positions
    tl.store(target + places, entries, mask=(chosen > 0) & (places < CAPACITY))


@triton.jit
def _list_tile(
    scores, start, end, bound, target, listed, TILE: tl.constexpr, CAPACITY: tl.constexpr, WHOLE: tl.constexpr
):
    """Lists what reaches the bound of a tile, in order. -> how many are listed now.

    Numbers of the chosen are added up over threads once for all four quarters, each in 16 bits of a word.
    """
    QUARTER: tl.constexpr = TILE // 4
    first = _chosen(scores, start, end, bound, QUARTER, WHOLE)
    second = _chosen(scores, start + QUARTER, end, bound, QUARTER, WHOLE)
    third = _chosen(scores, start + 2 * QUARTER, end, bound, QUARTER, WHOLE)
    fourth = _chosen(scores, start + 3 * QUARTER, end, bound, QUARTER, WHOLE)
    low = tl.sum(first[2], 1) | (tl.sum(second[2], 1) << 16)
    high = tl.sum(third[2], 1) | (tl.sum(fourth[2], 1) << 16)
    packed = low.to(tl.int64) | (high.to(tl.int64) << 32)
    before = tl.cumsum(packed, 0) - packed
    total = tl.sum(packed, 0)
    _list(first, target, before, listed, CAPACITY)
    listed += (total & 0xFFFF).to(tl.int32)
    _list(second, target, before >> 16, listed, CAPACITY)
    listed += (total >> 16 & 0xFFFF).to(tl.int32)
    _list(third, target, before >> 32, listed, CAPACITY)
    listed += (total >> 32 & 0xFFFF).to(tl.int32)
    _list(fourth, target, before >> 48, listed, CAPACITY)
    return listed + (total >> 48).to(tl.int32)


@triton.jit(do_not_specialize_on_alignment=["lengths"])
def _list_kernel(
    scores,
    lengths,
    best,
    lists,
    counts,
    row_stride,
    topk,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
):
    """Lists what reaches the bound in a part of a row, in order.

    counts int32 [T, PARTS, 2]: how many reach it (more than CAPACITY: the list is of no use), and the bound
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row).to(tl.int32)
    if length > topk:
        key = _search(tl.load(best + row * GROUPS + tl.arange(0, GROUPS)), topk, topk >> 4)
        bound = tl.where(key >= SIGN_BIT, key ^ SIGN_BIT, key ^ NAN_KEY).to(tl.float32, bitcast=True)
        source = scores + row * row_stride
        size = tl.cdiv(tl.cdiv(length, PARTS), TILE) * TILE
        start, end = part * size, tl.minimum((part + 1) * size, length)
        target = lists + (row * PARTS + part) * CAPACITY
        listed = 0
        while start + TILE <= end:
            listed = _list_tile(source, start, end, bound, target, listed, TILE, CAPACITY, True)
            start += TILE
        if start < end:
            listed = _list_tile(source, start, end, bound, target, listed, TILE, CAPACITY, False)
        count = counts + (row * PARTS + part) * 2
        tl.store(count, tl.where(bound == bound, listed, CAPACITY + 1))
        tl.store(count + 1, key.to(tl.int32, bitcast=True))


@triton.jit
def _entries(source, first, PARTS: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr):
    """Keys and positions of the entries first .. first + CHUNK - 1. They are those of the row itself, if direct, or of its
    lists joined, which begin at starts [PARTS]: source is (row of scores, lists, starts, number of entries, direct).
    CAPACITY 0: there are no lists."""
    scores, lists, starts, total, direct = source
    index = first + tl.arange(0, CHUNK)
    if CAPACITY == 0 or direct:
        keys, positions = _keys(scores + index, index < total, first + CHUNK <= total), index
    else:
        part = tl.zeros((CHUNK,), tl.int32)
        for halving in tl.static_range(1, 10):
            if PARTS >> halving:
                later = part + (PARTS >> halving)
                part = tl.where(tl.gather(starts, later, 0) <= index, later, part)
        place = part * CAPACITY + index - tl.gather(starts, part, 0)
        entry = tl.load(lists + place, mask=index < total, other=0)
        score = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        keys = tl.where(index < total, _order(score), 0).to(tl.uint32)
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
        low = _search(keys, topk, 0)
        high = low
    while low < high:
        middle = _middle(low, high)
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
