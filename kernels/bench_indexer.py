"""Problems for the indexer, scores and top-k as one operator, with DeepGEMM's scores and torch.topk beside it."""

import functools
from collections.abc import Iterator

import torch

import kernels.reference as reference
from kernels.bench_cases import LAYOUT, Maker, Problem, Setting
from kernels.bench_timing import Call
from kernels.dispatch import Ops
from kernels.layout import PAGE_SIZE
from kernels.testing import REFERENCE, Case, make_case

POOL_TOKENS = 2**20  # cached at least, so that rows of different requests take turns
CHECKED_ROWS = 4


def problems(setting: Setting) -> Iterator[Maker]:
    if setting.small:
        yield functools.partial(_prefill, setting, heads=4, topk=64, num_rows=8, context=200)
        yield functools.partial(_decode, setting, heads=4, topk=64, batch=2, context=128, pool=512)
        return
    for context in (8 * 1024, 32 * 1024, 128 * 1024):
        yield functools.partial(_prefill, setting, heads=64, topk=2048, num_rows=2048, context=context)
    for context in (8 * 1024, 32 * 1024, 128 * 1024):
        for batch in (1, 32, 128):
            yield functools.partial(
                _decode, setting, heads=64, topk=2048, batch=batch, context=context, pool=POOL_TOKENS
            )


def _prefill(setting: Setting, *, heads: int, topk: int, num_rows: int, context: int) -> Problem:
    case = _case(setting, [context], [num_rows], heads)
    pairs = num_rows * (2 * context - num_rows + 1) / 2  # of a row and a token that it sees
    calls = setting.calls("select_tokens", functools.partial(_select, [case], topk))
    if setting.deep_gemm:
        calls["DeepGEMM + torch.topk"] = _deep_gemm_prefill(setting, case, topk)
    return Problem(
        operator="select_tokens prefill",
        shape=f"{num_rows} x {context}",
        flop=2 * heads * LAYOUT.index_dim * pairs,
        flop_kind="fp8",
        bytes=_row_bytes(num_rows, heads, topk) + context * LAYOUT.index_page_bytes / PAGE_SIZE,
        calls=calls,
        sets=1,
        error=functools.partial(_missed, case, topk),
    )


def _decode(setting: Setting, *, heads: int, topk: int, batch: int, context: int, pool: int) -> Problem:
    requests = max(batch, pool // context)
    everything = _case(setting, [context] * requests, [1] * requests, heads)
    num_bytes = batch * context * LAYOUT.index_page_bytes / PAGE_SIZE
    sets = min(setting.sets(num_bytes), max(1, requests // batch))
    cases = [everything.only(range(number * batch, (number + 1) * batch)) for number in range(sets)]
    calls = setting.calls("select_tokens", functools.partial(_select, cases, topk))
    if setting.deep_gemm:
        calls["DeepGEMM + torch.topk"] = _deep_gemm_decode(setting, cases, topk)
    return Problem(
        operator="select_tokens decode",
        shape=f"{batch} x {context}",
        flop=2 * heads * LAYOUT.index_dim * batch * context,
        flop_kind="fp8",
        bytes=_row_bytes(batch, heads, topk) + num_bytes,
        calls=calls,
        sets=sets,
        error=functools.partial(_missed, cases[0], topk),
    )


def _case(setting: Setting, contexts: list[int], queries: list[int], heads: int) -> Case:
    device = str(setting.device)
    return make_case(
        contexts, queries, heads=1, index_heads=heads, dtype=setting.dtype, device=device, kinds=("index",)
    )


def _select(cases: list[Case], topk: int, ops: Ops, number: int) -> torch.Tensor:
    case = cases[number]
    return ops.select_tokens(case.index_q, case.index_weights, case.index_pages, case.rows, topk, LAYOUT)


def _row_bytes(rows: int, heads: int, topk: int) -> float:
    """Queries, their weights, and the slots."""
    return rows * (heads * (2 * LAYOUT.index_dim + 4) + 4 * topk)


def _folded(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries as e4m3, and the weights with their scales in them."""
    values, scales = reference.quantize_blocks(case.index_q)
    return values, (case.index_weights * scales.squeeze(-1)).contiguous()


def _deep_gemm_prefill(setting: Setting, case: Case, topk: int) -> Call:
    """Its queries are FP8 already, and its keys lie in order."""
    assert setting.deep_gemm is not None
    package = setting.deep_gemm
    values, weights = _folded(case)
    pages = case.index_pages[case.rows.page_table[0].long()]
    key_bytes = PAGE_SIZE * LAYOUT.index_key_bytes
    keys = pages[:, :key_bytes].reshape(-1, LAYOUT.index_dim).view(torch.float8_e4m3fn)
    scales = pages[:, key_bytes:].view(torch.float32).flatten()
    ends = (case.rows.positions + 1).int()
    starts = torch.zeros_like(ends)

    def call(_: int) -> torch.Tensor:
        logits = package.fp8_mqa_logits(values, (keys, scales), weights, starts, ends, clean_logits=True)
        return logits.topk(topk, dim=1, sorted=False).indices

    return call


def _deep_gemm_decode(setting: Setting, cases: list[Case], topk: int) -> Call:
    """All rows see equally many tokens, so that nothing is masked."""
    assert setting.deep_gemm is not None
    package = setting.deep_gemm
    folded = [_folded(case) for case in cases]
    lengths = [(case.rows.positions + 1).int().unsqueeze(1) for case in cases]
    context = cases[0].rows.page_table.shape[1] * PAGE_SIZE
    schedule = package.get_paged_mqa_logits_metadata(lengths[0], PAGE_SIZE, package.get_num_sms())
    pages = cases[0].index_pages.view(len(cases[0].index_pages), PAGE_SIZE, 1, -1)

    def call(number: int) -> torch.Tensor:
        values, weights = folded[number]
        logits = package.fp8_paged_mqa_logits(
            values.unsqueeze(1),
            pages,
            weights,
            lengths[number],
            cases[number].rows.page_table,
            schedule,
            context,
        )
        return logits.topk(topk, dim=1, sorted=False).indices

    return call


def _missed(case: Case, topk: int, result: torch.Tensor) -> float:
    """Of a few rows, the share of the reference's selection that is not in the result. Peers give positions, not slots."""
    step = max(1, len(case.q) // CHECKED_ROWS)
    numbers = list(range(0, len(case.q), step))[:CHECKED_ROWS]
    part = case.only(numbers)
    expected = _select([part], topk, REFERENCE, 0)
    actual = result[numbers]
    if actual.dtype == torch.int64:
        tables = part.rows.page_table[part.rows.owners]
        actual = tables.gather(1, actual // PAGE_SIZE) * PAGE_SIZE + actual % PAGE_SIZE
    shared = sum(int(torch.isin(a, e[e >= 0]).sum()) for a, e in zip(actual, expected, strict=True))
    return 1 - shared / int((expected >= 0).sum())
