"""Packing by the Triton back end against the reference, bit for bit: small through the interpreter, on a GPU at true sizes."""

from types import ModuleType

import pytest
import torch
from exact_interpreter import prepare

from kernels import reference

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
LATENT, INDEX = (64, 656), (8448,)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's: sums are meant to overflow
gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")]
PLACES = [
    (LATENT, 4, 7, (1, 3), [6, 0, 2]),
    (INDEX, 4, 7, (0, 4), [3]),
    ((32,), 2, 3, (0, 2), [1, 2]),
    *(
        pytest.param(paged, 5, 2100, (1, 4), list(range(2050, 7, -3)), marks=gpu, id=f"large-{paged[0]}")
        for paged in (LATENT, INDEX)
    ),
]
places = pytest.mark.parametrize(("paged", "num_layers", "num_pages", "layers", "page_ids"), PLACES)


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    prepare()
    from kernels import triton_ops

    return triton_ops


def random_pages(num_layers: int, num_pages: int, paged: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(0, 256, (num_layers, num_pages, *paged), dtype=torch.uint8, device=DEVICE)


@places
def test_same_payload_and_checksums(
    ops: ModuleType,
    paged: tuple[int, ...],
    num_layers: int,
    num_pages: int,
    layers: tuple[int, int],
    page_ids: list[int],
) -> None:
    pages = random_pages(num_layers, num_pages, paged)
    payload = ops.pack_pages(pages, layers, page_ids)
    assert torch.equal(payload, reference.pack_pages(pages, layers, page_ids))
    rows = pages.flatten(2).flatten(0, 1)
    assert torch.equal(ops.checksums(rows), reference.checksums(rows))


@places
def test_only_right_pages_are_written_and_nothing_else(
    ops: ModuleType,
    paged: tuple[int, ...],
    num_layers: int,
    num_pages: int,
    layers: tuple[int, int],
    page_ids: list[int],
) -> None:
    """Wrong are the first page, by a byte of its own, and the last one, by a byte of its checksum."""
    source, target = (random_pages(num_layers, num_pages, paged) for _ in range(2))
    expected = target.clone()
    payload = reference.pack_pages(source, layers, page_ids)
    payload[0] ^= 1
    payload[-1] ^= 128
    places = page_ids[::-1]
    wrong = ops.unpack_pages(payload, target, layers, places)
    assert torch.equal(wrong, reference.unpack_pages(payload, expected, layers, places))
    assert wrong.nonzero().flatten().tolist() == [0, len(wrong) - 1]
    assert torch.equal(target, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")
def test_pages_beyond_2_to_the_31() -> None:
    """More than 2^31 words of pages and, in bytes, of payload: 3 layers of 80,000 latent pages, 10 GB."""
    from kernels import triton_ops

    pages = torch.zeros(3, 80_000, *LATENT, dtype=torch.uint8, device=DEVICE)
    ids = list(range(79_999, 79_999 - 26_000, -1))
    pages[1:, ids] = torch.randint(0, 256, (2, len(ids), *LATENT), dtype=torch.uint8, device=DEVICE)
    payload = triton_ops.pack_pages(pages, (1, 3), ids)
    count, page_bytes = 2 * len(ids), pages[0, 0].numel()
    assert torch.equal(payload[: count * page_bytes].view(2, len(ids), *LATENT), pages[1:, ids])
    landed = torch.zeros_like(pages)
    assert not triton_ops.unpack_pages(payload, landed, (1, 3), ids).any()
    assert torch.equal(landed, pages)


def test_no_pages_and_what_does_not_fit(ops: ModuleType) -> None:
    pages = random_pages(2, 3, INDEX)
    payload = ops.pack_pages(pages, (0, 2), [])
    assert payload.numel() == len(ops.checksums(pages[:0, 0])) == 0
    assert not len(ops.unpack_pages(payload, pages, (0, 2), []))
    payload = ops.pack_pages(pages, (0, 2), [0, 1])
    with pytest.raises(ValueError, match="33823 bytes, but 4 pages with their checksums take 33824"):
        ops.unpack_pages(payload[:-1], pages, (0, 2), [0, 1])
    with pytest.raises(ValueError, match="a page has 12 bytes"):
        ops.pack_pages(random_pages(1, 1, (12,)), (0, 1), [0])
