"""Packing by the Triton back end: the bytes and sums of the reference, whatever the sizes, and nothing written where a sum is wrong."""

from types import ModuleType

import pytest
import torch
from exact_interpreter import prepare

from kernels import reference
from kernels.testing import LAYOUTS

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LAYERS, PAGES = (61, 300) if ON_GPU else (4, 9)
FP8 = LAYOUTS["fp8"]
KINDS = {"latent": (64, FP8.latent_row_bytes), "index": (FP8.index_page_bytes,)}


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    prepare()
    from kernels import triton_ops

    return triton_ops


def random_pages(kind: str) -> torch.Tensor:
    return torch.randint(0, 256, (LAYERS, PAGES, *KINDS[kind]), dtype=torch.uint8, device=DEVICE)


@pytest.mark.parametrize("count", [1, 4, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_bytes_and_sums_are_those_of_the_reference(ops: ModuleType, kind: str, count: int) -> None:
    pages = random_pages(kind)
    page_ids = torch.randperm(PAGES)[:count].tolist()
    buffer, sums = ops.pack_pages(pages, (1, 3), page_ids)
    expected, expected_sums = reference.pack_pages(pages, (1, 3), page_ids)
    assert torch.equal(buffer, expected)
    assert torch.equal(sums, expected_sums)
    assert torch.equal(ops.checksums(expected.view(2 * count, -1)), expected_sums)


@pytest.mark.parametrize("kind", KINDS)
def test_only_pages_with_the_right_sum_are_written(ops: ModuleType, kind: str) -> None:
    source = random_pages(kind)
    buffer, sums = reference.pack_pages(source, (0, 3), [3, 0])
    buffer[buffer.numel() * 5 // 6 - 1] ^= 1  # the last byte of the fifth of six pages
    mine, theirs = (torch.full_like(source, 7) for _ in range(2))
    right = ops.unpack_pages(buffer, sums, mine, (0, 3), [8, 2])
    assert right.tolist() == [True, True, True, True, False, True]
    assert torch.equal(right, reference.unpack_pages(buffer, sums, theirs, (0, 3), [8, 2]))
    assert torch.equal(mine, theirs)


def test_what_does_not_fit_is_refused(ops: ModuleType) -> None:
    pages = random_pages("index")
    buffer, sums = ops.pack_pages(pages, (0, 2), [0, 1])
    with pytest.raises(ValueError, match="3 checksums for 4 pages"):
        ops.unpack_pages(buffer, sums[:-1], pages, (0, 2), [0, 1])
    empty, nothing = ops.pack_pages(pages, (0, 2), [])
    assert (
        empty.numel() == nothing.numel() == ops.unpack_pages(empty, nothing, pages, (0, 2), []).numel() == 0
    )


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")
def test_caches_beyond_two_to_the_31(ops: ModuleType) -> None:
    pages = torch.zeros(61, 1000, 64, FP8.latent_row_bytes, dtype=torch.uint8, device=DEVICE)
    pages[60, 999] = torch.randint(0, 256, pages.shape[2:], dtype=torch.uint8, device=DEVICE)
    buffer, sums = ops.pack_pages(pages, (59, 61), [5, 999])
    assert torch.equal(buffer.view(2, 2, *pages.shape[2:])[1, 1], pages[60, 999])
    assert ops.unpack_pages(buffer, sums, pages, (59, 61), [7, 998]).all()
    assert torch.equal(pages[60, 998], pages[60, 999])
