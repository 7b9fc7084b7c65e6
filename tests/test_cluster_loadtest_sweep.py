import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.loadtest_sweep import Sweep


def _run(sweep: Sweep, knee: float) -> list[float]:
    """A server that keeps its promises up to `knee` requests a second."""
    rates = []
    while (rate := sweep.next_rate()) is not None:
        assert len(rates) < 50
        rates.append(rate)
        sweep.add(rate, 1.0 if rate <= knee else 0.5)
    return rates


def test_doubling_until_it_breaks_then_halving_the_gap() -> None:
    sweep = Sweep(1.0, 64.0, 0.9)
    assert _run(sweep, 5.2) == [1, 2, 4, 8, 6, 5, 5.5]
    assert sweep.knee == 5


def test_a_server_that_never_breaks_is_measured_up_to_the_highest_rate() -> None:
    sweep = Sweep(1.0, 6.0, 0.9)
    assert _run(sweep, 100) == [1, 2, 4, 6]
    assert sweep.knee == 6


def test_a_server_that_is_too_slow_for_the_lowest_rate_has_no_knee() -> None:
    sweep = Sweep(1.0, 6.0, 0.9)
    assert _run(sweep, 0.5) == [1]
    assert sweep.knee is None


def test_luck_above_a_bad_rate_does_not_count() -> None:
    sweep = Sweep(1.0, 8.0, 0.9, refinements=1)
    sweep.add(1.0, 1.0)
    sweep.add(2.0, 0.5)
    sweep.add(4.0, 1.0)
    assert sweep.knee == 1


@given(
    low=st.floats(0.1, 4), factor=st.floats(1, 50), knee=st.floats(0.05, 300), refinements=st.integers(0, 6)
)
def test_the_knee_is_found_to_within_the_last_gap(
    low: float, factor: float, knee: float, refinements: int
) -> None:
    sweep = Sweep(low, low * factor, 0.9, refinements)
    rates = _run(sweep, knee)
    assert all(low <= rate <= low * factor for rate in rates)
    if knee < low:
        assert sweep.knee is None
    elif knee >= low * factor:
        assert sweep.knee == pytest.approx(low * factor)
    else:
        assert sweep.knee is not None
        assert sweep.knee <= knee
        assert (
            knee - sweep.knee <= sweep.knee / 2**refinements + 1e-9
        )  # the gap was at most the last good rate
