"""Problems for operators that only move bytes: packing pages for shipping, with plain PyTorch beside them."""

import functools
from collections.abc import Iterator

import torch

import kernels.reference as reference
from kernels.bench_cases import LAYOUT, Maker, Problem, Setting
from kernels.testing import Numbers

PACKED_BYTES = 64 * 2**20


def problems(setting: Setting) -> Iterator[Maker]:
    layers, pages = (2, 8) if setting.small else (4, 4096)
    shipped = 4 if setting.small else PACKED_BYTES // (layers * LAYOUT.latent_page_bytes)
    yield functools.partial(_pack, setting, layers=layers, num_pages=pages, shipped=shipped)


def _pack(setting: Setting, *, layers: int, num_pages: int, shipped: int) -> Problem:
    """Latent pages of all layers, in random order; the next set of pages for every call."""
    numbers = Numbers(0, setting.device)
    page = (layers, num_pages, 64, LAYOUT.latent_row_bytes)
    pages = numbers.codes(*page).view(torch.uint8)
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0)).tolist()
    sets = num_pages // shipped
    page_ids = [order[number * shipped : (number + 1) * shipped] for number in range(sets)]
    calls = setting.calls("pack_pages", lambda ops, i: ops.pack_pages(pages, (0, layers), page_ids[i]))
    if setting.device.type == "cuda":
        calls["torch"] = lambda i: reference.pack_pages(pages, (0, layers), page_ids[i])
    packed = layers * shipped * LAYOUT.latent_page_bytes
    return Problem(
        operator="pack_pages",
        shape=f"{layers} layers x {shipped} pages",
        flop=0,
        flop_kind="bf16",
        bytes=2 * packed,
        calls=calls,
        sets=sets,
        error=functools.partial(_pack_error, reference.pack_pages(pages, (0, layers), page_ids[0])),
        replayed=False,
    )


def _pack_error(
    expected: tuple[torch.Tensor, torch.Tensor], result: tuple[torch.Tensor, torch.Tensor]
) -> float:
    return float(not all(torch.equal(a, e) for a, e in zip(result, expected, strict=True)))
