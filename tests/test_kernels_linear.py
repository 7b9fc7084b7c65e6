"""Matrix products: right, and the bits of a row do not depend on the other rows."""

from collections.abc import Callable

import pytest
import torch

from kernels.reference import (
    dequantize_blocks,
    dequantize_weight,
    fp8_linear,
    head_linear,
    linear,
    prepare_fp8_weight,
    quantize_blocks,
    quantize_weight,
)

Product = Callable[[torch.Tensor], torch.Tensor]


def make_linear(columns: int, rows: int) -> Product:
    weight = torch.randn(rows, columns)
    return lambda x: linear(x, weight)


def make_fp8_linear(columns: int, rows: int) -> Product:
    weight = prepare_fp8_weight(*quantize_weight(torch.randn(rows, columns)))
    return lambda x: fp8_linear(x, weight)


def make_head_linear(columns: int, rows: int) -> Product:
    weight = torch.randn(3, columns, rows)
    return lambda x: head_linear(x.unsqueeze(1).expand(-1, 3, -1), weight)


@pytest.mark.parametrize("make", [make_linear, make_fp8_linear, make_head_linear])
@pytest.mark.parametrize("shape", [(128, 4), (256, 576), (512, 64), (1536, 33)])
def test_bits_of_a_row_do_not_depend_on_the_batch(
    make: Callable[[int, int], Product], shape: tuple[int, int]
) -> None:
    product = make(*shape)
    x = torch.randn(150, shape[0])
    whole = product(x)
    for start in (0, 1, 7, 16, 33, 149):
        for count in (1, 2, 3, 5, 8, 15, 16, 17, 31, 64, 100):
            assert torch.equal(product(x[start : start + count]), whole[start : start + count]), (
                start,
                count,
            )


def test_a_row_of_nan_spoils_no_other() -> None:
    x = torch.randn(20, 128)
    weight = torch.randn(8, 128)
    clean = linear(x, weight)
    x[3] = torch.nan
    spoilt = linear(x, weight)
    assert spoilt[3].isnan().all()
    assert torch.equal(spoilt[[0, 1, 2, *range(4, 20)]], clean[[0, 1, 2, *range(4, 20)]])


def test_linear_agrees_with_float64() -> None:
    x, weight = torch.randn(70, 512), torch.randn(96, 512)
    torch.testing.assert_close(
        linear(x, weight).double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4
    )


def test_linear_keeps_the_dtype_and_accumulates_in_fp32() -> None:
    x, weight = torch.ones(2, 4096, dtype=torch.bfloat16), torch.ones(3, 4096, dtype=torch.bfloat16)
    x[:, 0] = 256
    out = linear(x, weight)
    assert out.dtype == torch.bfloat16
    assert out.float().unique().tolist() == [float(torch.tensor(4095.0 + 256).bfloat16())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_linear_multiplies_quantised_activations_and_weights(dtype: torch.dtype) -> None:
    x = torch.randn(9, 384).to(dtype)
    values, scale_inv = quantize_weight(torch.randn(576, 384))
    out = fp8_linear(x, prepare_fp8_weight(values, scale_inv))
    x64, weight64 = (
        dequantize_blocks(*quantize_blocks(x)).double(),
        dequantize_weight(values, scale_inv).double(),
    )
    assert out.dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(out.double(), x64 @ weight64.T, rtol=rtol, atol=1e-3)
    assert not torch.equal(out, linear(x, dequantize_weight(values, scale_inv)))  # x was quantised


def test_fp8_linear_promotes_after_each_block_of_128_channels() -> None:
    """Block by block with the scales applied outside, as the FP8 units do it: powers of two make it the same."""
    x = torch.randn(5, 256) * torch.tensor([1.0, 1e-3]).repeat_interleave(128)
    values, scale_inv = quantize_weight(torch.randn(128, 256) * 0.02)
    x_values, x_scales = quantize_blocks(x)
    expected = torch.zeros(5, 128, dtype=torch.float64)
    for block in range(2):
        columns = slice(128 * block, 128 * block + 128)
        partial = x_values[:, columns].double() @ values[:, columns].double().T
        expected += partial * x_scales[:, block, None].double() * scale_inv[0, block].double()
    out = fp8_linear(x, prepare_fp8_weight(values, scale_inv))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_head_linear_gives_each_head_its_matrix() -> None:
    x, weight = torch.randn(21, 5, 48), torch.randn(5, 48, 32)
    out = head_linear(x, weight)
    expected = torch.einsum("tha,hab->thb", x.double(), weight.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


def test_no_rows() -> None:
    assert linear(torch.empty(0, 128), torch.randn(4, 128)).shape == (0, 4)
