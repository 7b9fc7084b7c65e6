"""What a gateway's requests are doing and what the last ones came to: for the console and the access log.

Knows nothing of HTTP, of text or of workers' loads. A choice of an answer counts as a request here, as in the ledger.
"""

import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.explanation import Phases
from cluster.flight import Flight
from cluster.records import Settlement
from cluster.tenants import Tenant

NUM_KEPT = 50  # ended requests of one tenant


@dataclass(frozen=True)
class Ending:
    """A request that is over, in whatever way. Tokens and amount are those of its bill."""

    tenant: Tenant
    settlement: Settlement
    nanodollars: int
    phases: Phases
    workers: list[str]  # prefill, decode, and those that had to go on


@dataclass(frozen=True)
class Running:
    """A request that has not ended."""

    tenant: Tenant
    flight: Flight
    started_at: float  # seconds since the epoch


class Activity:
    """The requests of one gateway, by tenant."""

    def __init__(self) -> None:
        self._running: dict[str, Running] = {}
        self._ended: dict[str, deque[Ending]] = {}
        self._output_tokens: Counter[str] = Counter()  # of requests that have ended

    def started(self, flight: Flight, tenant: Tenant) -> None:
        """A request was admitted. `ended` must follow."""
        self._running[flight.id] = Running(tenant, flight, time.time())

    def ended(self, ending: Ending) -> None:
        name = ending.tenant.name
        del self._running[ending.settlement.request_id]
        self._ended.setdefault(name, deque(maxlen=NUM_KEPT)).append(ending)
        self._output_tokens[name] += ending.settlement.output_tokens

    def running(self, tenant: str) -> Iterator[Running]:
        """Oldest first."""
        return (running for running in self._running.values() if running.tenant.name == tenant)

    def last(self, tenant: str) -> list[Ending]:
        """The last requests that have ended, oldest first."""
        return list(self._ended.get(tenant, ()))

    def output_tokens(self, tenant: str) -> int:
        """Tokens written since this gateway started."""
        return self._output_tokens[tenant] + sum(len(r.flight.emitted) for r in self.running(tenant))


def workers_of(flight: Flight) -> list[str]:
    """Each once, in the order in which they were asked."""
    chosen = (
        worker for attempt in flight.attempts for worker in (attempt.route.prefill, attempt.route.decode)
    )
    return list(dict.fromkeys(chosen))
