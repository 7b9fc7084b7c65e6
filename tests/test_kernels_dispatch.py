"""The interface of back ends and how one is chosen."""

import inspect
import subprocess
import sys

import pytest

from kernels import dispatch, reference
from kernels.dispatch import BACK_ENDS, Ops, select

OPERATORS = [name for name in vars(Ops) if not name.startswith("_")]


def test_reference_is_the_default() -> None:
    assert select() is select("reference") is reference


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no back end is called 'trition'; there are .*reference"):
        select("trition")


@pytest.mark.parametrize("name", sorted(BACK_ENDS))
def test_back_ends_have_the_operators_and_their_parameters(name: str) -> None:
    back_end = pytest.importorskip(BACK_ENDS[name])
    for operator in OPERATORS:
        wanted = list(inspect.signature(getattr(Ops, operator)).parameters)[1:]
        assert list(inspect.signature(getattr(back_end, operator)).parameters) == wanted, operator


def test_reference_exports_the_operators_and_nothing_else() -> None:
    assert sorted(reference.__all__) == sorted(OPERATORS)
    assert all(getattr(reference, operator).__doc__ for operator in OPERATORS)


def test_importing_the_interface_loads_no_back_end() -> None:
    program = f"import sys, {dispatch.__name__}; sys.exit('kernels.reference' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
