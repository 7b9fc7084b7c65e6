"""The interface of back ends and how they are chosen."""

import inspect
import logging
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from kernels import dispatch, reference
from kernels.dispatch import BACK_ENDS, OPERATORS, Ops, Sizes, choose, select
from kernels.testing import LAYOUTS

SIZES = Sizes(heads=16, index_heads=4, topk=64, layout=LAYOUTS["fp8"])
MISSING = "no_such_package"


def test_reference_is_the_default() -> None:
    assert select() is select("reference") is reference


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no back end is called 'trition'; there are .*reference"):
        select("trition")


@pytest.mark.parametrize("name", sorted(BACK_ENDS))
def test_back_ends_have_operators_with_the_parameters_of_the_interface(name: str) -> None:
    back_end = pytest.importorskip(BACK_ENDS[name])
    assert set(back_end.__all__) <= set(OPERATORS)
    for operator in back_end.__all__:
        wanted = list(inspect.signature(getattr(Ops, operator)).parameters)[1:]
        assert list(inspect.signature(getattr(back_end, operator)).parameters) == wanted, operator


def test_reference_exports_the_operators_and_nothing_else() -> None:
    assert sorted(reference.__all__) == sorted(OPERATORS)
    assert all(getattr(reference, operator).__doc__ for operator in OPERATORS)


def test_importing_the_interface_loads_no_back_end() -> None:
    program = f"import sys, {dispatch.__name__}; sys.exit('kernels.reference' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


# Choosing


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """A triton that has all but top_k, and a flash_mla with attention for 128 heads and the linear layers."""
    triton, flash_mla = ModuleType("fake_triton"), ModuleType("fake_flash_mla")
    has = {triton: set(OPERATORS) - {"top_k"}, flash_mla: {"sparse_mla", "prepare_fp8_weight", "fp8_linear"}}
    for module, operators in has.items():
        monkeypatch.setitem(sys.modules, module.__name__, module)
        module.__dict__.update({operator: object() for operator in operators}, __all__=sorted(operators))

    def misfits(device: torch.device, sizes: Sizes) -> dict[str, str]:
        return {} if sizes.heads == 128 else {"sparse_mla": f"takes 128 heads, not {sizes.heads}"}

    flash_mla.__dict__["misfits"] = misfits
    for name, module in {"triton": triton, "flash_mla": flash_mla}.items():
        monkeypatch.setitem(BACK_ENDS, name, module.__name__)
    return {"triton": triton, "flash_mla": flash_mla, "reference": reference}


def sources(ops: Ops, fakes: dict[str, ModuleType]) -> dict[str, str]:
    """Operator -> the back end it came from."""
    return {
        operator: name
        for operator in OPERATORS
        for name, module in fakes.items()
        if getattr(ops, operator) is getattr(module, operator, None)
    }


def test_a_cpu_has_the_reference(fakes: dict[str, ModuleType]) -> None:
    assert set(sources(choose("cpu", SIZES), fakes).values()) == {"reference"}


def test_unquantised_caches_have_the_reference(fakes: dict[str, ModuleType]) -> None:
    unquantised = Sizes(heads=128, index_heads=64, topk=64, layout=LAYOUTS["fp32"])
    assert set(sources(choose("cuda", unquantised), fakes).values()) == {"reference"}


def test_a_gpu_has_the_best_that_fits(fakes: dict[str, ModuleType]) -> None:
    large = sources(choose("cuda:0", Sizes(128, 64, 2048, LAYOUTS["fp8"])), fakes)
    assert {operator for operator, name in large.items() if name == "flash_mla"} == set(
        fakes["flash_mla"].__all__
    )
    assert {operator for operator, name in large.items() if name == "reference"} == {"top_k"}
    small = sources(choose("cuda:0", SIZES), fakes)
    assert small == large | {"sparse_mla": "triton"}


def test_what_is_not_installed_is_passed_over_unless_it_was_asked_for(
    fakes: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACK_ENDS, "flash_mla", MISSING)
    monkeypatch.setattr(dispatch, "OPTIONAL_PACKAGES", {MISSING})
    assert sources(choose("cuda", SIZES), fakes)["fp8_linear"] == "triton"
    for wanted in ("flash_mla", "triton,fp8_linear=flash_mla"):
        with pytest.raises(ImportError, match=MISSING):
            choose("cuda", SIZES, wanted)


def test_what_is_broken_is_an_error(fakes: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACK_ENDS, "flash_mla", MISSING)
    with pytest.raises(ImportError, match=MISSING):
        choose("cuda", SIZES)


def test_one_back_end_for_everything_it_has(fakes: dict[str, ModuleType]) -> None:
    assert set(sources(choose("cuda", SIZES, "reference"), fakes).values()) == {"reference"}
    wanted = sources(choose("cuda", SIZES, "triton"), fakes)
    assert {operator for operator, name in wanted.items() if name != "triton"} == {"top_k"}


def test_one_operator_from_one_back_end(fakes: dict[str, ModuleType]) -> None:
    wanted = sources(choose("cuda", SIZES, "sparse_mla=reference, triton"), fakes)
    assert {operator for operator, name in wanted.items() if name != "triton"} == {"top_k", "sparse_mla"}


@pytest.mark.parametrize(
    ("device", "wanted", "message"),
    [
        ("cpu", "triton", "back end 'triton' needs a CUDA device and quantised caches"),
        ("cuda", "flash_mla", "'flash_mla' has no sparse_mla here: takes 128 heads, not 16"),
        ("cuda", "top_k=triton", "'triton' has no top_k"),
        ("cuda", "topk=triton", "no operator is called 'topk'; there are .*top_k"),
        ("cuda", "trition", "no back end is called 'trition'"),
        ("cuda", "fp8_linear=triton", "prepare_fp8_weight and fp8_linear must come from one back end"),
    ],
)
def test_what_cannot_be_is_refused(
    fakes: dict[str, ModuleType], device: str, wanted: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose(device, SIZES, wanted)


def test_the_choice_is_logged_as_one_table(
    fakes: dict[str, ModuleType], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        choose("cuda:1", SIZES)
    (record,) = caplog.records
    title, *lines = record.getMessage().split("\n")
    assert title == "kernels on cuda:1"
    assert [line.split()[0] for line in lines] == ["flash_mla", "triton", "reference", "not"]
    assert lines[-1] == "  not from flash_mla: sparse_mla: takes 128 heads, not 16"
