"""The lightning indexer's scores of many rows, for Hopper's tensor cores, in Gluon: a tile is one page of keys and all heads of two rows.

A warp has pages copied into a ring of buffers by the tensor memory accelerator; a warpgroup multiplies. While the products of one
page run, it adds up those of the page before, in two sets of accumulators that take turns. Knows nothing of how tokens are selected.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.layout import PAGE_SIZE
from kernels.rows import Rows

NUM_HEADS, KEY_DIM = 64, 128
MOST_PAGES = 128  # of a program: what it costs to load its queries should not count
FEWEST_PAGES = 4
PROGRAMS_WANTED = 132 * 8  # enough for every multiprocessor of an H200 to have its share

HEADS = gl.constexpr(NUM_HEADS)
DIM = gl.constexpr(KEY_DIM)
PAGE = gl.constexpr(PAGE_SIZE)
# A page is lines of one key's size, of which the last hold scales.
SCALE_LINES = gl.constexpr(PAGE_SIZE * 4 // KEY_DIM)
ROWS = gl.constexpr(2)  # of a program
STAGES = gl.constexpr(4)
QUERY_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
PRODUCTS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
KEY_SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 8, 2))
SCALE_SHARED = gl.constexpr(gl.NVMMASharedLayout(0, 32, 2))
VECTOR_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


def fits(q: torch.Tensor) -> bool:
    """Whether this kernel takes such queries: the heads of V3.2."""
    return (
        q.is_cuda
        and q.shape[1:] == (NUM_HEADS, KEY_DIM)
        and torch.cuda.get_device_capability(q.device)[0] == 9
    )


def launch(
    q: torch.Tensor,
    factors: torch.Tensor,
    keys: torch.Tensor,
    scales: torch.Tensor,
    rows: Rows,
    first: int,
    out: torch.Tensor,
    unless_at_most: int,
) -> None:
    """As scores.fill_scores; keys and scales are its index_views."""
    width = rows.page_table.shape[1]
    groups = triton.cdiv(len(out), ROWS.value)
    share = triton.next_power_of_2(triton.cdiv(width * groups, PROGRAMS_WANTED))
    pages_of_program = min(max(FEWEST_PAGES, share), MOST_PAGES)
    lines = keys.view(-1, KEY_DIM)
    _score_pages[(groups, triton.cdiv(width, pages_of_program))](
        TensorDescriptor.from_tensor(lines, [PAGE_SIZE, KEY_DIM], KEY_SHARED.value),
        TensorDescriptor.from_tensor(
            scales.view(len(lines), -1), [SCALE_LINES.value, KEY_DIM // 4], SCALE_SHARED.value
        ),
        q,
        factors,
        rows.owners,
        rows.positions,
        rows.page_table,
        out,
        first,
        first + len(out),
        len(lines) // (PAGE_SIZE + SCALE_LINES.value),
        rows.page_table.stride(0),
        out.stride(0),
        unless_at_most,
        pages_of_program,
        num_warps=4,
        maxnreg=128,
    )


@gluon.jit(
    do_not_specialize=["first", "end", "num_pages", "table_stride", "unless_at_most", "pages_of_program"]
)
def _score_pages(
    keys,
    scales,
    q,
    factors,
    owners,
    positions,
    page_table,
    out,
    first,
    end,
    num_pages,
    table_stride,
    out_stride,
    unless_at_most,
    pages_of_program,
):
    """Two rows and some pages of keys. Where the rows are of two requests, they take turns: a page table belongs to one."""
    row = first + gl.program_id(0) * ROWS
    first_page = gl.program_id(1) * pages_of_program
    owner_0, length_0 = _row(owners, positions, row, end, unless_at_most)
    owner_1, length_1 = _row(owners, positions, row + 1, end, unless_at_most)
    anything = gl.maximum(length_0, length_1) > first_page * PAGE

    queries = gl.allocate_shared_memory(gl.float8e4nv, [ROWS * HEADS, DIM], KEY_SHARED)
    ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, PAGE, DIM], KEY_SHARED)
    scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, SCALE_LINES, DIM // 4], SCALE_SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    pair = row.to(gl.int64) * HEADS + gl.arange(0, ROWS * HEADS, layout=gl.SliceLayout(1, QUERY_LAYOUT))
    channel = gl.arange(0, DIM, layout=gl.SliceLayout(0, QUERY_LAYOUT))
    exists = gl.expand_dims((pair < end * HEADS) & anything, 1)
    queries.store(
        gl.load(q + gl.expand_dims(pair * DIM, 1) + gl.expand_dims(channel, 0), mask=exists, other=0.0)
    )
    fence_async_shared()
    gl.thread_barrier()

    lengths = (owner_0, owner_1, length_0, length_1, first_page, pages_of_program)
    buffers = (ring, scale_ring, full, empty)
    target = (out + (row - first).to(gl.int64) * out_stride, out_stride)
    gl.warp_specialize(
        [
            (_multiply, (lengths, buffers, queries, factors, row, end, target)),
            (_fetch, (lengths, buffers, keys, scales, page_table + first_page, table_stride, num_pages)),
        ],
        [1],
        [40],
    )


@gluon.jit
def _row(owners, positions, row, end, unless_at_most):
    """A row's request, and how many tokens need scores."""
    exists = row < end
    length = gl.load(positions + row, mask=exists, other=-1).to(gl.int32) + 1
    return gl.load(owners + row, mask=exists, other=-1), gl.where(length <= unless_at_most, 0, length)


@gluon.jit
def _turn(lengths, turn):
    """The request whose turn it is, the tokens that either row sees of it, and the pages of this program that hold some."""
    owner_0, owner_1, length_0, length_1, first_page, pages_of_program = lengths
    visible_0 = gl.where(turn == 0, length_0, 0)
    visible_1 = gl.where((turn == 0) == (owner_0 == owner_1), length_1, 0)
    pages = gl.cdiv(gl.maximum(visible_0, visible_1), PAGE) - first_page
    return gl.where(turn == 0, owner_0, owner_1), visible_0, visible_1, gl.minimum(pages, pages_of_program)


@gluon.jit
def _fetch(lengths, buffers, keys, scales, page_table, table_stride, num_pages):
    """Has pages copied, as buffers become free. A page that is not there is read as another one: nobody sees its scores."""
    ring, scale_ring, full, empty = buffers
    done = 0
    for turn in range(2):
        owner, visible_0, visible_1, count = _turn(lengths, turn)
        table = page_table + owner.to(gl.int64) * table_stride
        page = gl.load(table, mask=count > 0, other=0)
        for number in range(count):
            buffer = done % STAGES
            line = gl.minimum(gl.maximum(page, 0), num_pages - 1) * (PAGE + SCALE_LINES)
            page = gl.load(table + gl.minimum(number + 1, count - 1))
            mbarrier.wait(empty.index(buffer), ((done // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(buffer), PAGE * (DIM + 4))
            tma.async_copy_global_to_shared(keys, [line, 0], full.index(buffer), ring.index(buffer))
            tma.async_copy_global_to_shared(
                scales, [line + PAGE, 0], full.index(buffer), scale_ring.index(buffer)
            )
            done += 1


@gluon.jit
def _multiply(lengths, buffers, queries, factors, row, end, target):
    """STAGES pages at a time: nothing is under way between them, which the compiler would not see through."""
    column = row.to(gl.int64) * HEADS + gl.arange(0, ROWS * HEADS, layout=gl.SliceLayout(0, PRODUCTS))
    factor = gl.load(factors + column, mask=column < end * HEADS, other=0.0)
    done = 0
    for turn in range(2):
        owner, visible_0, visible_1, count = _turn(lengths, turn)
        for number in range(0, count, STAGES):
            products = _start(buffers, queries, done, number < count)
            for ahead in gl.static_range(STAGES):
                more = number + ahead < count
                if ahead + 1 < STAGES:
                    later = _start(buffers, queries, done + ahead + 1, number + ahead + 1 < count)
                    products = warpgroup_mma_wait(1, deps=[products])
                else:
                    products = warpgroup_mma_wait(0, deps=[products])
                scale = _release(buffers, done + ahead, more)
                token = (lengths[4] + number + ahead) * PAGE
                _finish(target, products, factor, scale, token, visible_0, visible_1)
                if ahead + 1 < STAGES:
                    products = later
            done += gl.minimum(count - number, STAGES)


@gluon.jit
def _start(buffers, queries, number, exists):
    """Starts the products of a page's keys and the queries. If there is no such page, of whatever is there, for nobody."""
    ring, scale_ring, full, empty = buffers
    buffer = number % STAGES
    mbarrier.wait(full.index(buffer), (number // STAGES) & 1, pred=exists)
    zeros = gl.zeros([PAGE, ROWS * HEADS], gl.float32, PRODUCTS)
    return warpgroup_mma(ring.index(buffer), queries.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _release(buffers, number, exists):
    """-> the scales of a page's keys; its buffer may be filled again."""
    ring, scale_ring, full, empty = buffers
    buffer = number % STAGES
    scales = scale_ring.index(buffer)._reinterpret(gl.float32, [PAGE], VECTOR_SHARED)
    scale = scales.load(gl.SliceLayout(1, PRODUCTS))
    mbarrier.arrive(empty.index(buffer), count=1, pred=exists)
    return scale


@gluon.jit
def _finish(target, products, factor, scale, first_token, visible_0, visible_1):
    """Adds a page's products up over the heads and stores its scores."""
    out, out_stride = target
    weighted = gl.maximum(products, 0.0) * gl.expand_dims(factor, 0)
    scores = gl.sum(gl.reshape(weighted, [PAGE, ROWS, HEADS]), 2)
    of_tokens: gl.constexpr = gl.SliceLayout(1, scores.type.layout)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, scores.type.layout))
    token = gl.expand_dims(first_token + gl.arange(0, PAGE, layout=of_tokens), 1)
    scores = scores * gl.expand_dims(gl.convert_layout(scale, of_tokens), 1)
    visible = gl.expand_dims(gl.where(row == 0, visible_0, visible_1), 0)
    gl.store(out + gl.expand_dims(row.to(gl.int64) * out_stride, 0) + token, scores, mask=token < visible)
