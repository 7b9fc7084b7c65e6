"""Problems for operators that only move bytes: packing pages for shipping and unpacking them, with plain PyTorch beside them.

PyTorch's index_select and index_copy move the same bytes without checksums.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch

import kernels.reference as reference
from kernels.bench_cases import LAYOUT, Maker, Problem, Setting
from kernels.bench_timing import Call
from kernels.testing import Numbers

PACKED_BYTES = 32 * 2**20
KINDS = {"latent": (64, LAYOUT.latent_row_bytes), "index": (LAYOUT.index_page_bytes,)}


def problems(setting: Setting) -> Iterator[Maker]:
    """Shipments of the usual size, then all pages of 128k tokens in 4 layers."""
    layers, pages = (2, 8) if setting.small else (4, 2048)
    for kind, paged in KINDS.items():
        shipped = PACKED_BYTES // (layers * _page_bytes(paged))
        for count in [4] if setting.small else [min(shipped, pages // 2), pages]:
            for make in (_pack, _unpack):
                yield functools.partial(make, setting, kind, layers=layers, num_pages=pages, shipped=count)


def _pack(setting: Setting, kind: str, *, layers: int, num_pages: int, shipped: int) -> Problem:
    """Pages of all layers, in random order; the next set of pages for every call."""
    pages, page_ids = _pages_and_sets(setting, kind, layers, num_pages, shipped)
    calls = setting.calls("pack_pages", lambda ops, i: ops.pack_pages(pages, (0, layers), page_ids[i]))
    if setting.device.type == "cuda":
        rows, numbers = pages.flatten(2).flatten(0, 1), _row_numbers(pages, page_ids)
        calls["index_select"] = lambda i: rows.index_select(0, numbers[i])
    expected = reference.pack_pages(pages, (0, layers), page_ids[0])
    return _problem(
        "pack_pages",
        kind,
        pages,
        page_ids,
        calls,
        lambda packed: float(not torch.equal(packed.flatten(), expected[: packed.numel()])),
    )


def _unpack(setting: Setting, kind: str, *, layers: int, num_pages: int, shipped: int) -> Problem:
    """Every payload goes back where it came from."""
    pages, page_ids = _pages_and_sets(setting, kind, layers, num_pages, shipped)
    expected = pages.clone()
    payloads = [reference.pack_pages(pages, (0, layers), ids) for ids in page_ids]
    calls = setting.calls(
        "unpack_pages", lambda ops, i: ops.unpack_pages(payloads[i], pages, (0, layers), page_ids[i])
    )
    if setting.device.type == "cuda":
        rows, numbers = pages.flatten(2).flatten(0, 1), _row_numbers(pages, page_ids)
        end = numbers[0].numel() * rows.shape[1]
        received = [payload[:end].view(-1, rows.shape[1]) for payload in payloads]
        calls["index_copy"] = lambda i: rows.index_copy_(0, numbers[i], received[i])
    return _problem(
        "unpack_pages",
        kind,
        pages,
        page_ids,
        calls,
        lambda result: float(
            not torch.equal(pages, expected) or (result.dtype == torch.bool and bool(result.any()))
        ),
    )


def _pages_and_sets(
    setting: Setting, kind: str, layers: int, num_pages: int, shipped: int
) -> tuple[torch.Tensor, list[list[int]]]:
    pages = Numbers(0, setting.device).codes(layers, num_pages, *KINDS[kind]).view(torch.uint8)
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0)).tolist()
    return pages, [order[number * shipped : (number + 1) * shipped] for number in range(num_pages // shipped)]


def _row_numbers(pages: torch.Tensor, page_ids: list[list[int]]) -> list[torch.Tensor]:
    layers = torch.arange(pages.shape[0], device=pages.device).unsqueeze(1) * pages.shape[1]
    return [(layers + torch.tensor(ids, device=pages.device)).flatten() for ids in page_ids]


def _problem(
    operator: str,
    kind: str,
    pages: torch.Tensor,
    page_ids: list[list[int]],
    calls: dict[str, Call],
    error: Callable[[torch.Tensor], float],
) -> Problem:
    layers, shipped = pages.shape[0], len(page_ids[0])
    return Problem(
        operator=operator,
        shape=f"{layers} layers x {shipped} {kind} pages",
        flop=0,
        flop_kind="bf16",
        bytes=2 * layers * shipped * _page_bytes(KINDS[kind]),
        calls=calls,
        sets=len(page_ids),
        error=error,
        replayed=False,  # page ids come from the host
    )


def _page_bytes(paged: tuple[int, ...]) -> int:
    return math.prod(paged)
