"""Who holds which page, and which pages are prefix cache. Only the pool frees.

A page is free (nothing in it is worth keeping), cached (published under its hash, held by nobody) or held (by one request,
or by several that share a prefix). Knows nothing of tokens, tensors or scheduling policy.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from kernels.layout import PAGE_SIZE


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_SIZE)


class CacheEvents(NamedTuple):
    """Net change of the published hashes: no hash is in both lists, and their order means nothing."""

    stored: list[bytes]
    removed: list[bytes]


class PagePool:
    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._generations = [0] * num_pages
        self._hashes: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._free = list(reversed(range(num_pages)))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._num_held = 0
        self._stored: dict[bytes, None] = {}  # dicts as ordered sets
        self._removed: dict[bytes, None] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def held(self) -> int:
        return self._num_held

    def generation(self, page: int) -> int:
        """How often the page has been freed. A write meant for an earlier generation must be refused."""
        return self._generations[page]

    def published(self) -> list[bytes]:
        """Every hash that can be acquired now: what the prefix directory should know of this pool."""
        return list(self._page_of)

    def fits(self, hashes: Sequence[bytes], num_pages: int) -> bool:
        """Whether `acquire(hashes)` and `allocate` of the rest would give num_pages in all. Changes nothing."""
        hits = self._find(hashes)
        evictable = self.cached - sum(page in self._cached for page in hits)
        return num_pages - len(hits) <= self.free + evictable

    def count_hits(self, hashes: Sequence[bytes]) -> int:
        """How many pages `acquire` would give."""
        return len(self._find(hashes))

    def acquire(self, hashes: Sequence[bytes]) -> list[int]:
        """One more reference to each page of the longest published prefix of a chain of hashes."""
        pages = self._find(hashes)
        for page in pages:
            if not self._references[page]:
                del self._cached[page]
                self._num_held += 1
            self._references[page] += 1
        return pages

    def allocate(self, num_pages: int) -> list[int] | None:
        """Pages of one new owner: free ones, then the least recently used cached ones. None if there are too few."""
        if num_pages > self.free + self.cached:
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(num_pages)]
        for page in pages:
            self._references[page] = 1
        self._num_held += num_pages
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Takes back one reference to each page of a chain, given first page first.

        The last page goes first into the order of eviction: a page whose predecessor is gone could not be found.
        """
        for page in reversed(pages):
            if not self._references[page]:
                raise ValueError(f"page {page} is released but nobody holds it")
            self._references[page] -= 1
            if not self._references[page]:
                self._num_held -= 1
                self._generations[page] += 1
                if self._hashes[page] is None:
                    self._free.append(page)
                else:
                    self._cached[page] = None

    def publish(self, page: int, page_hash: bytes) -> bool:
        """Makes a held, full page acquirable. False, and no change, if another page has this hash already.

        The duplicate stays with its owner, because page tables are append-only: a page id is never replaced.
        """
        if not self._references[page] or self._hashes[page] is not None:
            raise ValueError(f"page {page} is published but is not held, or is published already")
        if page_hash in self._page_of:
            return False
        self._hashes[page] = page_hash
        self._page_of[page_hash] = page
        if page_hash in self._removed:
            del self._removed[page_hash]
        else:
            self._stored[page_hash] = None
        return True

    def drain_events(self) -> CacheEvents:
        """What has changed in `published()` since the last call."""
        events = CacheEvents(list(self._stored), list(self._removed))
        self._stored.clear()
        self._removed.clear()
        return events

    def check(self) -> None:
        """Raises RuntimeError unless free + cached + held = all, with `held` counted anew."""
        held = sum(references > 0 for references in self._references)
        if held != self._num_held or self.free + self.cached + held != self.num_pages:
            raise RuntimeError(
                f"pages are lost or counted twice: {self.free} free + {self.cached} cached + {held} held "
                f"({self._num_held} on the books) of {self.num_pages}"
            )

    def _find(self, hashes: Sequence[bytes]) -> list[int]:
        pages = []
        for page_hash in hashes:
            page = self._page_of.get(page_hash)
            if page is None:
                break
            pages.append(page)
        return pages

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        page_hash = self._hashes[page]
        assert page_hash is not None
        self._hashes[page] = None
        del self._page_of[page_hash]
        if page_hash in self._stored:
            del self._stored[page_hash]
        else:
            self._removed[page_hash] = None
        return page
