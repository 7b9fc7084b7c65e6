"""The two passes of top-k over whole rows: each group's best score, and lists of the scores that may be among the best.

A bound that at least topk scores reach, and hardly more exceed, is found among the groups' bests. Knows nothing of what is picked
from the lists.
"""

import triton
import triton.language as tl

NAN_KEY: tl.constexpr = tl.constexpr(0xFFFFFFFF)  # all bits: above infinity
SIGN_BIT: tl.constexpr = tl.constexpr(0x80000000)


@triton.jit
def order(x):
    """uint32 keys in the order of the scores, above that of no number."""
    x += 0.0  # makes 0.0 of -0.0
    bits = x.to(tl.uint32, bitcast=True)
    # The order of negative floats is the reverse of that of their bits.
    keys = tl.where(bits >= SIGN_BIT, bits ^ NAN_KEY, bits | SIGN_BIT)
    return tl.where(x != x, NAN_KEY, keys).to(tl.uint32)


@triton.jit
def keys_of(scores, visible, whole):
    """Keys in the order of the scores, 0 where not visible: less than the key of any number.

    whole: whether all are visible. Without a mask the loads are of 16 bytes.
    """
    x = tl.load(scores) if whole else tl.load(scores, mask=visible, other=0.0)
    return tl.where(visible, order(x), 0).to(tl.uint32)


@triton.jit
def middle_of(low, high):
    """Above low, at most high, for low < high."""
    distance = high - low
    return (low + (distance >> 1) + (distance & 1)).to(tl.uint32)


@triton.jit
def search(keys, count, slack):
    """The count-th best of the keys, or with slack some key below it that at most count + slack of them reach."""
    low, high = tl.min(keys, 0), tl.max(keys, 0)
    while low < high:
        middle = middle_of(low, high)
        reached = tl.sum((keys >= middle).to(tl.int32), 0)
        enough = reached >= count
        found = enough & (reached <= count + slack)
        low = tl.where(enough, middle, low)
        high = tl.where(found, middle, tl.where(enough, high, middle - 1)).to(tl.uint32)
    return low


@triton.jit(do_not_specialize_on_alignment=["lengths"])
def group_kernel(
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
            tile = keys_of(scores + row * row_stride + positions, positions < length, whole)
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
def list_kernel(
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
        key = search(tl.load(best + row * GROUPS + tl.arange(0, GROUPS)), topk, topk >> 4)
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
