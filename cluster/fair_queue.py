"""Whose request is next: start-time fair queueing over what each flow has been served, in tokens. Pure.

Every flow (a tenant) has a counter of the tokens it was served. The flow with the least goes first; one that comes back
after a pause begins at the counter of the last flow that was let through, so that a pause saves nothing up and costs nothing.
Hence a request whose flow was idle waits for at most one request of each other flow, and of two flows that both always have
requests waiting neither is served more than the other by more than one request of each. What only turns out later, the
length of an answer, is charged when it is known.
"""

import itertools
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Entry(Generic[T]):
    cost: int
    number: int  # in order of arrival
    item: T


class FairQueue(Generic[T]):
    """Items in the order in which their flows' counters let them through; within a flow in order of arrival."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._waiting: dict[str, deque[_Entry[T]]] = {}  # only flows with something in it
        self._floor = 0  # the counter of the last flow that was let through, before it was
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def push(self, flow: str, cost: int, item: T) -> None:
        """cost: at least 1."""
        if flow not in self._waiting:
            self._served[flow] = max(self._served.get(flow, 0), self._floor)
        self._waiting.setdefault(flow, deque()).append(_Entry(cost, next(self._numbers), item))

    def peek(self) -> T | None:
        """What `pop` would give; None where nothing waits."""
        return self._waiting[self._next()][0].item if self._waiting else None

    def pop(self) -> T:
        """Lets the next item through. Raises IndexError where nothing waits."""
        if not self._waiting:
            raise IndexError("nothing waits")
        flow = self._next()
        entry = self._waiting[flow].popleft()
        self._floor = self._served[flow]
        self._served[flow] += entry.cost
        self._tidy(flow)
        return entry.item

    def charge(self, flow: str, cost: int) -> None:
        """A flow was served more than its items said."""
        self._served[flow] = max(self._served.get(flow, 0), self._floor) + cost

    def remove(self, flow: str, item: T) -> None:
        """An item that waits will not be let through. Raises ValueError where it does not wait."""
        entries = self._waiting.get(flow, deque())
        index = next((i for i, entry in enumerate(entries) if entry.item is item), None)
        if index is None:
            raise ValueError(f"no such item of {flow!r} waits")
        del entries[index]
        self._tidy(flow)

    def _next(self) -> str:
        return min(self._waiting, key=lambda flow: (self._served[flow], self._waiting[flow][0].number))

    def _tidy(self, flow: str) -> None:
        if not self._waiting[flow]:
            del self._waiting[flow]
