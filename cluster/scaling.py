"""How many workers of a role are wanted: pure functions of what the workers measured, and the policies that Serve asks.

Prefill workers are wanted for the prompt tokens that wait and for the share of the time that those there are compute; decode
workers for the pages and places that requests hold, and for the time of a step. Serve pickles this module by value into a
process of its own, so it imports nothing of the project.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SLACK = 0.15  # a worker goes only where the load could grow by so much and still need none


@dataclass(frozen=True, kw_only=True)
class PrefillFigures:
    """What one prefill worker measured. `queued_tokens` are those of the whole cluster, waiting at gateways included."""

    queued_tokens: float
    seconds_per_token: float  # 0: not measured yet
    busy_share: float  # of the time, spent in steps


@dataclass(frozen=True, kw_only=True)
class DecodeFigures:
    """What one decode worker measured."""

    page_share: float  # of its pages, held by requests
    place_share: float  # of max_running, taken or waited for
    step_seconds: float  # 0 when idle


@dataclass(frozen=True, kw_only=True)
class Limits:
    min_workers: int
    max_workers: int
    lower_after_s: float  # how long fewer workers must have been enough


@dataclass(frozen=True, kw_only=True)
class Target:
    """How many there should be. `lower_since`: since when fewer would have been enough; None: they would not."""

    workers: int
    lower_since: float | None = None


def prefill_load(figures: Sequence[PrefillFigures], *, wait_goal_s: float, busy_goal: float) -> float:
    """In workers: what their busy time is worth, and what it takes to compute all that waits within `wait_goal_s`.

    Tokens that wait while prefill workers are not busy wait for decode workers.
    """
    by_time = sum(each.busy_share for each in figures) / busy_goal
    if by_time < len(figures) or not figures:
        return by_time
    rates = [each.seconds_per_token for each in figures if each.seconds_per_token]
    seconds_per_token = sum(rates) / len(rates) if rates else 0.0
    backlog_s = max(each.queued_tokens for each in figures) * seconds_per_token
    return max(backlog_s / wait_goal_s, by_time)


def decode_load(figures: Sequence[DecodeFigures], *, share_goal: float, step_goal_s: float | None) -> float:
    """In workers: the sum of what each is worth by its pages, its places or its steps, whichever is most."""

    def of_one(each: DecodeFigures) -> float:
        shares = [each.page_share / share_goal, each.place_share / share_goal]
        return max(shares if step_goal_s is None else [*shares, each.step_seconds / step_goal_s])

    return sum(map(of_one, figures))


def decide(load: float, target: Target, limits: Limits, now: float, *, num_measured: int) -> Target:
    """More workers at once, as many as the load is worth; fewer one by one, each after `lower_after_s` in which they were
    enough with SLACK. So a constant load, however near to a limit, does not make workers come and go.

    num_measured: whose load it is; while some are still on their way, their share of it is not known, and none goes
    """

    def bounded(workers: int) -> int:
        return max(limits.min_workers, min(limits.max_workers, workers))

    current = bounded(target.workers)
    wanted = bounded(_ceil(load))
    if wanted > current:
        return Target(workers=wanted)
    if num_measured < current or bounded(_ceil(load * (1 + SLACK))) >= current:
        return Target(workers=current)
    since = now if target.lower_since is None else target.lower_since
    if now - since < limits.lower_after_s:
        return Target(workers=current, lower_since=since)
    return Target(workers=current - 1, lower_since=now)


def _ceil(load: float) -> int:
    return math.ceil(load - 1e-9)  # the sum of shares that fit exactly must not need one more


class _Policy:
    """What Serve asks now and then. Its answer, and its memory from one question to the next, are as Serve wants them."""

    def __init__(self, *, min_workers: int, max_workers: int, lower_after_s: float) -> None:
        self._limits = Limits(min_workers=min_workers, max_workers=max_workers, lower_after_s=lower_after_s)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """`context`: ray.serve.config.AutoscalingContext. While no worker has told anything none goes."""
        figures = _by_worker(context.aggregated_metrics or {})
        before = Target(
            workers=context.target_num_replicas, lower_since=context.policy_state.get("lower_since")
        )
        target = decide(
            self._load(figures), before, self._limits, context.current_time, num_measured=len(figures)
        )
        return target.workers, {"lower_since": target.lower_since}

    def _load(self, figures: list[dict[str, float]]) -> float:
        raise NotImplementedError


class PrefillPolicy(_Policy):
    def __init__(self, *, wait_goal_s: float, busy_goal: float, **limits: Any) -> None:
        super().__init__(**limits)
        self._wait_goal_s = wait_goal_s
        self._busy_goal = busy_goal

    def _load(self, figures: list[dict[str, float]]) -> float:
        return prefill_load(
            [PrefillFigures(**each) for each in figures],
            wait_goal_s=self._wait_goal_s,
            busy_goal=self._busy_goal,
        )


class DecodePolicy(_Policy):
    def __init__(self, *, share_goal: float, step_goal_s: float | None, **limits: Any) -> None:
        super().__init__(**limits)
        self._share_goal = share_goal
        self._step_goal_s = step_goal_s

    def _load(self, figures: list[dict[str, float]]) -> float:
        return decode_load(
            [DecodeFigures(**each) for each in figures],
            share_goal=self._share_goal,
            step_goal_s=self._step_goal_s,
        )


def _by_worker(metrics: Mapping[str, Mapping[Any, float]]) -> list[dict[str, float]]:
    """Serve has figures by name and replica; its own, and replicas that have not told all of theirs, are left out."""
    ours = {name: values for name, values in metrics.items() if name in _NAMES}
    replicas = {replica for values in ours.values() for replica in values}
    found = [
        {name: values[replica] for name, values in ours.items() if replica in values} for replica in replicas
    ]
    return [each for each in found if each.keys() in (PREFILL_NAMES, DECODE_NAMES)]


PREFILL_NAMES = frozenset(PrefillFigures.__dataclass_fields__)
DECODE_NAMES = frozenset(DecodeFigures.__dataclass_fields__)
_NAMES = PREFILL_NAMES | DECODE_NAMES
