"""Attention with expanded heads of the Triton back end against the reference, which attends over latents."""

from types import ModuleType

import pytest
import torch
from exact_interpreter import prepare

from kernels import reference
from kernels.testing import LAYOUTS, SOFTMAX_SCALE, Case, difference, make_case, random_slots

FP8 = LAYOUTS["fp8"]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = 5e-5  # of bf16 keys, values, weights and outputs
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where hardware gives NaN
gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="there is no CUDA device")]


@pytest.fixture(scope="module")
def ops() -> ModuleType:
    prepare()
    from kernels import triton_ops

    return triton_ops


class Heads:
    """Queries of a case's rows and the matrices of their heads, nope and v channels wide, in bf16."""

    def __init__(self, case: Case, heads: int, width: int) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16)

        self.case = case
        self.nope = normal(len(case.q), heads, width + 64)[..., :width]  # strided, as a projection's part is
        self.pe = normal(len(case.q), heads, 64)
        self.key_up = normal(heads, width, 512) * 0.1
        self.value_up = normal(heads, 512, width) * 0.05

    def attend(self, ops: ModuleType, slots: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        nope, pe, key_up, value_up = (x.to(dtype) for x in (self.nope, self.pe, self.key_up, self.value_up))
        case = self.case
        return ops.expanded_mla(
            nope, pe, case.latent_pages, case.rows, slots, key_up, value_up, SOFTMAX_SCALE, FP8
        )


def picks(case: Case, topk: int) -> torch.Tensor:
    slots = random_slots(case, topk, seed=0)
    return slots.masked_fill(slots < 0, 2**31 - 1)  # another number of no slot than -1


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("contexts", "queries", "heads", "width", "topk"),
    [
        ([200, 70, 1], [150, 3, 1], 2, 32, 64),
        ([64], [64], 1, 16, 64),
        pytest.param([2500, 300, 900], [2100, 5, 600], 128, 128, 2048, marks=gpu),
        pytest.param([5000], [700], 128, 128, 2048, marks=gpu),
        pytest.param([8192], [520], 16, 128, 2048, marks=gpu),
    ],
)
def test_agrees(
    ops: ModuleType, contexts: list[int], queries: list[int], heads: int, width: int, topk: int, masked: bool
) -> None:
    case = make_case(contexts, queries, dtype=torch.bfloat16, device=DEVICE, kinds=("latent",))
    made, slots = Heads(case, heads, width), picks(case, topk) if masked else None
    out = made.attend(ops, slots, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    expected = made.attend(reference, slots, torch.float32)
    assert difference(out, expected) < TOLERANCE
    assert torch.equal(out, made.attend(ops, slots, torch.bfloat16))


def test_requests_share_pages(ops: ModuleType) -> None:
    """A prefix that two requests have in common lies at the same place in both."""
    case = make_case([200, 180], [9, 5], dtype=torch.bfloat16, device=DEVICE, kinds=("latent",))
    case.rows.page_table[1, :2] = case.rows.page_table[0, :2]
    made, slots = Heads(case, 2, 32), picks(case, 64)
    out = made.attend(ops, slots, torch.bfloat16)
    assert difference(out, made.attend(reference, slots, torch.float32)) < TOLERANCE


def test_other_widths_are_refused(ops: ModuleType) -> None:
    case = make_case([64], [1], dtype=torch.bfloat16, device=DEVICE, kinds=("latent",))
    with pytest.raises(ValueError, match="nope is 24"):
        Heads(case, 1, 24).attend(ops, None, torch.bfloat16)
