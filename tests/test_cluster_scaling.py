"""How many workers there should be: rules for any load, and a whole day of it."""

import asyncio
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
from day_of_load import DAY_S, TICK_S, requests_per_second
from hypothesis import given

from cluster.config import ConfigError, load
from cluster.controller import QUEUE_S, PrefixCacheController
from cluster.figures import BusyMeter, decode_figures, prefill_figures
from cluster.scaling import (
    SLACK,
    DecodeFigures,
    DecodePolicy,
    Limits,
    PrefillFigures,
    PrefillPolicy,
    Target,
    decide,
    decode_load,
    prefill_load,
)
from workers.messages import Load

LIMITS = Limits(min_workers=1, max_workers=12, lower_after_s=300)
SHARES = st.floats(0, 1)
LOADS = st.floats(0, 30)
PREFILLS = st.builds(
    PrefillFigures,
    queued_tokens=st.integers(0, 10**7),
    seconds_per_token=st.floats(0, 0.01),
    busy_share=SHARES,
)
DECODES = st.builds(DecodeFigures, page_share=SHARES, place_share=SHARES, step_seconds=st.floats(0, 1))


@st.composite
def _limits(draw: st.DrawFn) -> Limits:
    least = draw(st.integers(1, 5))
    return Limits(
        min_workers=least,
        max_workers=draw(st.integers(least, 20)),
        lower_after_s=draw(st.sampled_from([0.0, 60.0, 300.0])),
    )


@given(LOADS, LOADS, _limits(), st.integers(0, 30), st.none() | st.floats(0, 999), st.integers(0, 30))
def test_any_decision_is_within_its_limits_and_grows_with_the_load(
    load: float, more: float, limits: Limits, current: int, since: float | None, num_measured: int
) -> None:
    target = Target(workers=current, lower_since=since)
    fewer, others = (
        decide(each, target, limits, 1000.0, num_measured=num_measured) for each in (load, load + more)
    )
    assert limits.min_workers <= fewer.workers <= others.workers <= limits.max_workers
    if limits.min_workers <= current <= limits.max_workers:
        assert fewer.workers >= current - 1
    if num_measured < current <= limits.max_workers:
        assert fewer.workers >= current


@given(st.lists(PREFILLS, min_size=1, max_size=6), PREFILLS, st.data())
def test_load_grows_with_whatever_a_prefill_worker_measures(
    figures: list[PrefillFigures], growth: PrefillFigures, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(figures) - 1))
    name = data.draw(st.sampled_from(["queued_tokens", "busy_share"]))
    grown = list(figures)
    grown[at] = replace(grown[at], **{name: max(getattr(grown[at], name), getattr(growth, name))})
    goals = {"wait_goal_s": 1.0, "busy_goal": 0.8}
    assert prefill_load(grown, **goals) >= prefill_load(figures, **goals)


@given(st.lists(DECODES, max_size=6), DECODES, st.data())
def test_load_grows_with_whatever_a_decode_worker_measures(
    figures: list[DecodeFigures], growth: DecodeFigures, data: st.DataObject
) -> None:
    goals: dict[str, Any] = {"share_goal": 0.8, "step_goal_s": data.draw(st.sampled_from([None, 0.05]))}
    assert decode_load([*figures, growth], **goals) >= decode_load(figures, **goals)
    assert decode_load(figures, **goals) >= decode_load(figures, share_goal=0.8, step_goal_s=None)


@given(st.floats(0, 12), _limits(), st.integers(1, 20))
def test_a_constant_load_makes_workers_come_or_go_but_never_both(
    work: float, limits: Limits, start: int
) -> None:
    """work: in workers that are busy all the time; those there are share it."""
    target = Target(workers=max(limits.min_workers, min(limits.max_workers, start)))
    counts = [target.workers]
    for tick in range(2000):
        busy = min(1.0, work / target.workers)
        figures = [PrefillFigures(queued_tokens=0, seconds_per_token=0.0, busy_share=busy)] * target.workers
        load = prefill_load(figures, wait_goal_s=1.0, busy_goal=0.8)
        target = decide(load, target, limits, TICK_S * tick, num_measured=target.workers)
        counts.append(target.workers)
    assert counts in (sorted(counts), sorted(counts, reverse=True))
    assert counts[-1000:] == [counts[-1]] * 1000
    if limits.min_workers < counts[-1]:
        assert counts[-1] <= work / 0.8 * (1 + SLACK) + 1 + 1e-6
    if counts[-1] < limits.max_workers:
        assert counts[-1] >= work / 0.8 - 1e-6


def test_what_waits_for_decode_workers_calls_no_prefill_workers() -> None:
    idle = PrefillFigures(queued_tokens=10**6, seconds_per_token=1e-3, busy_share=0.1)
    assert prefill_load([idle, idle], wait_goal_s=1.0, busy_goal=0.8) == pytest.approx(0.25)
    busy = replace(idle, busy_share=1.0)
    assert prefill_load([busy, busy], wait_goal_s=100.0, busy_goal=0.8) == pytest.approx(10.0)


def test_none_goes_while_others_are_on_their_way() -> None:
    target = Target(workers=4)
    for now in range(0, 3600, 10):
        target = decide(0.5, target, LIMITS, now, num_measured=3)
    assert target == Target(workers=4)


class _Day:
    """Workers that take START_S to come, work that waits for them, and how many there were."""

    START_S = 120.0

    def __init__(self) -> None:
        self.now = 0.0
        self.counts: list[int] = []
        self.starting: list[float] = []
        self.running = 1
        self.target = Target(workers=1)

    def scale(self, load: float) -> None:
        self.target = decide(load, self.target, LIMITS, self.now, num_measured=self.running)
        self.now += TICK_S
        self.running = min(self.running, self.target.workers)
        missing = self.target.workers - self.running - len(self.starting)
        self.starting += [self.now + self.START_S] * missing
        self.running += sum(at <= self.now for at in self.starting)
        self.starting = [at for at in self.starting if at > self.now]
        self.counts.append(self.target.workers)

    @property
    def num_changes(self) -> int:
        return sum(a != b for a, b in zip(self.counts, self.counts[1:], strict=False))

    @property
    def worker_hours(self) -> float:
        return sum(self.counts) * TICK_S / 3600


def test_a_day_of_prompts_is_read_in_time_by_far_fewer_than_the_peak_needs() -> None:
    tokens_a_request, seconds_per_token = 2000, 1e-4  # a worker reads 5 requests a second
    day, queued, waits = _Day(), 0.0, []
    for rate in requests_per_second():
        arrived = rate * tokens_a_request * TICK_S
        can = day.running * TICK_S / seconds_per_token
        done = min(queued + arrived, can)
        queued += arrived - done
        waits.append(queued * seconds_per_token / day.running)
        figures = PrefillFigures(
            queued_tokens=queued, seconds_per_token=seconds_per_token, busy_share=done / can
        )
        day.scale(prefill_load([figures] * day.running, wait_goal_s=5.0, busy_goal=0.8))
    assert len(day.counts) * TICK_S == DAY_S
    assert sorted(waits)[int(0.95 * len(waits))] < 5.0
    assert day.worker_hours < 0.5 * 24 * max(day.counts)
    assert day.num_changes < 120


def test_a_day_of_streams_finds_pages_with_far_fewer_than_the_peak_needs() -> None:
    stream_s, streams_a_worker = 20.0, 64
    day, streams, refused, asked = _Day(), 0.0, 0.0, 0.0
    for rate in requests_per_second():
        wanted = streams * (1 - TICK_S / stream_s) + rate * TICK_S
        streams = min(wanted, day.running * streams_a_worker)
        refused, asked = refused + wanted - streams, asked + rate * TICK_S
        share = streams / (day.running * streams_a_worker)
        figures = DecodeFigures(page_share=share, place_share=share, step_seconds=0.03)
        day.scale(decode_load([figures] * day.running, share_goal=0.8, step_goal_s=0.05))
    assert refused < 0.02 * asked
    assert day.worker_hours < 0.5 * 24 * max(day.counts)
    assert day.num_changes < 120


def _context(names: dict[str, dict[str, float]], *, workers: int, state: dict[str, Any], now: float) -> Any:
    metrics = {"ray_serve_running_requests": {"replica": 3.0}, **names}
    return SimpleNamespace(
        aggregated_metrics=metrics, target_num_replicas=workers, policy_state=state, current_time=now
    )


def test_serve_asks_a_policy_and_keeps_its_memory() -> None:
    policy = DecodePolicy(share_goal=0.5, step_goal_s=0.1, min_workers=1, max_workers=4, lower_after_s=60)
    full = {"page_share": {"a": 1.0}, "place_share": {"a": 0.2}, "step_seconds": {"a": 0.15}}
    assert policy(_context(full, workers=1, state={}, now=0.0)) == (2, {"lower_since": None})
    idle = {name: {"a": 0.0, "b": 0.0} for name in full}
    workers, state = policy(_context(idle, workers=2, state={}, now=100.0))
    assert (workers, state) == (2, {"lower_since": 100.0})
    assert policy(_context(idle, workers=2, state=state, now=159.0)) == (2, state)
    assert policy(_context(idle, workers=2, state=state, now=160.0)) == (1, {"lower_since": 160.0})
    half_told = {"page_share": {"a": 0.0, "b": 0.0}, "place_share": {"a": 0.0}, "step_seconds": {"a": 0.0}}
    assert policy(_context(half_told, workers=2, state=state, now=160.0))[0] == 2
    assert policy(_context({}, workers=2, state={}, now=0.0))[0] == 2

    prefill = PrefillPolicy(wait_goal_s=2.0, busy_goal=0.8, min_workers=1, max_workers=9, lower_after_s=60)
    queue = {"queued_tokens": {"a": 100_000.0}, "seconds_per_token": {"a": 1e-4}, "busy_share": {"a": 1.0}}
    assert prefill(_context(queue, workers=1, state={}, now=0.0))[0] == 5


def test_figures_come_from_what_workers_measure() -> None:
    load = Load(free_pages=20, cached_pages=20, held_pages=60, running=3, waiting=1, max_running=8)
    assert decode_figures(load) == DecodeFigures(page_share=0.6, place_share=0.5, step_seconds=0.0)
    assert decode_figures(Load()).page_share == 0.0
    figures = prefill_figures(Load(seconds_per_token=0.25), 77, 0.5)
    assert figures == PrefillFigures(queued_tokens=77, seconds_per_token=0.25, busy_share=0.5)
    meter = BusyMeter(100.0)
    assert meter.share(2.0, 110.0) == pytest.approx(0.2)
    assert meter.share(7.0, 120.0) == pytest.approx(0.5)
    assert meter.share(30.0, 130.0) == 1.0  # a step of 20 s that began before the last look


def test_the_controller_adds_up_what_waits_at_gateways_that_still_say_so(tmp_path: Path) -> None:
    now = 0.0

    async def body() -> list[int]:
        nonlocal now
        controller = PrefixCacheController(f"sqlite:///{tmp_path}/ledger.db", "secret", clock=lambda: now)
        sums = [await controller.queued_tokens()]
        await controller.queue("one", 500)
        await controller.queue("two", 70)
        await controller.queue("one", 300)
        sums.append(await controller.queued_tokens())
        now = QUEUE_S / 2
        await controller.queue("two", 80)
        now = QUEUE_S + 0.1
        sums.append(await controller.queued_tokens())
        await controller.close()
        return sums

    assert asyncio.run(body()) == [0, 370, 80]


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"decode.workers is 3, .* scaling.decode allows 1 to 2"):
        load(None, ["decode.workers=3", "scaling.decode={max_workers: 2}"])
    with pytest.raises(ConfigError, match=r"scaling.prefill.*busy_goal"):
        load(None, ["scaling.prefill={max_workers: 2, busy_goal: 1.5}"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of pydantic, about Ray
def test_serve_can_load_a_policy_where_the_project_is_not(tmp_path: Path) -> None:
    """Its controller is a process of its own, started before the application's code is known."""
    from cluster.app import autoscaling  # Ray takes a while to import

    config = load(None, ["scaling.prefill={max_workers: 3}", "scaling.decode={max_workers: 2}"])
    assert autoscaling("prefill", load()) is None
    for role, names in (("prefill", PrefillFigures), ("decode", DecodeFigures)):
        scaling = autoscaling(role, config)  # type: ignore[arg-type]
        assert scaling is not None
        assert (scaling.min_replicas, scaling.initial_replicas) == (1, 1)
        metrics = {name: {"a": 1.0} for name in names.__dataclass_fields__}
        script = (
            "import pickle, sys, types\n"
            "policy, kwargs, metrics = pickle.load(sys.stdin.buffer)\n"
            "context = types.SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=1, policy_state={}, current_time=0)\n"
            "assert not any(name.startswith('cluster') for name in sys.modules)\n"
            "print(pickle.loads(policy)(**kwargs)(context)[0])"
        )
        sent = pickle.dumps(
            (scaling.policy.get_serialized_policy_def(), scaling.policy.policy_kwargs, metrics)
        )
        found = subprocess.run(
            [sys.executable, "-c", script], input=sent, capture_output=True, cwd=tmp_path, check=True
        )
        assert int(found.stdout) == 2
