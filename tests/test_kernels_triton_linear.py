"""The dense operators of the Triton back end against the reference: on the CPU through Triton's interpreter, small; on a GPU
at the sizes of the model.
"""

from types import ModuleType

import pytest
import torch
from exact_interpreter import prepare

from kernels import reference
from kernels.dispatch import QuantizedRows
from kernels.testing import difference

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = 1e-5  # bf16 outputs: half of (2^-9)^2 and room for products that fall to the other side

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, where hardware gives infinity or NaN
gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")]


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    prepare()
    from kernels import triton_ops

    return triton_ops


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape)).to(dtype).to(DEVICE)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    bits = [x.new_empty(x.shape).copy_(x).view(torch.uint8) for x in (actual, expected)]
    assert torch.equal(*bits)


def assert_same_rows(actual: QuantizedRows, expected: QuantizedRows) -> None:
    """The values may differ where the numbers that were quantised differ in their last bit."""
    assert actual.dtype == expected.dtype
    assert actual.scales.shape == expected.scales.shape
    back = [reference.dequantize_blocks(rows.values, rows.scales.contiguous()) for rows in (actual, expected)]
    assert difference(*back) < TOLERANCE


# Quantisers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 3, 256), (7, 200), (1, 128), (0, 128)])
def test_blocks_have_the_bits_of_the_reference(
    ops: ModuleType, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = random(*shape, dtype=dtype) * torch.logspace(-6, 6, shape[-1], device=DEVICE).to(dtype)
    for actual, expected in zip(ops.quantize_blocks(x), reference.quantize_blocks(x), strict=True):
        assert_same_bits(actual, expected)
    values, scales = ops.quantize_blocks(x)
    assert_same_bits(ops.dequantize_blocks(values, scales), reference.dequantize_blocks(values, scales))


def test_edges_of_the_scales(ops: ModuleType) -> None:
    edges = [0.0, 5e-5, 1e-4, 448.0, 448.00003, 447.99997, 448 * 2.0**-20, 448 * 2.0**60, 3e38, 2.0**-140]
    x = torch.zeros(len(edges), 128, device=DEVICE)
    x[:, 17] = torch.tensor(edges)
    x[:, 18] = torch.tensor(edges) * -0.7
    for actual, expected in zip(ops.quantize_blocks(x), reference.quantize_blocks(x), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_block_and_no_other(ops: ModuleType, bad: float) -> None:
    x = random(2, 384, dtype=torch.float32)
    x[1, 130] = bad
    values, scales = ops.quantize_blocks(x)
    assert scales[1, 1] == torch.inf
    back = reference.dequantize_blocks(values, scales)
    assert back[1, 128:256].isnan().all()
    assert back.isnan().sum() == 128


@pytest.mark.parametrize("shape", [(576, 300), (64, 128), (130, 131)])
def test_weights_have_the_bits_of_the_reference(ops: ModuleType, shape: tuple[int, int]) -> None:
    weight = random(*shape, dtype=torch.float32)
    values, scales = ops.quantize_weight(weight)
    for actual, expected in zip((values, scales), reference.quantize_weight(weight), strict=True):
        assert_same_bits(actual, expected)
    assert_same_bits(ops.dequantize_weight(values, scales), reference.dequantize_weight(values, scales))
    with pytest.raises(ValueError, match="scale_inv is "):
        ops.dequantize_weight(values, scales[:-1])


# Products


def fp8_weight(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.quantize_weight(random(rows, columns, dtype=torch.float32, scale=columns**-0.5))


SHAPES = [(1, 576, 256), (17, 64, 200), (66, 100, 384)]
MODEL_SHAPES = [
    pytest.param((rows, *matrix), marks=gpu)
    for matrix in ((7168, 16384), (24576, 1536), (2240, 7168), (7168, 2048), (576, 7168))
    for rows in (1, 7, 16, 33, 64, 100, 129, 130, 1001)
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, *MODEL_SHAPES])
def test_fp8_linear(ops: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_rows, num_columns, channels = shape
    x, weight = random(num_rows, channels, dtype=dtype), fp8_weight(num_columns, channels)
    prepared = ops.prepare_fp8_weight(*weight)
    out = ops.fp8_linear(x, prepared)
    expected = reference.fp8_linear(x, reference.prepare_fp8_weight(*weight))
    assert out.shape == expected.shape
    assert out.dtype == dtype
    assert difference(out, expected) < TOLERANCE
    assert torch.equal(ops.fp8_linear(x, prepared), out)
    rows = QuantizedRows(*reference.quantize_blocks(x), dtype)
    assert torch.equal(ops.fp8_linear(rows, prepared), out)


def test_fp8_linear_promotes_after_each_block_of_128_channels(ops: ModuleType) -> None:
    x = random(5, 256, dtype=torch.float32) * torch.tensor([1.0, 1e-3], device=DEVICE).repeat_interleave(128)
    weight = fp8_weight(128, 256)
    expected = reference.fp8_linear(x, reference.prepare_fp8_weight(*weight))
    out = ops.fp8_linear(x, ops.prepare_fp8_weight(*weight))
    assert difference(out, expected) < 1e-7  # FP8 units sum with 14 bits


def test_no_rows(ops: ModuleType) -> None:
    prepared = ops.prepare_fp8_weight(*fp8_weight(256, 128))
    assert ops.fp8_linear(random(0, 128), prepared).shape == (0, 256)


def test_wrong_number_of_scales_is_refused(ops: ModuleType) -> None:
    values, scales = fp8_weight(576, 256)
    with pytest.raises(ValueError, match=r"scale_inv is \[4, 2\].*\[576, 256\] has \[5, 2\]"):
        ops.prepare_fp8_weight(values, scales[:4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_products_sum_in_fp32(ops: ModuleType, dtype: torch.dtype) -> None:
    x, weight = random(33, 4096, dtype=dtype), random(72, 4096, dtype=dtype)
    expected = x.double() @ weight.double().T
    assert difference(ops.linear(x, weight), expected) < (1e-12 if dtype == torch.float32 else TOLERANCE)


@pytest.mark.parametrize("num_rows", [1, 20, pytest.param(1000, marks=gpu)])
@pytest.mark.parametrize("weight_dtype", [torch.float32, pytest.param(torch.bfloat16, marks=gpu)])
def test_bf16_activations_lose_nothing(ops: ModuleType, num_rows: int, weight_dtype: torch.dtype) -> None:
    x, weight = random(num_rows, 1100), random(70, 1100, dtype=weight_dtype)
    expected = x.double() @ weight.double().T
    assert difference(ops.linear(x, weight, torch.float32), expected) < 1e-12
    assert difference(ops.linear(x, weight), expected) < TOLERANCE
    assert ops.linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("num_rows", [1, 5, pytest.param(100, marks=gpu)])
def test_head_linear_takes_a_view_of_the_heads(ops: ModuleType, num_rows: int) -> None:
    x, weight = random(num_rows, 6, 192)[..., :128], random(6, 128, 512, scale=0.1)
    out = ops.head_linear(x, weight)
    assert out.is_contiguous()
    assert difference(out, reference.head_linear(x, weight)) < TOLERANCE


# Norms and activations


def views(num_rows: int, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two parts of one product."""
    fused = random(num_rows, 2 * channels + 128, dtype=dtype)
    return fused[:, 128 : 128 + channels], fused[:, 128 + channels :]


WIDTHS = [(3, 512), (2, 1536), (5, 200), (1, 1), pytest.param((100, 7168), marks=gpu)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", WIDTHS)
def test_norms(ops: ModuleType, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = views(*shape, dtype)
    weight = random(shape[1], dtype=torch.float32) + 2
    close = 1e-12 if dtype == torch.float32 else TOLERANCE
    assert difference(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)) < close
    normed, total, rows = ops.add_rms_norm_quantized(x, residual, weight, 1e-6)
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert difference(normed, expected) < close
    assert_same_bits(total, expected_total)
    plain, plain_total = ops.add_rms_norm(x, residual, weight, 1e-6)
    assert difference(plain, expected) < close
    assert_same_bits(plain_total, expected_total)
    values, scales = reference.quantize_blocks(normed)
    assert_same_bits(rows.values, values)
    assert_same_bits(rows.scales, scales)
    assert rows.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 512), (5, 200), pytest.param((1000, 2048), marks=gpu)])
def test_swiglu(ops: ModuleType, shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate, up = views(*shape, dtype)
    out, expected = ops.swiglu(gate, up), reference.swiglu(gate, up)
    assert out.dtype == dtype
    assert difference(out, expected) < (1e-12 if dtype == torch.float32 else TOLERANCE)
    rows = ops.swiglu_quantized(gate, up)
    values, scales = reference.quantize_blocks(out)
    assert_same_bits(rows.values, values)
    assert_same_bits(rows.scales, scales)


def test_swiglu_far_from_zero(ops: ModuleType) -> None:
    gate = torch.tensor([[-200.0, 200.0, -0.0, 88.0, -88.0]], device=DEVICE)
    expected = reference.swiglu(gate, torch.ones_like(gate))
    torch.testing.assert_close(ops.swiglu(gate, torch.ones_like(gate)), expected, atol=1e-30, rtol=1e-6)


def test_a_row_whose_channels_are_apart_is_refused(ops: ModuleType) -> None:
    with pytest.raises(ValueError, match="the last stride"):
        ops.rms_norm(random(128, 4).T, random(128, dtype=torch.float32), 1e-6)
