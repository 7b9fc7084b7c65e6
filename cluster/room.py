"""How much of a bounded place each tenant may fill, so that one that floods it leaves room for another that comes. Pure.

A tenant may hold at most GREED times what is then free: alone 4/5 of the place, of two 4/9 each, and so on. A tenant that
holds nothing gets in as long as there is any room at all. Knows nothing of what is counted.
"""

from collections import Counter
from typing import Literal

GREED = 4


class Room:
    """`capacity`: what all tenants together may hold. A single thing that is larger is let in where nothing else is held."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0
        self._by_tenant: Counter[str] = Counter()

    def refuses(self, tenant: str, amount: int) -> Literal["tenant", "all"] | None:
        """Why so much does not get in: the tenant's own part is used up, or the place is full; None: it gets in."""
        own, free = self._by_tenant[tenant], self.capacity - self.held - amount
        if own:
            return "tenant" if own + amount > GREED * free else None
        return "all" if self.held and free < 0 else None

    def take(self, tenant: str, amount: int) -> None:
        self.held += amount
        self._by_tenant[tenant] += amount

    def give_back(self, tenant: str, amount: int) -> None:
        self.held -= amount
        self._by_tenant[tenant] -= amount
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
