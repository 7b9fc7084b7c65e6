"""Problems for sparse MLA, prefill and decode, with FlashMLA beside it."""

import functools
from collections.abc import Iterator

import torch

import kernels.reference as reference
from kernels.bench_cases import LAYOUT, Maker, Problem, Setting
from kernels.bench_timing import Call
from kernels.testing import SOFTMAX_SCALE, Case, difference, make_case, random_slots, spread_slots

DIM = LAYOUT.latent_dim + LAYOUT.rope_dim
HEAD_DIM = 128  # of keys without position and of values
CHECKED_ROWS = 16


def problems(setting: Setting) -> Iterator[Maker]:
    if setting.small:
        yield functools.partial(_prefill, setting, heads=4, topk=64, num_rows=8, context=200)
        yield functools.partial(_expanded, setting, heads=4, topk=64, num_rows=200)
        yield functools.partial(_decode, setting, heads=4, topk=64, batch=2, requests=4, context=128)
        return
    for context in (32 * 1024, 128 * 1024):
        yield functools.partial(_prefill, setting, heads=128, topk=2048, num_rows=4096, context=context)
    for num_rows in (2048, 4096, 8192):
        yield functools.partial(_expanded, setting, heads=128, topk=2048, num_rows=num_rows)
    for batch in (1, 16, 64, 128):
        yield functools.partial(
            _decode, setting, heads=128, topk=2048, batch=batch, requests=128, context=8192
        )


def _prefill(setting: Setting, *, heads: int, topk: int, num_rows: int, context: int) -> Problem:
    case = make_case(
        [context], [num_rows], heads=heads, dtype=setting.dtype, device=str(setting.device), kinds=("latent",)
    )
    slots = spread_slots(case, topk, seed=0)
    calls = setting.calls(
        "sparse_mla", lambda ops, _: ops.sparse_mla(case.q, case.latent_pages, slots, SOFTMAX_SCALE, LAYOUT)
    )
    if setting.flash_mla:
        calls["FlashMLA"] = _flash_prefill(setting, case, slots)
    return Problem(
        operator="sparse_mla prefill",
        shape=f"{num_rows} x {context}",
        flop=_flop(num_rows, heads, topk),
        flop_kind="bf16",
        bytes=_row_bytes(num_rows, heads, topk) + min(context, num_rows * topk) * LAYOUT.latent_row_bytes,
        calls=calls,
        sets=1,  # its queries alone exceed any cache
        error=functools.partial(_error, case.q, case.latent_pages, slots),
    )


def _expanded(setting: Setting, *, heads: int, topk: int, num_rows: int) -> Problem:
    """All rows of a prompt, with the heads' own matrices; beside it the same over latents, which is the reference's way."""
    case = make_case(
        [num_rows], [num_rows], dtype=setting.dtype, device=str(setting.device), kinds=("latent",)
    )
    generator = torch.Generator(setting.device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=setting.device, dtype=setting.dtype)

    nope, pe = normal(num_rows, heads, HEAD_DIM), normal(num_rows, heads, LAYOUT.rope_dim)
    key_up = normal(heads, HEAD_DIM, LAYOUT.latent_dim) * 0.05
    value_up = normal(heads, LAYOUT.latent_dim, HEAD_DIM) * 0.05
    slots = random_slots(case, topk, seed=0)
    arguments = (case.latent_pages, case.rows, slots, key_up, value_up, SOFTMAX_SCALE, LAYOUT)
    calls = setting.calls("expanded_mla", lambda ops, _: ops.expanded_mla(nope, pe, *arguments))
    ours = next(iter(setting.having("expanded_mla").values()))

    def over_latents(_: int) -> torch.Tensor:
        query = torch.cat((ours.head_linear(nope, key_up), pe), dim=-1)
        out, _lse = ours.sparse_mla(query, case.latent_pages, slots, SOFTMAX_SCALE, LAYOUT)
        return ours.head_linear(out, value_up)

    calls["over latents"] = over_latents
    pairs = num_rows * (num_rows + 1) / 2
    return Problem(
        operator="expanded_mla",
        shape=f"{num_rows} of {num_rows}",
        flop=2 * heads * (2 * HEAD_DIM + LAYOUT.rope_dim) * pairs,
        flop_kind="bf16",
        bytes=_row_bytes(num_rows, heads, topk),
        calls=calls,
        sets=1,
        error=lambda out: difference(out, over_latents(0)),
    )


def _decode(setting: Setting, *, heads: int, topk: int, batch: int, requests: int, context: int) -> Problem:
    """Rows of different requests take turns, so that what they read has left the cache."""
    case = make_case(
        [context] * requests,
        [1] * requests,
        heads=heads,
        dtype=setting.dtype,
        device=str(setting.device),
        kinds=("latent",),
    )
    sets = setting.sets(batch * topk * LAYOUT.latent_row_bytes)
    slots, queries = [], []
    for number in range(sets):
        rows = [(number * batch + row) % requests for row in range(batch)]
        slots.append(spread_slots(case, topk, seed=number)[rows].contiguous())
        queries.append(case.q[rows].contiguous())
    calls = setting.calls(
        "sparse_mla",
        lambda ops, i: ops.sparse_mla(queries[i], case.latent_pages, slots[i], SOFTMAX_SCALE, LAYOUT),
    )
    if setting.flash_mla:
        calls["FlashMLA"] = _flash_decode(setting, queries, case.latent_pages, slots)
    return Problem(
        operator="sparse_mla decode",
        shape=f"batch {batch}",
        flop=_flop(batch, heads, topk),
        flop_kind="bf16",
        bytes=_row_bytes(batch, heads, topk) + batch * topk * LAYOUT.latent_row_bytes,
        calls=calls,
        sets=sets,
        error=functools.partial(_error, queries[0], case.latent_pages, slots[0]),
    )


def _flop(rows: int, heads: int, topk: int) -> float:
    return 2 * rows * heads * (DIM + LAYOUT.latent_dim) * topk


def _row_bytes(rows: int, heads: int, topk: int) -> float:
    """Queries, outputs and log-sum-exp, and the list of slots."""
    return rows * (heads * (2 * DIM + 2 * LAYOUT.latent_dim + 4) + 4 * topk)


def _flash_prefill(setting: Setting, case: Case, slots: torch.Tensor) -> Call:
    """Its latents are bf16 and lie in order: nothing is gathered or dequantised."""
    assert setting.flash_mla is not None
    package = setting.flash_mla
    latents = case.latents().bfloat16().unsqueeze(1)
    places = case.places(slots).unsqueeze(1)
    return lambda _: package.flash_mla_sparse_fwd(case.q, latents, places, SOFTMAX_SCALE)[::2]


def _flash_decode(
    setting: Setting, queries: list[torch.Tensor], latent_pages: torch.Tensor, slots: list[torch.Tensor]
) -> Call:
    assert setting.flash_mla is not None
    package = setting.flash_mla
    schedule = package.get_mla_metadata()[0]

    def call(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = package.flash_mla_with_kvcache(
            queries[number].unsqueeze(1),
            latent_pages.unsqueeze(2),
            None,
            None,
            LAYOUT.latent_dim,
            schedule,
            softmax_scale=SOFTMAX_SCALE,
            is_fp8_kvcache=True,
            indices=slots[number].unsqueeze(1),
        )
        return out.squeeze(1), lse.squeeze(2)

    return call


def _error(
    q: torch.Tensor,
    latent_pages: torch.Tensor,
    slots: torch.Tensor,
    result: tuple[torch.Tensor, torch.Tensor],
) -> float:
    """Of a few rows, the larger of output and log-sum-exp."""
    rows = torch.linspace(0, len(q) - 1, min(len(q), CHECKED_ROWS), device=q.device).long()
    expected = reference.sparse_mla(q[rows].float(), latent_pages, slots[rows], SOFTMAX_SCALE, LAYOUT)
    return max(difference(actual[rows], wanted) for actual, wanted in zip(result, expected, strict=True))
