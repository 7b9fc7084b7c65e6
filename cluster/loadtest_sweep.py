"""Finds the knee: the highest rate of requests at which a server still keeps its promises. Pure arithmetic; sends nothing.

The rate doubles until the promise breaks, then the gap between the last good and the first bad rate is halved a few times.
"""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Step:
    """What one rate came to. attainment: the share of its requests that met every SLO."""

    rate: float
    attainment: float


@dataclass
class Sweep:
    """Ask `next_rate`, measure, `add`, until there is no next one."""

    low: float
    high: float
    target: float  # attainment that is good enough
    refinements: int = 3
    steps: list[Step] = field(default_factory=list)

    def add(self, rate: float, attainment: float) -> None:
        self.steps.append(Step(rate, attainment))

    @property
    def knee(self) -> float | None:
        """The highest rate below the first bad one that was good; None where not even the lowest was."""
        good = [step.rate for step in self.steps if self._is_good(step) and step.rate < self._first_bad]
        return max(good, default=None)

    def next_rate(self) -> float | None:
        if not self.steps:
            return self.low
        knee, bad = self.knee, self._first_bad
        if knee is None:
            return None
        if math.isinf(bad):
            return None if knee >= self.high else min(self.high, knee * 2)
        first = next(index for index, step in enumerate(self.steps) if not self._is_good(step))
        return (knee + bad) / 2 if len(self.steps) - 1 - first < self.refinements else None

    @property
    def _first_bad(self) -> float:
        return min((step.rate for step in self.steps if not self._is_good(step)), default=math.inf)

    def _is_good(self, step: Step) -> bool:
        return step.attainment >= self.target
