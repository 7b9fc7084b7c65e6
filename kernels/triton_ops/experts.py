"""The routed experts of a mixture, for any routing without a word to the host. Knows nothing of how experts are chosen.

Every pick of a token becomes a row. Rows are put in order of their experts, each expert's first row at the start of a tile;
then both products run over tiles that have a matrix each. How many tiles there may be follows from the shapes alone.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels.dispatch import ExpertWeights, QuantizedRows
from kernels.layout import QUANT_BLOCK
from kernels.triton_ops.linear import Tiling, fp8_product
from kernels.triton_ops.norm import swiglu_of_tiles
from kernels.triton_ops.quant import BLOCKS_PER_PROGRAM, block_grid, block_indices, new_rows, quantize_tile

_PICKS_PER_PROGRAM = 128
_COLUMNS_PER_PROGRAM = 1024


@triton.jit(do_not_specialize=["num_picks"])
def _count_kernel(
    experts_ptr, counts_ptr, num_picks, num_experts, PICKS: tl.constexpr, EXPERTS: tl.constexpr
):
    """counts int32 [programs, EXPERTS]: how many of a program's picks each expert has."""
    picks = tl.program_id(0) * PICKS + tl.arange(0, PICKS)
    experts = tl.load(experts_ptr + picks, mask=picks < num_picks, other=-1).to(tl.int32)
    mine = (experts >= 0) & (experts < num_experts)
    counts = tl.histogram(tl.where(mine, experts, 0), EXPERTS, mask=mine)
    tl.store(counts_ptr + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS), counts)


@triton.jit(do_not_specialize=["num_picks", "num_tiles", "num_counts"])
def _place_kernel(
    experts_ptr,
    counts_ptr,
    positions_ptr,
    matrices_ptr,
    num_picks,
    num_experts,
    num_tiles,
    num_counts,
    PICKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """positions int32 [picks]: the row of each pick, -1 if its expert is not here. An expert's picks keep their order.
    matrices int32 [tiles]: the expert of each tile of ROWS rows, -1 for tiles that stay empty; from the first program."""
    program = tl.program_id(0)
    index = tl.arange(0, EXPERTS)
    before = tl.zeros((EXPERTS,), tl.int32)
    total = tl.zeros((EXPERTS,), tl.int32)
    for number in range(num_counts):
        counts = tl.load(counts_ptr + number * EXPERTS + index)
        before += tl.where(number < program, counts, 0)
        total += counts
    padded = tl.cdiv(total, ROWS) * ROWS
    ends = tl.cumsum(padded, 0)

    picks = program * PICKS + tl.arange(0, PICKS)
    experts = tl.load(experts_ptr + picks, mask=picks < num_picks, other=-1).to(tl.int32)
    mine = (experts >= 0) & (experts < num_experts)
    slots = tl.arange(0, PICKS)
    earlier = (experts[:, None] == experts[None, :]) & (slots[None, :] < slots[:, None])
    rank = tl.sum(earlier.to(tl.int32), 1)
    base = tl.gather(ends - padded + before, tl.where(mine, experts, 0), 0)
    tl.store(positions_ptr + picks, tl.where(mine, base + rank, -1), mask=picks < num_picks)

    if program == 0:
        for first in range(0, num_tiles, 16):
            tiles = first + tl.arange(0, 16)
            owner = tl.sum((ends[None, :] <= (tiles * ROWS)[:, None]).to(tl.int32), 1)
            tl.store(matrices_ptr + tiles, tl.where(owner < EXPERTS, owner, -1), mask=tiles < num_tiles)


@triton.jit(do_not_specialize=["num_tokens"])
def _spread_kernel(
    x_ptr,
    positions_ptr,
    values_ptr,
    scales_ptr,
    num_tokens,
    channels,
    x_stride,
    row_stride,
    block_stride,
    PICKS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """x [T, D], quantised once, to the row of each of its picks."""
    tokens, blocks, exist = block_indices(num_tokens, tl.cdiv(channels, 128), BLOCKS)
    columns = blocks[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + tokens[:, None] * x_stride + columns, mask=exist[:, None], other=0.0).to(tl.float32)
    values, scales = quantize_tile(x)
    for pick in tl.static_range(PICKS):
        rows = tl.load(positions_ptr + tokens * PICKS + pick, mask=exist, other=-1).to(tl.int64)
        tl.store(values_ptr + rows[:, None] * channels + columns, values, mask=(rows >= 0)[:, None])
        tl.store(scales_ptr + rows * row_stride + blocks * block_stride, scales, mask=rows >= 0)


@triton.jit
def _weighted(rows_ptr, positions_ptr, weights_ptr, pick, columns, mask, channels):
    """A pick's row times its weight, fp32, and the row's number; zeros for an expert elsewhere."""
    row = tl.load(positions_ptr + pick).to(tl.int64)
    weight = tl.load(weights_ptr + pick)
    part = tl.load(rows_ptr + row * channels + columns, mask=mask & (row >= 0), other=0.0).to(tl.float32)
    return tl.where(row >= 0, part * weight, 0.0), row


@triton.jit
def _in_pairs(sums, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr):
    """[COLUMNS, BLOCKS] -> [COLUMNS]: neighbours first."""
    if BLOCKS == 8:
        even, odd = tl.split(tl.reshape(sums, (COLUMNS, 4, 2)))
        sums4 = even + odd
    else:
        sums4 = sums
    if BLOCKS >= 4:
        even, odd = tl.split(tl.reshape(sums4, (COLUMNS, 2, 2)))
        sums2 = even + odd
    else:
        sums2 = sums4
    even, odd = tl.split(sums2)
    return even + odd


@triton.jit
def _gather_kernel(
    rows_ptr,
    positions_ptr,
    weights_ptr,
    experts_ptr,
    start_ptr,
    out_ptr,
    channels,
    start_stride,
    block_size,
    PICKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STARTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """start + the weighted rows of a token's picks -> out fp32 [T, D]. The first pick first, or block by block and in pairs."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < channels
    total = tl.zeros((COLUMNS,), tl.float32)
    if STARTED:
        total = tl.load(start_ptr + token * start_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if BLOCKS == 1:
        for pick in tl.static_range(PICKS):
            part, _ = _weighted(
                rows_ptr, positions_ptr, weights_ptr, token * PICKS + pick, columns, mask, channels
            )
            total += part
    else:
        sums = tl.zeros((COLUMNS, BLOCKS), tl.float32)
        for pick in tl.static_range(PICKS):
            part, row = _weighted(
                rows_ptr, positions_ptr, weights_ptr, token * PICKS + pick, columns, mask, channels
            )
            block = tl.load(experts_ptr + token * PICKS + pick).to(tl.int64) // block_size
            here = (tl.arange(0, BLOCKS) == block) & (row >= 0)
            sums += tl.where(here[None, :], part[:, None], 0.0)
        total += _in_pairs(sums, COLUMNS, BLOCKS)
    tl.store(out_ptr + token * channels + columns, total, mask=mask)


def prepare_experts(
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
) -> ExpertWeights:
    """All experts' matrices under each other. Nothing is copied if I is a multiple of 128."""
    if gate_up_scale is None or down_scale is None:
        raise ValueError(f"experts must be FP8, but these are {gate_up.dtype}")
    hidden, channels = down.shape[1:]
    if hidden % QUANT_BLOCK:
        raise ValueError(f"the hidden size of experts is {hidden}, but must be a multiple of {QUANT_BLOCK}")
    missing = -channels % QUANT_BLOCK
    if missing:
        gate_up = F.pad(gate_up.view(torch.uint8), (0, 0, 0, missing)).view(gate_up.dtype)
        down = F.pad(down.view(torch.uint8), (0, missing)).view(down.dtype)
    stacked = gate_up.flatten(0, 2), gate_up_scale.flatten(0, 2), down.flatten(0, 1), down_scale.flatten(0, 1)
    return ExpertWeights(stacked, quantized=True)


def expert_mlp(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    prepared: ExpertWeights,
    start: torch.Tensor | None = None,
    num_blocks: int = 1,
) -> torch.Tensor:
    gate_up, gate_up_scales, down, down_scales = prepared.tensors
    hidden, channels = gate_up.shape[1], down.shape[1]
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if not len(x):
        return out
    tiling = tiling_of(experts.numel(), len(down) // hidden)
    positions, matrices = place_rows(experts, len(down) // hidden, tiling.rows)
    rows = _spread(x, positions, len(matrices) * tiling.rows)
    both = torch.empty(len(rows.values), 2 * channels, dtype=x.dtype, device=x.device)
    fp8_product(rows.values, rows.scales, gate_up, gate_up_scales, both, tiling, matrices)
    rows = swiglu_of_tiles(both[:, :channels], both[:, channels:], matrices)
    back = torch.empty(len(rows.values), hidden, dtype=x.dtype, device=x.device)
    fp8_product(rows.values, rows.scales, down, down_scales, back, tiling, matrices)
    add_picks(back, positions, weights, experts, start, out, num_blocks, len(down) // hidden // num_blocks)
    return out


def tiling_of(num_picks: int, num_experts: int) -> Tiling:
    """The fastest of those tried on an H200 for 32, 512 and 8192 tokens, 256 experts and 8 picks (docs/kernels.md)."""
    rows_each = num_picks / num_experts
    if rows_each <= 8:
        return Tiling(16, columns=128, splits=1, stages=4, warps=4, transposed=True)
    if rows_each <= 16:
        return Tiling(32, columns=128, splits=1, stages=4, warps=4, transposed=True)
    return Tiling(64, columns=128, splits=1, stages=3, warps=4, transposed=False)


def place_rows(experts: torch.Tensor, num_experts: int, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """experts [T, k] -> the row of each pick, int32 [T, k], and the expert of each tile of rows, int32 [tiles]."""
    picks = experts.numel()
    programs, padded = triton.cdiv(picks, _PICKS_PER_PROGRAM), triton.next_power_of_2(num_experts)
    tiles = picks // tile + min(num_experts, picks)
    counts = torch.empty(programs, padded, dtype=torch.int32, device=experts.device)
    positions = torch.empty(experts.shape, dtype=torch.int32, device=experts.device)
    matrices = torch.empty(tiles, dtype=torch.int32, device=experts.device)
    experts = experts.contiguous()
    sizes = {"PICKS": _PICKS_PER_PROGRAM, "EXPERTS": padded}
    _count_kernel[(programs,)](experts, counts, picks, num_experts, **sizes)
    _place_kernel[(programs,)](
        experts, counts, positions, matrices, picks, num_experts, tiles, programs, **sizes, ROWS=tile
    )
    return positions, matrices


def _spread(x: torch.Tensor, positions: torch.Tensor, num_rows: int) -> QuantizedRows:
    rows = new_rows((num_rows, x.shape[1]), x.dtype, x.device)
    _spread_kernel[block_grid(*x.shape)](
        x,
        positions,
        rows.values,
        rows.scales,
        *x.shape,
        x.stride(0),
        *rows.scales.stride(),
        PICKS=positions.shape[1],
        BLOCKS=BLOCKS_PER_PROGRAM,
    )
    return rows


def add_picks(
    rows: torch.Tensor,
    positions: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    start: torch.Tensor | None,
    out: torch.Tensor,
    num_blocks: int,
    block_size: int,
) -> None:
    """rows [M, D], of which positions int32 [T, k] are a token's picks, -1 for none -> out fp32 [T, D], as expert_mlp says."""
    num_tokens, channels = out.shape
    _gather_kernel[(num_tokens, triton.cdiv(channels, _COLUMNS_PER_PROGRAM))](
        rows,
        positions,
        weights.contiguous(),
        experts.contiguous(),
        start,
        out,
        channels,
        0 if start is None else start.stride(0),
        block_size,
        PICKS=positions.shape[1],
        BLOCKS=num_blocks,
        COLUMNS=_COLUMNS_PER_PROGRAM,
        STARTED=start is not None,
    )
