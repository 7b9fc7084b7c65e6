"""The page pools of a worker's ranks side by side. Knows nothing of tokens, tensors or scheduling policy."""

from collections import Counter
from collections.abc import Sequence

from workers.page_pool import CacheEvents, PagePool


class PagePools:
    """One pool for each rank that has pages of its own; `pools[rank]` is where pages are taken and given back.

    What is said of all pools together counts a prefix once, however many ranks hold it.
    """

    def __init__(self, pools: Sequence[PagePool]) -> None:
        self._pools = tuple(pools)
        self._holders: Counter[bytes] = (
            Counter()
        )  # how many pools have published a hash, as of the last drain

    def __getitem__(self, rank: int) -> PagePool:
        return self._pools[rank]

    def __len__(self) -> int:
        return len(self._pools)

    @property
    def num_pages(self) -> int:
        """Of one rank: the most that one request can have."""
        return self._pools[0].num_pages

    @property
    def free(self) -> int:
        return sum(pool.free for pool in self._pools)

    @property
    def cached(self) -> int:
        return sum(pool.cached for pool in self._pools)

    @property
    def held(self) -> int:
        return sum(pool.held for pool in self._pools)

    def published(self) -> list[bytes]:
        """Every hash that can be acquired now from one pool or another."""
        return list(dict.fromkeys(page_hash for pool in self._pools for page_hash in pool.published()))

    def drain_events(self) -> CacheEvents:
        """What has changed in `published()` since the last call."""
        before: dict[bytes, int] = {}
        for pool in self._pools:
            events = pool.drain_events()
            for page_hash in events.stored + events.removed:
                before.setdefault(page_hash, self._holders[page_hash])
            self._holders.update(events.stored)
            self._holders.subtract(events.removed)
        stored = [page_hash for page_hash, count in before.items() if not count and self._holders[page_hash]]
        removed = [page_hash for page_hash, count in before.items() if count and not self._holders[page_hash]]
        for page_hash in before:
            if not self._holders[page_hash]:
                del self._holders[page_hash]
        return CacheEvents(stored, removed)

    def check(self) -> None:
        """Raises RuntimeError unless every pool has all of its pages."""
        for pool in self._pools:
            pool.check()
