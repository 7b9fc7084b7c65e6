"""Fills shared memory with FP8 latents made bf16, for the kernel in mla_hopper.

A buffer has a left half (channels 0 .. 255), a right half (256 .. 511) and the roped keys, of 64 tokens. Barriers say when each
half is full and when it may be filled again; `left` stands for the roped keys too. Knows nothing of queries.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kernels.layout import PAGE_SIZE

HALF = gl.constexpr(256)
ROPE = gl.constexpr(64)
TOKENS = gl.constexpr(PAGE_SIZE)
ROW_WORDS = gl.constexpr(164)  # 656 bytes
SCALE_WORD = gl.constexpr(128)
KEY_WORD = gl.constexpr(132)
QUARTER_WORDS = gl.constexpr(32)  # 128 channels that share a scale
WORDS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
WORD_SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))

# Four e4m3 become four bf16: each byte with its sign spread over a half word, moved to where a bf16 has exponent and mantissa.
# That number is 2^120 times too small, also where it is subnormal.
DEQUANTIZE = gl.constexpr("""{
.reg .b32 low, high, factor;
mov.b32 factor, 0x7B807B80;
prmt.b32 low, $2, 0, 0x9180;
prmt.b32 high, $2, 0, 0xB3A2;
shl.b32 low, low, 4;
shl.b32 high, high, 4;
and.b32 low, low, 0x87F087F0;
and.b32 high, high, 0x87F087F0;
mul.rn.bf16x2 low, low, factor;
mul.rn.bf16x2 high, high, factor;
mul.rn.bf16x2 $0, low, $3;
mul.rn.bf16x2 $1, high, $3;
}""")


@gluon.jit
def full_left(bars, buffer):
    return bars.index(buffer)


@gluon.jit
def full_right(bars, buffer):
    return bars.index(2 + buffer)


@gluon.jit
def empty_left(bars, buffer):
    return bars.index(4 + buffer)


@gluon.jit
def load_slots(source, first, end, block, DENSE: gl.constexpr):
    """Slots int32 [TOKENS] of a block as they are in memory; of a page table, the page of each."""
    token = first + block * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, WORDS_LAYOUT))
    return gl.load(source + (token // TOKENS if DENSE else token), mask=token < end, other=-1)


@gluon.jit
def checked_slots(loaded, first, end, block, num_slots, DENSE: gl.constexpr):
    """What load_slots returned -> slots int32 [TOKENS], -1 where there is no token."""
    offset = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, WORDS_LAYOUT))
    slot = loaded * TOKENS + offset if DENSE else loaded
    inside = first + block * TOKENS + offset < end
    return gl.where(inside & (slot < num_slots) & (slot >= 0), slot, -1)


@gluon.jit
def load_quarter(words, slot, QUARTER: gl.constexpr):
    """128 channels of each row as words. What is read for a row that is not there does not matter: its scale is zero, and no code
    of e4m3 is dequantised to a NaN."""
    row = gl.maximum(slot, 0).to(gl.int64) * ROW_WORDS
    column = QUARTER * QUARTER_WORDS + gl.arange(0, QUARTER_WORDS, layout=gl.SliceLayout(0, WORDS_LAYOUT))
    return gl.load(words + gl.expand_dims(row, 1) + gl.expand_dims(column, 0))


@gluon.jit
def load_scale(scales, slot, QUARTER: gl.constexpr):
    """The scale of a quarter of each row, zero where there is no row."""
    row = gl.maximum(slot, 0).to(gl.int64) * ROW_WORDS
    return gl.load(scales + row + SCALE_WORD + QUARTER, mask=slot >= 0, other=0.0)


@gluon.jit
def _load_keys(words, slot):
    """The roped keys of each row as words, zeros where there is no token."""
    column = KEY_WORD + gl.arange(0, QUARTER_WORDS, layout=gl.SliceLayout(0, WORDS_LAYOUT))
    offsets = gl.expand_dims(slot.to(gl.int64) * ROW_WORDS, 1) + gl.expand_dims(column, 0)
    return gl.load(words + offsets, mask=gl.expand_dims(slot >= 0, 1), other=0)


@gluon.jit
def _load_left(words, scales, slot):
    """Of each row the quarters of the left half, their scales, and the roped key."""
    quarters = load_quarter(words, slot, 0), load_quarter(words, slot, 1)
    return quarters, (load_scale(scales, slot, 0), load_scale(scales, slot, 1)), _load_keys(words, slot)


@gluon.jit
def store_quarter(shared, quarter, scale, PLACE: gl.constexpr):
    """128 channels of a block, dequantised, into the first or second half of shared memory bf16 [TOKENS, HALF]."""
    pairs = shared._reinterpret(gl.int32, [TOKENS, HALF // 2], WORD_SHARED)
    pairs.slice(PLACE * HALF // 4, HALF // 4, dim=1).store(_dequantized(quarter, scale))


@gluon.jit
def _dequantized(quarter, scale):
    """Words of four e4m3 -> twice as many of two bf16. A scale is a power of two and fits a bf16; it is used in pairs."""
    bits = scale.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    pair, quarter = gl.broadcast(gl.expand_dims(bits | (bits << 16), 1), quarter)
    low, high = gl.inline_asm_elementwise(
        DEQUANTIZE, "=&r,=&r,r,r", [quarter, pair], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    return gl.reshape(gl.join(low, high), [TOKENS, 2 * QUARTER_WORDS])


@gluon.jit
def fill_left(buffers, tokens, count, DENSE: gl.constexpr):
    """Fills the left halves, the roped keys and what hides the tokens that are not there.

    What is loaded is used one block later: a warp waits where it uses, and at a fence, not where it loads.
    """
    left, right, rope, weights, factors, hidden, bars = buffers
    words, scales, source, first, end, num_slots = tokens
    slot = checked_slots(load_slots(source, first, end, 0, DENSE), first, end, 0, num_slots, DENSE)
    next_slots = load_slots(source, first, end, 1, DENSE)
    quarters, quarter_scales, key = _load_left(words, scales, slot)
    for block in range(count):
        buffer = block & 1
        mbarrier.wait(empty_left(bars, buffer), ((block >> 1) & 1) ^ 1)
        hidden.index(buffer).store(gl.where(slot < 0, float("-inf"), 0.0))
        store_quarter(left.index(buffer), quarters[0], quarter_scales[0], 0)
        store_quarter(left.index(buffer), quarters[1], quarter_scales[1], 1)
        rope.index(buffer)._reinterpret(gl.int32, [TOKENS, ROPE // 2], WORD_SHARED).store(key)
        fence_async_shared()
        mbarrier.arrive(full_left(bars, buffer), count=1)
        slot = checked_slots(next_slots, first, end, block + 1, num_slots, DENSE)
        next_slots = load_slots(source, first, end, block + 2, DENSE)
        quarters, quarter_scales, key = _load_left(words, scales, slot)
