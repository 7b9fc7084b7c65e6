"""Attention over V3.2's FP8 latents for Hopper's tensor cores, in Gluon: 64 heads of one row make a tile.

Three warpgroups share the work, because a 64 x 512 fp32 accumulator is half of the register file:

    filler  reads FP8 rows, makes bf16 of channels 0 .. 255, and writes blocks of 64 tokens into two buffers of shared memory
    left    logits, softmax, and the output's channels 0 .. 255
    right   the output's channels 256 .. 511; fills the same channels of the buffers, since it waits for `left` most of the time

What keeps the tensor cores busy while `left` computes a softmax is `right`: it starts on a block only when the logits of the
next one are done. The two halves of a buffer are filled separately, each as soon as its last reader is through.
Knows nothing of how tokens were selected: a row's tokens come from its slots or, all of them, from its page table.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.layout import PAGE_SIZE, CacheLayout
from kernels.triton_ops.mla_hopper_fill import (
    HALF,
    ROPE,
    TOKENS,
    checked_slots,
    empty_left,
    fill_left,
    full_left,
    full_right,
    load_quarter,
    load_scale,
    load_slots,
    store_quarter,
)

HEAD_TILE = 64
MIN_HEADS = 17  # fewer fill a tile of 16 (mla_tiles), and then reading is all that takes time
LATENT_DIM, ROPE_DIM = 512, 64

LATENT = gl.constexpr(LATENT_DIM)
HEADS = gl.constexpr(HEAD_TILE)
LOWEST = gl.constexpr(-1e30)  # the maximum of nothing: finite, so that weights stay zero
LN_2 = gl.constexpr(0.6931471805599453)

OUT_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
LOGITS_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
ROWS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
WIDE_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
BF16_SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
VECTOR_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


def fits(q: torch.Tensor, layout: CacheLayout) -> bool:
    """Whether this kernel takes such queries; the others are for mla_tiles."""
    return (
        q.is_cuda
        and q.shape[1] >= MIN_HEADS
        and (layout.latent_dim, layout.rope_dim) == (LATENT_DIM, ROPE_DIM)
        and torch.cuda.get_device_capability(q.device)[0] == 9
    )


def launch(
    grid: tuple[int, int, int],
    q: torch.Tensor,
    pages: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    where: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    capacity: int,
    scale_log2: float,
    dense: bool,
    layout: CacheLayout,
) -> None:
    """grid: rows, tiles of heads, splits of a row's tokens. The rest as mla_tiles.attend_tile has it."""
    num_rows, head_tiles, splits = grid
    _attend_tile[(num_rows * head_tiles, splits)](
        q,
        pages[1].view(torch.int32),
        pages[1],
        *where,
        out,
        lse,
        num_rows,
        q.stride(0),
        q.stride(1),
        where[0].stride(0),
        where[3].stride(0),
        pages[1].shape[0] * PAGE_SIZE,
        capacity,
        q.shape[1],
        scale_log2,
        splits,
        WHOLE=splits == 1,
        HEAD_TILES=head_tiles,
        DENSE=dense,
        CAPACITY_PADDED=128 if dense else max(128, 1 << (capacity - 1).bit_length()),
        num_warps=4,
        maxnreg=168,
    )


@gluon.jit(do_not_specialize=["num_rows", "slots_stride", "table_stride", "capacity", "splits"])
def _attend_tile(
    query,
    words,
    scales,
    slots,
    owners,
    positions,
    page_table,
    out,
    lse,
    num_rows,
    query_row_stride,
    query_head_stride,
    slots_stride,
    table_stride,
    num_slots,
    capacity,
    heads,
    scale_log2,
    splits,
    WHOLE: gl.constexpr,
    HEAD_TILES: gl.constexpr,
    DENSE: gl.constexpr,
    CAPACITY_PADDED: gl.constexpr,
):
    row = (gl.program_id(0) // HEAD_TILES).to(gl.int64)
    first_head = gl.program_id(0) % HEAD_TILES * HEADS
    split = gl.program_id(1)
    if DENSE:
        end = gl.minimum(gl.load(positions + row) + 1, capacity).to(gl.int32)
        source = page_table + gl.load(owners + row).to(gl.int64) * table_stride
    else:
        source = slots + row * slots_stride
        every = gl.arange(0, CAPACITY_PADDED, layout=gl.BlockedLayout([1], [32], [4], [0]))
        slot = gl.load(source + every, mask=every < capacity, other=-1)
        end = gl.max(gl.where((slot >= 0) & (slot < num_slots), every + 1, 0), 0)
    per_split = gl.cdiv(gl.cdiv(end, TOKENS), splits)
    first = split * per_split * TOKENS
    end = gl.minimum(end, first + per_split * TOKENS)
    # A split without tokens goes through one block that holds none: its sums come out as they should.
    count = gl.maximum(gl.cdiv(end - first, TOKENS), 1)

    query_left = gl.allocate_shared_memory(gl.bfloat16, [HEADS, HALF], BF16_SHARED)
    query_right = gl.allocate_shared_memory(gl.bfloat16, [HEADS, HALF], BF16_SHARED)
    query_rope = gl.allocate_shared_memory(gl.bfloat16, [HEADS, ROPE], BF16_SHARED)
    left = gl.allocate_shared_memory(gl.bfloat16, [2, TOKENS, HALF], BF16_SHARED)
    right = gl.allocate_shared_memory(gl.bfloat16, [2, TOKENS, HALF], BF16_SHARED)
    rope = gl.allocate_shared_memory(gl.bfloat16, [2, TOKENS, ROPE], BF16_SHARED)
    weights = gl.allocate_shared_memory(gl.bfloat16, [HEADS, TOKENS], BF16_SHARED)
    factors = gl.allocate_shared_memory(gl.float32, [HEADS], VECTOR_SHARED)
    hidden = gl.allocate_shared_memory(gl.float32, [2, TOKENS], VECTOR_SHARED)
    bars = gl.allocate_shared_memory(gl.int64, [8, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(8):
        mbarrier.init(bars.index(i), count=1)

    base = query + row * query_row_stride
    _load_query(base, query_left, first_head, heads, query_head_stride)
    _load_query(base + HALF, query_right, first_head, heads, query_head_stride)
    _load_query(base + 2 * HALF, query_rope, first_head, heads, query_head_stride)
    fence_async_shared()
    gl.thread_barrier()

    row_of_out = (split.to(gl.int64) * num_rows + row) * heads + first_head
    buffers = (left, right, rope, weights, factors, hidden, bars)
    queries = (query_left, query_right, query_rope)
    output = (out, lse, row_of_out, heads - first_head)
    tokens = (words, scales, source, first, end, num_slots)
    gl.warp_specialize(
        [
            (_left, (buffers, queries, output, count, scale_log2, WHOLE)),
            (_right, (buffers, query_right, output, tokens, count, DENSE)),
            (fill_left, (buffers, tokens, count, DENSE)),
        ],
        [4, 4],
        [200, 88],
    )


@gluon.jit
def _load_query(base, shared, first_head, heads, head_stride):
    layout: gl.constexpr = ROWS_LAYOUT if shared.shape[1] == 64 else WIDE_LAYOUT
    head = first_head + gl.arange(0, HEADS, layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, shared.shape[1], layout=gl.SliceLayout(0, layout))
    offsets = gl.expand_dims(head.to(gl.int64) * head_stride, 1) + gl.expand_dims(channel, 0)
    shared.store(gl.load(base + offsets, mask=gl.expand_dims(head < heads, 1), other=0.0))


@gluon.jit
def _logits(queries, buffers, block):
    """Starts the product of the queries and a block's keys, half by half as they arrive."""
    query_left, query_right, query_rope = queries
    left, right, rope, weights, factors, hidden, bars = buffers
    buffer = block & 1
    phase = (block >> 1) & 1
    zeros = gl.zeros([HEADS, TOKENS], gl.float32, LOGITS_LAYOUT)
    mbarrier.wait(full_left(bars, buffer), phase)
    key = left.index(buffer).permute((1, 0))
    logits = warpgroup_mma(query_left, key, zeros, use_acc=False, is_async=True)
    key = rope.index(buffer).permute((1, 0))
    logits = warpgroup_mma(query_rope, key, logits, is_async=True)
    mbarrier.wait(full_right(bars, buffer), phase)
    key = right.index(buffer).permute((1, 0))
    return warpgroup_mma(query_right, key, logits, is_async=True)


@gluon.jit
def _partial_sums(x):
    """[HEADS, TOKENS] -> [HEADS, 4]: what each thread of a quad has of a row; no thread needs another for it."""
    return gl.sum(gl.sum(gl.reshape(x, [HEADS, TOKENS // 8, 4, 2]), 3), 1)


@gluon.jit
def _soften(logits, hidden, highest, total, scale_log2):
    """Online softmax: weights, the factor for what has been summed so far, the new maximum and the new partial sums."""
    logits = logits * scale_log2 + gl.expand_dims(hidden.load(gl.SliceLayout(0, LOGITS_LAYOUT)), 0)
    raised = gl.maximum(highest, gl.max(logits, 1))
    factor = gl.exp2(highest - raised)
    exponentials = gl.exp2(logits - gl.expand_dims(raised, 1))
    of_total: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    total = total * gl.expand_dims(gl.convert_layout(factor, of_total), 1) + _partial_sums(exponentials)
    return exponentials.to(gl.bfloat16), factor, raised, total


@gluon.jit
def _left(buffers, queries, output, count, scale_log2, WHOLE: gl.constexpr):
    left, right, rope, weights, factors, hidden, bars = buffers
    weights_full = bars.index(6)
    weights_empty = bars.index(7)
    operand: gl.constexpr = gl.DotOperandLayout(0, OUT_LAYOUT, 2)
    of_out: gl.constexpr = gl.SliceLayout(1, OUT_LAYOUT)
    highest = gl.full([HEADS], LOWEST, gl.float32, gl.SliceLayout(1, LOGITS_LAYOUT))
    total = _partial_sums(gl.zeros([HEADS, TOKENS], gl.float32, LOGITS_LAYOUT))
    acc = gl.zeros([HEADS, HALF], gl.float32, OUT_LAYOUT)

    logits = warpgroup_mma_wait(0, deps=[_logits(queries, buffers, 0)])
    probabilities, factor, highest, total = _soften(logits, hidden.index(0), highest, total, scale_log2)
    weights.store(probabilities)
    factors.store(factor)
    for block in range(count - 1):
        buffer = block & 1
        operand_weights = gl.convert_layout(probabilities, operand)
        acc = warpgroup_mma(operand_weights, left.index(buffer), acc, is_async=True)
        logits = _logits(queries, buffers, block + 1)
        acc = warpgroup_mma_wait(3, deps=[acc])
        mbarrier.arrive(empty_left(bars, buffer), count=1)
        logits = warpgroup_mma_wait(0, deps=[logits])
        mbarrier.arrive(weights_full, count=1)
        probabilities, factor, highest, total = _soften(
            logits, hidden.index(buffer ^ 1), highest, total, scale_log2
        )
        mbarrier.wait(weights_empty, block & 1)
        weights.store(probabilities)
        factors.store(factor)
        acc = acc * gl.expand_dims(gl.convert_layout(factor, of_out), 1)
    last = count - 1
    mbarrier.arrive(weights_full, count=1)
    operand_weights = gl.convert_layout(probabilities, operand)
    acc = warpgroup_mma(operand_weights, left.index(last & 1), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.wait(weights_empty, last & 1)
    total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, LOGITS_LAYOUT))
    empty = total == 0
    inverse = 1 / gl.where(empty, 1.0, total)
    factors.store(inverse)
    mbarrier.arrive(weights_full, count=1)

    out, lse, row_of_out, heads = output
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, LOGITS_LAYOUT))
    nothing = float("inf") if WHOLE else float("-inf")
    whole = gl.where(empty, nothing, (highest + gl.log2(total)) * LN_2)
    gl.store(lse + row_of_out + head, whole, mask=head < heads)
    acc = acc * gl.expand_dims(gl.convert_layout(inverse, of_out), 1)
    _store_output(acc, out + row_of_out * LATENT, queries[0], heads)


@gluon.jit
def _right(buffers, query_right, output, tokens, count, DENSE: gl.constexpr):
    """Multiplies with the right halves and, as soon as it is through with one, fills it for the block after the next."""
    left, right, rope, weights, factors, hidden, bars = buffers
    words, scales, source, first, end, num_slots = tokens
    weights_full = bars.index(6)
    weights_empty = bars.index(7)
    operand: gl.constexpr = gl.DotOperandLayout(0, OUT_LAYOUT, 2)
    of_out: gl.constexpr = gl.SliceLayout(1, OUT_LAYOUT)
    acc = gl.zeros([HEADS, HALF], gl.float32, OUT_LAYOUT)

    slot = checked_slots(load_slots(source, first, end, 0, DENSE), first, end, 0, num_slots, DENSE)
    next_slots = load_slots(source, first, end, 1, DENSE)
    loaded = _load_right(words, scales, slot)
    for block in gl.static_range(2):
        _fill_right(buffers, block, count, words, slot, loaded)
        slot = checked_slots(next_slots, first, end, block + 1, num_slots, DENSE)
        next_slots = load_slots(source, first, end, block + 2, DENSE)
        loaded = _load_right(words, scales, slot)
    for block in range(count):
        mbarrier.wait(weights_full, block & 1)
        operand_weights = weights.load(operand)
        factor = factors.load(of_out)
        mbarrier.arrive(weights_empty, count=1)
        acc = acc * gl.expand_dims(factor, 1)
        acc = warpgroup_mma(operand_weights, right.index(block & 1), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        _fill_right(buffers, block + 2, count, words, slot, loaded)
        slot = checked_slots(next_slots, first, end, block + 3, num_slots, DENSE)
        next_slots = load_slots(source, first, end, block + 4, DENSE)
        loaded = _load_right(words, scales, slot)
    mbarrier.wait(weights_full, count & 1)
    acc = acc * gl.expand_dims(factors.load(of_out), 1)
    out, lse, row_of_out, heads = output
    _store_output(acc, out + row_of_out * LATENT + HALF, query_right, heads)


@gluon.jit
def _load_right(words, scales, slot):
    """Of the right half of each row the first quarter, and the scales of both."""
    return load_quarter(words, slot, 2), load_scale(scales, slot, 2), load_scale(scales, slot, 3)


@gluon.jit
def _fill_right(buffers, block, count, words, slot, loaded):
    """The second quarter is loaded while the first is converted: both at once do not fit the registers."""
    left, right, rope, weights, factors, hidden, bars = buffers
    quarter_2, scale_2, scale_3 = loaded
    if block < count:
        quarter_3 = load_quarter(words, slot, 3)
        store_quarter(right.index(block & 1), quarter_2, scale_2, 0)
        store_quarter(right.index(block & 1), quarter_3, scale_3, 1)
        fence_async_shared()
        mbarrier.arrive(full_right(bars, block & 1), count=1)


@gluon.jit
def _store_output(acc, target, staging, heads):
    """acc [HEADS, HALF] -> target, rows LATENT apart. bf16 goes through the query's shared memory, to be written in full lines."""
    if target.dtype.element_ty == gl.bfloat16:
        staging.store(acc.to(gl.bfloat16))
        gl.thread_barrier()
        layout: gl.constexpr = WIDE_LAYOUT
        values = staging.load(layout)
    else:
        layout: gl.constexpr = OUT_LAYOUT
        values = acc
    head = gl.arange(0, HEADS, layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))
    offsets = gl.expand_dims(head * LATENT, 1) + gl.expand_dims(channel, 0)
    gl.store(target + offsets, values, mask=gl.expand_dims(head < heads, 1))
