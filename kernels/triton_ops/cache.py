"""Writes and reads paged FP8 latents on a GPU, byte for byte as `kernels.reference.cache` does. Knows nothing of attention.

A program takes one row. Pages are addressed through views of one storage (e4m3, fp32, bf16), so no byte is moved to change
its type.
"""

import torch
import triton
import triton.language as tl

from kernels.layout import QUANT_BLOCK, CacheLayout

E4M3_MAX: tl.constexpr = tl.constexpr(448.0)
AMAX_FLOOR: tl.constexpr = tl.constexpr(1e-4)
EXPONENT_BITS: tl.constexpr = tl.constexpr(0x7F800000)
INFINITY_BITS: tl.constexpr = tl.constexpr(0x7F800000)
QUANT_BLOCK_SIZE: tl.constexpr = tl.constexpr(QUANT_BLOCK)
READ_ROWS = 4  # rows that one program reads


def write_latents(
    pages: torch.Tensor, slots: torch.Tensor, latent: torch.Tensor, k_pe: torch.Tensor, layout: CacheLayout
) -> None:
    """As kernels.reference.write_latents."""
    views = latent_views(pages, layout)
    if len(slots):
        _write_kernel[(len(slots),)](
            latent,
            k_pe,
            *views,
            slots,
            latent.stride(0),
            k_pe.stride(0),
            LATENT=layout.latent_dim,
            ROPE=layout.rope_dim,
            ROW_BYTES=layout.latent_row_bytes,
            num_warps=1,
        )


def read_latents(pages: torch.Tensor, slots: torch.Tensor, layout: CacheLayout) -> torch.Tensor:
    """As kernels.reference.read_latents."""
    views = latent_views(pages, layout)
    flat = slots.reshape(-1)
    out = torch.empty(
        flat.numel(), layout.latent_dim + layout.rope_dim, dtype=torch.float32, device=pages.device
    )
    if flat.numel():
        _read_kernel[(triton.cdiv(flat.numel(), READ_ROWS),)](
            *views,
            flat,
            out,
            flat.numel(),
            pages.shape[0] * pages.shape[1],
            LATENT=layout.latent_dim,
            ROPE=layout.rope_dim,
            ROW_BYTES=layout.latent_row_bytes,
            ROWS=READ_ROWS,
            num_warps=4,
        )
    return out.view(*slots.shape, out.shape[1])


def rotate_latents(
    query_pe: torch.Tensor,
    latent: torch.Tensor,
    key_pe: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    layout: CacheLayout,
) -> torch.Tensor:
    """As kernels.reference.rotate_latents, in one kernel."""
    views = latent_views(pages, layout)
    num_rows, heads, rope_dim = query_pe.shape
    roped = torch.empty(num_rows, heads, rope_dim, dtype=query_pe.dtype, device=query_pe.device)
    if num_rows:
        # Without contraction to FMA the rotation rounds as torch's separate products do: the same bits.
        _rotate_kernel[(num_rows,)](
            query_pe,
            latent,
            key_pe,
            norm_weight,
            eps,
            cos,
            sin,
            roped,
            *views,
            slots,
            query_pe.stride(0),
            query_pe.stride(1),
            latent.stride(0),
            key_pe.stride(0),
            heads,
            HEADS=triton.next_power_of_2(heads),
            LATENT=layout.latent_dim,
            ROPE=layout.rope_dim,
            ROW_BYTES=layout.latent_row_bytes,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return roped


def latent_views(pages: torch.Tensor, layout: CacheLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same bytes as e4m3, fp32 and bf16: for latents, scales and roped keys. ValueError where there is no FP8 row."""
    if not layout.quantized:
        raise ValueError("the Triton back end serves quantised caches only: layout.quantized must be True")
    for name, size in (("latent_dim", layout.latent_dim), ("rope_dim", layout.rope_dim)):
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name} is {size}, but the Triton back end takes powers of two from 16 on")
    if not pages.is_contiguous():
        raise ValueError("latent pages must be contiguous")
    return pages.view(torch.float8_e4m3fn), pages.view(torch.float32), pages.view(torch.bfloat16)


@triton.jit
def _write_row(latent, key, values, scales, keys, slot, LATENT: tl.constexpr, ROW_BYTES: tl.constexpr):
    """latent fp32 [LATENT / 128, 128] is quantised, key bf16 [ROPE] stored as it is."""
    GROUPS: tl.constexpr = LATENT // QUANT_BLOCK_SIZE
    # A NaN counts as infinite, so that its block gets the scale infinity: tl.max would pass over it.
    amax = tl.max(tl.where(latent != latent, float("inf"), tl.abs(latent)), 1)
    quotient = tl.maximum(amax, AMAX_FLOOR) * (1 / E4M3_MAX)
    below = (quotient.to(tl.int32, bitcast=True) & EXPONENT_BITS).to(tl.float32, bitcast=True)
    scale = tl.where(below < quotient, 2 * below, below)
    bits = scale.to(tl.int32, bitcast=True)
    # 1 / 2^k from the exponent: exact, and 0 for infinity, which makes 0 of numbers and NaN of infinities.
    inverse = tl.where(bits == INFINITY_BITS, 0, (254 << 23) - bits).to(tl.float32, bitcast=True)
    scaled = latent * tl.expand_dims(inverse, 1)
    scaled = tl.maximum(scaled, -E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    scaled = tl.minimum(scaled, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    groups, lanes = tl.arange(0, GROUPS), tl.arange(0, QUANT_BLOCK_SIZE)
    row = slot.to(tl.int64) * ROW_BYTES
    where = row + tl.expand_dims(groups * QUANT_BLOCK_SIZE, 1) + tl.expand_dims(lanes, 0)
    tl.store(values + where, scaled.to(tl.float8e4nv))
    tl.store(scales + (row + LATENT) // 4 + groups, scale)
    channels = tl.arange(0, key.shape[0])
    tl.store(keys + (row + LATENT + 4 * GROUPS) // 2 + channels, key)


@triton.jit
def _load_row(x, LATENT: tl.constexpr):
    """fp32 [LATENT / 128, 128] of a contiguous row."""
    groups, lanes = tl.arange(0, LATENT // QUANT_BLOCK_SIZE), tl.arange(0, QUANT_BLOCK_SIZE)
    return tl.load(x + tl.expand_dims(groups * QUANT_BLOCK_SIZE, 1) + tl.expand_dims(lanes, 0)).to(tl.float32)


@triton.jit
def _write_kernel(
    latent,
    key,
    values,
    scales,
    keys,
    slots,
    latent_stride,
    key_stride,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    roped = tl.load(key + row * key_stride + tl.arange(0, ROPE)).to(tl.bfloat16)
    _write_row(
        _load_row(latent + row * latent_stride, LATENT),
        roped,
        values,
        scales,
        keys,
        tl.load(slots + row),
        LATENT,
        ROW_BYTES,
    )


@triton.jit(do_not_specialize=["count"])
def _read_kernel(
    values,
    scales,
    keys,
    slots,
    out,
    count,
    num_slots,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < count
    slot = tl.load(slots + rows, mask=inside, other=-1).to(tl.int64)
    valid = tl.expand_dims((slot >= 0) & (slot < num_slots), 1)
    source = tl.expand_dims(slot * ROW_BYTES, 1)
    channels = tl.expand_dims(tl.arange(0, LATENT), 0)
    latent = tl.load(values + source + channels, mask=valid, other=0.0).to(tl.float32)
    scale = tl.load(scales + (source + LATENT) // 4 + channels // QUANT_BLOCK_SIZE, mask=valid, other=0.0)
    rope = tl.expand_dims(tl.arange(0, ROPE), 0)
    SCALE_BYTES: tl.constexpr = 4 * (LATENT // QUANT_BLOCK_SIZE)
    key = tl.load(keys + (source + LATENT + SCALE_BYTES) // 2 + rope, mask=valid, other=0.0)
    target = tl.expand_dims(rows * (LATENT + ROPE), 1)
    tl.store(out + target + channels, latent * scale, mask=tl.expand_dims(inside, 1))
    tl.store(out + target + LATENT + rope, key.to(tl.float32), mask=tl.expand_dims(inside, 1))


@triton.jit
def _rotate_neighbours(x, cos, sin):
    """x [n, ROPE], cos and sin fp32 [1, ROPE / 2] -> [n, ROPE] in x's dtype; pairs (2i, 2i+1)."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], x.shape[1] // 2, 2)))
    pairs = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    return tl.reshape(pairs, (x.shape[0], x.shape[1])).to(x.dtype)


@triton.jit
def _rotate_kernel(
    query,
    latent,
    key,
    norm_weight,
    eps,
    cos,
    sin,
    roped,
    values,
    scales,
    keys,
    slots,
    query_row_stride,
    query_head_stride,
    latent_stride,
    key_stride,
    heads,
    HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    angles = tl.expand_dims(row * (ROPE // 2) + tl.arange(0, ROPE // 2), 0)
    row_cos, row_sin = tl.load(cos + angles), tl.load(sin + angles)
    channels = tl.expand_dims(tl.arange(0, ROPE), 0)
    head = tl.expand_dims(tl.arange(0, HEADS), 1)
    x = tl.load(
        query + row * query_row_stride + head * query_head_stride + channels, mask=head < heads, other=0.0
    )
    target = roped + (row * heads + head) * ROPE + channels
    tl.store(target, _rotate_neighbours(x, row_cos, row_sin), mask=head < heads)

    rotated_key = _rotate_neighbours(tl.load(key + row * key_stride + channels), row_cos, row_sin)
    x = _load_row(latent + row * latent_stride, LATENT)
    variance = tl.sum(tl.sum(x * x, 1), 0) / LATENT
    normed = x * tl.rsqrt(variance + eps) * _load_row(norm_weight, LATENT)
    normed = normed.to(latent.dtype.element_ty).to(tl.float32)
    rotated_key = tl.reshape(rotated_key.to(tl.bfloat16), (ROPE,))
    _write_row(normed, rotated_key, values, scales, keys, tl.load(slots + row), LATENT, ROW_BYTES)
