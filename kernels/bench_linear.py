"""Problems for matrix products with block-FP8 weights: linear layers and routed experts, with DeepGEMM and torch beside them."""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import kernels.reference as reference
from kernels.bench_cases import Maker, Problem, Setting
from kernels.bench_timing import Call
from kernels.dispatch import Ops, QuantizedRows
from kernels.testing import ExpertsCase, LinearCase, difference, make_experts_case, make_linear_case

CHECKED_ROWS = 64
CHECKED_TOKENS = 4
TILE_ROWS = 128  # of DeepGEMM's grouped products
ROWS = (1, 16, 64, 128, 1024, 8192)
SHAPES = (
    (7168, 16384),
    (24576, 1536),
    (4096, 7168),
)  # out of attention, into its queries, the shared expert's first


def problems(setting: Setting) -> Iterator[Maker]:
    if setting.small:
        yield functools.partial(_linear, setting, rows=3, outputs=192, inputs=256)
        yield functools.partial(_experts, setting, tokens=5, experts=8, picks=2, channels=256, inner=128)
        return
    for outputs, inputs in SHAPES:
        for rows in ROWS:
            yield functools.partial(_linear, setting, rows=rows, outputs=outputs, inputs=inputs)
    for tokens in (32, 512, 8192):
        yield functools.partial(
            _experts, setting, tokens=tokens, experts=256, picks=8, channels=7168, inner=2048
        )


def _linear(setting: Setting, *, rows: int, outputs: int, inputs: int) -> Problem:
    num_bytes = outputs * inputs + rows * (inputs + 2 * outputs)
    sets = setting.sets(num_bytes)
    cases = [
        make_linear_case(rows, outputs, inputs, seed=n, dtype=setting.dtype, device=str(setting.device))
        for n in range(sets)
    ]
    calls = dict[str, Call]()
    quantize = next(iter(setting.having("swiglu_quantized").values()))
    quantized = [_quantized(quantize, case) for case in cases]
    for name, ops in setting.having("fp8_linear").items():
        calls[name] = _fp8_linear(ops, cases, quantized)
    if setting.deep_gemm:
        calls["DeepGEMM"] = _deep_gemm_linear(setting, cases)
    if setting.device.type == "cuda" and rows > 1:  # it refuses one row
        calls["torch.scaled_mm"] = _scaled_mm(cases)
    return Problem(
        operator="fp8_linear",
        shape=f"{rows} x {inputs} -> {outputs}",
        flop=2 * rows * outputs * inputs,
        flop_kind="fp8",
        bytes=num_bytes,
        calls=calls,
        sets=sets,
        error=functools.partial(_linear_error, cases[0]),
    )


def _quantized(ops: Ops, case: LinearCase) -> QuantizedRows:
    """The rows as the back end's fused operators hand them to its products. A large gate makes silu the identity."""
    return ops.swiglu_quantized(torch.full_like(case.x, 64.0), case.x / 64)


def _fp8_linear(ops: Ops, cases: list[LinearCase], rows: list[QuantizedRows]) -> Call:
    weights = [ops.prepare_fp8_weight(case.weight, case.scale_inv) for case in cases]
    return lambda number: ops.fp8_linear(rows[number], weights[number])


def _aligned_scales(scales: torch.Tensor) -> torch.Tensor:
    """fp32 [M, K / 128] with its rows next to each other, every column from a multiple of 16 bytes on."""
    rows, blocks = scales.shape
    return F.pad(scales.T, (0, -rows % 4)).T[:rows]


def _deep_gemm_linear(setting: Setting, cases: list[LinearCase]) -> Call:
    assert setting.deep_gemm is not None
    package = setting.deep_gemm
    quantized = [reference.quantize_blocks(case.x) for case in cases]
    rows = [(values, _aligned_scales(scales)) for values, scales in quantized]
    out = cases[0].x.new_empty(len(cases[0].x), len(cases[0].weight), dtype=torch.bfloat16)

    def call(number: int) -> torch.Tensor:
        package.fp8_gemm_nt(rows[number], (cases[number].weight, cases[number].scale_inv), out)
        return out

    return call


def _scaled_mm(cases: list[LinearCase]) -> Call:
    """cuBLAS: scales of rows in columns, scales of the weight in rows padded to a multiple of four."""
    recipes = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    quantized = [reference.quantize_blocks(case.x) for case in cases]
    rows = [(values, scales.T.contiguous().T) for values, scales in quantized]
    pads = [-case.scale_inv.shape[1] % 4 for case in cases]
    columns = [F.pad(case.scale_inv, (0, pad)).T for case, pad in zip(cases, pads, strict=True)]

    def call(number: int) -> torch.Tensor:
        values, scales = rows[number]
        return F.scaled_mm(
            values,
            cases[number].weight.T,
            scales,
            recipes[0],
            columns[number],
            recipes[1],
            output_dtype=torch.bfloat16,
        )

    return call


def _linear_error(case: LinearCase, result: torch.Tensor) -> float:
    weight = reference.prepare_fp8_weight(case.weight, case.scale_inv)
    expected = reference.fp8_linear(case.x[:CHECKED_ROWS].float(), weight)
    return difference(result[:CHECKED_ROWS], expected)


def _experts(
    setting: Setting, *, tokens: int, experts: int, picks: int, channels: int, inner: int
) -> Problem:
    case = make_experts_case(
        tokens, experts, picks, channels, inner, seed=0, dtype=setting.dtype, device=str(setting.device)
    )
    calls = dict[str, Call]()
    for name, ops in setting.having("expert_mlp").items():
        calls[name] = _expert_mlp(ops, case)
    if setting.deep_gemm:
        calls["DeepGEMM products"] = _deep_gemm_experts(setting, case)
    touched = len(case.experts.unique())
    return Problem(
        operator="expert_mlp",
        shape=f"{tokens} tokens, {touched} of {experts} experts",
        flop=6 * tokens * picks * channels * inner,
        flop_kind="fp8",
        bytes=touched * 3 * channels * inner + tokens * channels * 6,
        calls=calls,
        sets=1,  # the experts alone exceed any cache
        error=functools.partial(_experts_error, case),
    )


def _expert_mlp(ops: Ops, case: ExpertsCase) -> Call:
    prepared = ops.prepare_experts(case.gate_up, case.gate_up_scale, case.down, case.down_scale)
    return lambda _: ops.expert_mlp(case.x, case.experts, case.weights, prepared)


def _deep_gemm_experts(setting: Setting, case: ExpertsCase) -> Call:
    """The two products alone, on rows that are quantised and in their places: each expert's in a block of whole tiles."""
    assert setting.deep_gemm is not None
    package, num_experts = setting.deep_gemm, len(case.down)
    counts = case.experts.flatten().bincount(minlength=num_experts)
    masked = int(counts.max()) <= TILE_ROWS
    blocks = (
        torch.full_like(counts, TILE_ROWS) if masked else (counts + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    )
    num_rows = int(blocks.sum())
    owners = torch.arange(num_experts, device=counts.device, dtype=torch.int32).repeat_interleave(blocks)
    expected = max(1, case.experts.numel() // num_experts)

    def product(channels: int, weight: torch.Tensor, scale: torch.Tensor) -> Callable[[], None]:
        rows = torch.randn(num_rows, channels, dtype=torch.bfloat16, device=counts.device)
        out = torch.empty(num_rows, weight.shape[1], dtype=torch.bfloat16, device=counts.device)
        quantized = reference.quantize_blocks(rows)
        if not masked:
            return lambda: package.m_grouped_fp8_gemm_nt_contiguous(quantized, (weight, scale), out, owners)
        values, scales, target = (part.unflatten(0, (num_experts, -1)) for part in (*quantized, out))
        return lambda: package.m_grouped_fp8_gemm_nt_masked(
            (values, scales), (weight, scale), target, counts.int(), expected
        )

    first = product(case.x.shape[1], case.gate_up.flatten(1, 2), case.gate_up_scale.flatten(1, 2))
    second = product(case.down.shape[2], case.down, case.down_scale)

    def call(_: int) -> None:
        first()
        second()

    return call


def _experts_error(case: ExpertsCase, result: torch.Tensor | None) -> float:
    """Of a few tokens, with the experts that they chose alone: all of them in fp32 would not fit."""
    if result is None:
        return float("nan")  # products alone, not the operator
    used, experts = case.experts[:CHECKED_TOKENS].unique(return_inverse=True)
    parts = (case.gate_up, case.gate_up_scale, case.down, case.down_scale)
    prepared = reference.prepare_experts(*(part[used] for part in parts))
    expected = reference.expert_mlp(
        case.x[:CHECKED_TOKENS].float(), experts, case.weights[:CHECKED_TOKENS], prepared
    )
    return difference(result[:CHECKED_TOKENS], expected)
