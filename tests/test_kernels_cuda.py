"""The reference back end gives on a CUDA device what it gives on the CPU."""

import pytest
import torch

from kernels import reference
from kernels.layout import CacheLayout
from kernels.testing import LAYOUTS, SOFTMAX_SCALE, Case, difference, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CONTEXTS, QUERIES = [1000, 65, 30], [40, 2, 30]


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def cases(request: pytest.FixtureRequest) -> tuple[Case, Case]:
    layout: CacheLayout = request.param
    cpu, cuda = (make_case(CONTEXTS, QUERIES, layout=layout, device=device) for device in ("cpu", "cuda"))
    return cpu, cuda


def test_caches_have_the_same_bytes(cases: tuple[Case, Case]) -> None:
    cpu, cuda = cases
    assert torch.equal(cuda.latent_pages.cpu(), cpu.latent_pages)
    assert torch.equal(cuda.index_pages.cpu(), cpu.index_pages)


def test_selections_are_the_same_but_for_rounding(cases: tuple[Case, Case]) -> None:
    cpu, cuda = (
        reference.select_tokens(
            case.index_q, case.index_weights, case.index_pages, case.rows, 64, case.layout
        )
        for case in cases
    )
    assert cuda.is_cuda
    differing = (cuda.cpu().sort().values != cpu.sort().values).any(1)
    assert int(differing.sum()) <= 2  # a score next to another at the border may fall on either side


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_attention_agrees(cases: tuple[Case, Case], kind: str) -> None:
    cpu, cuda = cases
    slots = reference.select_tokens(cpu.index_q, cpu.index_weights, cpu.index_pages, cpu.rows, 64, cpu.layout)

    def attend(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        if kind == "sparse":
            where = slots.to(case.q.device)
            return reference.sparse_mla(case.q, case.latent_pages, where, SOFTMAX_SCALE, case.layout)
        return reference.dense_mla(case.q, case.latent_pages, case.rows, SOFTMAX_SCALE, case.layout)

    for actual, expected in zip(attend(cuda), attend(cpu), strict=True):
        assert difference(actual.cpu(), expected) < 1e-9


def test_linear_layers_agree() -> None:
    x, weight = torch.randn(70, 256), torch.randn(576, 256)
    values, scale_inv = reference.quantize_weight(weight)
    on_cuda = reference.prepare_fp8_weight(values.cuda(), scale_inv.cuda())
    expected = reference.fp8_linear(x, reference.prepare_fp8_weight(values, scale_inv))
    assert difference(reference.fp8_linear(x.cuda(), on_cuda).cpu(), expected) < 1e-9
    heads = torch.randn(4, 64, 32)
    expected = reference.head_linear(x.view(70, 4, 64), heads)
    assert difference(reference.head_linear(x.view(70, 4, 64).cuda(), heads.cuda()).cpu(), expected) < 1e-9


def test_pages_travel_between_devices() -> None:
    source = torch.randint(0, 256, (3, 4, 64, 656), dtype=torch.uint8)
    target = torch.zeros_like(source, device="cuda")
    payload = reference.pack_pages(source, (0, 2), [3, 1])
    assert torch.equal(reference.pack_pages(source.cuda(), (0, 2), [3, 1]).cpu(), payload)
    assert not reference.unpack_pages(payload.cuda(), target, (0, 2), [0, 2]).any()
    assert torch.equal(target[:2, [0, 2]].cpu(), source[:2, [3, 1]])
