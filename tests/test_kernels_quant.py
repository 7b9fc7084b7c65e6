"""The quantiser: exact powers of two, rounding, and that nothing which is not finite becomes a number."""

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.reference import dequantize_blocks, dequantize_weight, quantize_blocks, quantize_weight

ALL_CODES = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)


def e4m3_value(code: int) -> float:
    """From the definition: sign, 4 bits of exponent with bias 7, 3 bits of mantissa, no infinity, one NaN."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 0xF, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def test_every_code_decodes_to_its_value() -> None:
    decoded = dequantize_blocks(ALL_CODES, torch.ones(2))
    expected = torch.tensor([e4m3_value(code) for code in range(256)])
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0, equal_nan=True)
    assert math.copysign(1, float(decoded[0x80])) == -1


@pytest.mark.parametrize("exponent", [-22, -9, -1, 0, 1, 8, 60])
def test_amax_of_448_times_a_power_of_two_has_that_power_as_scale(exponent: int) -> None:
    x = torch.zeros(128)
    x[17] = -448 * 2.0**exponent
    values, scales = quantize_blocks(x)
    assert scales.tolist() == [2.0**exponent]
    assert float(values[17].float()) == -448


def test_the_next_float_above_doubles_the_scale() -> None:
    amax = torch.tensor(448.0).nextafter(torch.tensor(math.inf))
    _, scales = quantize_blocks(amax.expand(128))
    assert scales.tolist() == [2.0]


def test_amax_is_floored_at_1e_4() -> None:
    _, scales = quantize_blocks(
        torch.stack((torch.zeros(128), torch.full((128,), 5e-5), torch.full((128,), 1e-4)))
    )
    assert scales.flatten().tolist() == [2.0**-22] * 3


@given(st.floats(2**-13, 2**100, width=32), st.floats(-1, 1))
def test_scale_is_the_least_power_of_two_that_fits(amax: float, fraction: float) -> None:
    x = torch.full((128,), amax * fraction)
    x[3] = amax
    values, scales = quantize_blocks(x)
    scale = float(scales)
    # fp32(1/448) may round a quotient just above a power of two down to it: the clamp takes care of it.
    assert math.frexp(scale)[0] == 0.5
    assert amax <= 448 * scale * (1 + 2**-22)
    assert scale == 2.0**-22 or amax > 448 * (scale / 2) * (1 - 2**-22)
    error = abs(float(values[0].float()) * scale - float(x[0]))
    assert error <= max(abs(float(x[0])) * 2**-4, scale * 2**-10) * (1 + 2**-20)


def test_rounds_to_the_nearest_and_ties_to_even() -> None:
    x = torch.zeros(128)
    x[:6] = torch.tensor([448.0, 17.0, 19.0, -17.0, 2**-10, 3 * 2**-10])
    values, _ = quantize_blocks(x)
    assert values[:6].float().tolist() == [448.0, 16.0, 20.0, -16.0, 0.0, 2**-8]


def test_blocks_do_not_share_scales() -> None:
    x = torch.ones(3, 2, 256)
    x[..., 128:] *= 1000
    values, scales = quantize_blocks(x)
    assert values.shape == (3, 2, 256)
    assert scales.shape == (3, 2, 2)
    assert scales[0, 0].tolist() == [2.0**-8, 4.0]
    torch.testing.assert_close(dequantize_blocks(values, scales), x, rtol=2**-4, atol=0)


def test_a_last_block_may_be_short() -> None:
    x = torch.randn(5, 200)
    values, scales = quantize_blocks(x)
    whole, whole_scales = quantize_blocks(torch.nn.functional.pad(x, (0, 56)))
    assert scales.shape == (5, 2)
    assert torch.equal(scales, whole_scales)
    assert torch.equal(dequantize_blocks(values, scales), dequantize_blocks(whole, whole_scales)[:, :200])


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_block_and_no_other(bad: float) -> None:
    x = torch.randn(384)
    x[130] = bad
    back = dequantize_blocks(*quantize_blocks(x))
    assert back[128:256].isnan().all()
    assert back[:128].isfinite().all()
    assert back[256:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x = torch.randn(37, 3, 256, dtype=dtype)
    values, scales = quantize_blocks(x)
    for row in (0, 5, 36):
        own_values, own_scales = quantize_blocks(x[row])
        assert torch.equal(own_values.view(torch.uint8), values[row].view(torch.uint8))
        assert torch.equal(own_scales, scales[row])


def test_no_rows() -> None:
    values, scales = quantize_blocks(torch.empty(0, 256))
    assert dequantize_blocks(values, scales).shape == (0, 256)


def test_weight_scales_of_576_rows() -> None:
    weight = torch.randn(576, 300)
    values, scale_inv = quantize_weight(weight)
    assert values.shape == (576, 300)
    assert values.dtype == torch.float8_e4m3fn
    assert scale_inv.shape == (5, 3)
    back = dequantize_weight(values, scale_inv)
    for row, column in ((0, 0), (127, 128), (128, 127), (575, 299)):
        scale = float(scale_inv[row // 128, column // 128])
        assert float(back[row, column]) == float(values[row, column].float()) * scale
    torch.testing.assert_close(back, weight, rtol=2**-4, atol=float(scale_inv.max()) * 2**-10)


def test_each_weight_block_has_its_own_scale() -> None:
    weight = torch.ones(256, 256)
    weight[130, 5] = 448 * 16
    _, scale_inv = quantize_weight(weight)
    assert scale_inv.tolist() == [[2.0**-8, 2.0**-8], [16.0, 2.0**-8]]


def test_weight_scales_need_not_be_powers_of_two() -> None:
    weight = ALL_CODES[:96].view(8, 12)
    back = dequantize_weight(weight, torch.tensor([[0.3]]))
    assert torch.equal(back, weight.float() * torch.tensor(0.3))


def test_wrong_number_of_weight_scales_is_refused() -> None:
    values, _ = quantize_weight(torch.randn(576, 256))
    with pytest.raises(ValueError, match=r"scale_inv is \[4, 2\].*\[576, 256\] has \[5, 2\]"):
        dequantize_weight(values, torch.ones(4, 2))


def test_scales_are_plain_fp32() -> None:
    _, scales = quantize_blocks(torch.full((128,), 448.0))
    assert scales.view(torch.uint8).tolist() == list(struct.pack("<f", 1.0))
