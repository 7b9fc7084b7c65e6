"""Limits a minute: never more than the limit and one burst in any window."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.limits import MINUTE_S, Bucket, Quota, Refusal, TenantLimits

GAPS = st.lists(st.tuples(st.floats(0, 30), st.integers(1, 60)), min_size=1, max_size=60)


@given(st.integers(1, 100), GAPS)
def test_no_window_lets_in_more_than_limit_and_burst(limit: int, asked: list[tuple[float, int]]) -> None:
    bucket = Bucket(limit, 0.0)
    taken: list[tuple[float, int]] = []
    for now, (_, amount) in zip(accumulate(gap for gap, _ in asked), asked, strict=True):
        if bucket.wait_s(amount, now) == 0:
            bucket.take(amount, now)
            taken.append((now, amount))
    for first, (start, _) in enumerate(taken):
        let_in = 0
        for end, amount in taken[first:]:
            let_in += amount
            assert let_in <= limit + limit * (end - start) / MINUTE_S + 1e-6


@given(
    st.integers(1, 100),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 60), st.floats(0, 1)), max_size=40),
)
def test_what_is_used_and_reserved_stays_within_the_limit(
    limit: int, asked: list[tuple[float, int, float]]
) -> None:
    """Each request ends, having used a share of what it reserved, when the next one comes."""
    quota = Quota(TenantLimits(tokens_per_minute=limit), 0.0)
    now, spent = 0.0, 0
    for gap, amount, share in asked:
        now += gap
        if quota.reserve(amount, now) is None:
            used = int(amount * share)
            assert spent + amount <= limit + limit * now / MINUTE_S + 1e-6
            quota.correct(amount, used, now)
            spent += used


@given(st.integers(1, 1000), st.integers(1, 1000), st.floats(0, 100))
def test_whoever_waits_as_told_is_let_in(limit: int, amount: int, now: float) -> None:
    bucket = Bucket(limit, 0.0)
    bucket.take(min(amount, limit), now)
    wait_s = bucket.wait_s(amount, now)
    if amount > limit:
        assert wait_s is None
    else:
        assert wait_s is not None
        if wait_s > 0.01:
            early = bucket.wait_s(amount, now + wait_s - 0.01)
            assert early is not None
            assert early > 0
        later = bucket.wait_s(amount, now + wait_s)
        assert later is not None
        assert later < 1e-6


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = Bucket(60, 100.0)
    bucket.take(60, 100.0)
    assert bucket.wait_s(1, 50.0) == pytest.approx(1.0)
    assert bucket.wait_s(1, 100.0) == pytest.approx(1.0)


def test_a_quota_names_the_limit_that_is_reached() -> None:
    quota = Quota(TenantLimits(requests_per_minute=2, tokens_per_minute=100, concurrency=1), 0.0)
    assert quota.enter(0.0) is None
    assert quota.enter(0.0) == Refusal(limit="concurrency", value=1, wait_s=1.0)
    quota.leave()
    assert quota.enter(0.0) is None
    quota.leave()
    assert quota.enter(0.0) == Refusal(limit="requests_per_minute", value=2, wait_s=30.0)
    assert quota.reserve(60, 0.0) is None
    assert quota.reserve(60, 0.0) == Refusal(limit="tokens_per_minute", value=100, wait_s=pytest.approx(12.0))
    assert quota.reserve(101, 0.0) == Refusal(limit="tokens_per_minute", value=100, wait_s=None)
    standing = quota.standings(0.0)
    assert (standing["requests"].remaining, standing["requests"].reset_s) == (0, 60.0)
    assert (standing["tokens"].remaining, standing["tokens"].reset_s) == (40, pytest.approx(36.0))
    quota.correct(60, 10, 0.0)
    assert quota.standings(0.0)["tokens"].remaining == 90


def test_a_request_that_was_refused_for_concurrency_costs_none() -> None:
    quota = Quota(TenantLimits(requests_per_minute=2, concurrency=1), 0.0)
    assert quota.enter(0.0) is None
    for _ in range(5):
        assert quota.enter(0.0) is not None
    quota.leave()
    assert quota.enter(0.0) is None


def test_other_limits_while_requests_run() -> None:
    quota = Quota(TenantLimits(requests_per_minute=1, concurrency=1), 0.0)
    assert quota.enter(0.0) is None
    quota.change(TenantLimits(requests_per_minute=1, concurrency=2), 0.0)
    refusal = quota.enter(0.0)
    assert refusal is not None
    assert refusal.limit == "requests_per_minute", "an unchanged limit stays used up"
    quota.change(TenantLimits(concurrency=2), 0.0)
    assert quota.enter(0.0) is None
    assert quota.running == 2
    assert quota.standings(0.0) == {}


def test_each_gateway_has_its_share() -> None:
    limits = TenantLimits(requests_per_minute=100, concurrency=1)
    assert limits.share(3) == TenantLimits(requests_per_minute=34, concurrency=1)
    assert limits.share(1) == limits
