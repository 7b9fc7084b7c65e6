"""The page pool against a slow model of itself: conservation, generations, owners, and the order of eviction."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workers.page_pool import CacheEvents, PagePool, pages_for

NUM_PAGES = 7


def chain(name: str, length: int) -> list[bytes]:
    """Chains of one first letter share their leading pages: "ab" and "ac" share the first."""
    return [name[: i + 1].ljust(i + 1, "-").encode() for i in range(length)]


class PoolMachine(RuleBasedStateMachine):
    """Owners acquire the published part of a chain, allocate the rest, publish page by page and release."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.owners: list[tuple[list[int], list[bytes]]] = []
        self.published: dict[bytes, int] = {}
        self.lru: list[int] = []  # the model's: least recently used first
        self.free = set(range(NUM_PAGES))
        self.generations = [0] * NUM_PAGES
        self.directory: set[bytes] = set()

    def references(self, page: int) -> int:
        return sum(pages.count(page) for pages, _ in self.owners)

    @rule(name=st.sampled_from(["aaaa", "aabb", "ab", "b", "bbbb"]), length=st.integers(1, 5))
    def admit(self, name: str, length: int) -> None:
        hashes = chain(name, length)
        hits = 0
        while hits < length and hashes[hits] in self.published:
            hits += 1
        room = len(self.free) + len(self.lru) - sum(self.published[h] in self.lru for h in hashes[:hits])
        fits = length - hits <= room
        assert self.pool.fits(hashes, length) == fits
        if not fits:
            return
        pages = self.pool.acquire(hashes)
        assert pages == [self.published[h] for h in hashes[:hits]]
        self.lru = [page for page in self.lru if page not in pages]
        fresh = self.pool.allocate(length - hits)
        assert fresh is not None
        self.check_fresh(fresh)
        self.owners.append((pages + fresh, hashes))

    def check_fresh(self, fresh: list[int]) -> None:
        taken_free = fresh[: len(self.free)]
        evicted = fresh[len(self.free) :]
        assert set(taken_free) <= self.free
        assert evicted == self.lru[: len(evicted)], "least recently used first"
        self.free -= set(taken_free)
        self.lru = self.lru[len(evicted) :]
        self.published = {h: page for h, page in self.published.items() if page not in evicted}

    @rule(n=st.integers(0, NUM_PAGES + 2))
    def allocate_all_or_nothing(self, n: int) -> None:
        room = len(self.free) + len(self.lru)
        before = self.pool.published()
        pages = self.pool.allocate(n)
        if n > room:
            assert pages is None
            assert self.pool.published() == before
        else:
            assert pages is not None
            assert len(set(pages)) == n
            self.check_fresh(pages)
            self.owners.append((pages, []))

    @precondition(lambda self: bool(self.owners))
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        pages, hashes = data.draw(st.sampled_from(self.owners))
        for page, page_hash in zip(pages, hashes, strict=False):
            if page in self.published.values():
                continue
            assert self.pool.publish(page, page_hash) == (page_hash not in self.published)
            self.published.setdefault(page_hash, page)

    @precondition(lambda self: bool(self.owners))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages, _ = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        self.pool.release(pages)
        for page in reversed(pages):
            if not self.references(page):
                self.generations[page] += 1
                if page in self.published.values():
                    self.lru.append(page)
                else:
                    self.free.add(page)

    @rule()
    def drain(self) -> None:
        stored, removed = self.pool.drain_events()
        assert not set(stored) & set(removed)
        assert not set(stored) & self.directory
        assert set(removed) <= self.directory
        self.directory = (self.directory | set(stored)) - set(removed)
        assert self.directory == set(self.published)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.pool.check()
        held = {page for pages, _ in self.owners for page in pages}
        assert (self.pool.free, self.pool.cached, self.pool.held) == (
            len(self.free),
            len(self.lru),
            len(held),
        )
        assert self.free | set(self.lru) | held == set(range(NUM_PAGES))
        assert set(self.pool.published()) == set(self.published)
        assert [self.pool.generation(page) for page in range(NUM_PAGES)] == self.generations

    @invariant()
    def only_published_pages_have_two_owners(self) -> None:
        for page in range(NUM_PAGES):
            if self.references(page) > 1:
                assert page in self.published.values()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40)


def test_a_chain_is_evicted_from_its_end() -> None:
    pool = PagePool(4)
    hashes = chain("aaaa", 4)
    pages = pool.allocate(4)
    assert pages is not None
    for page, page_hash in zip(pages, hashes, strict=True):
        pool.publish(page, page_hash)
    pool.release(pages)
    for left in (3, 2, 1, 0):
        assert pool.allocate(1) == [pages[left]]
        found = pool.acquire(hashes)
        assert found == pages[:left]
        pool.release(found)


def test_events_are_the_net_change() -> None:
    pool = PagePool(1)
    pages = pool.allocate(1)
    assert pages is not None
    pool.publish(pages[0], b"a")
    pool.release(pages)
    assert pool.allocate(1) == pages
    assert pool.drain_events() == CacheEvents([], []), "stored and removed between two looks"
    pool.publish(pages[0], b"b")
    assert pool.drain_events() == CacheEvents([b"b"], [])
    pool.release(pages)
    pool.allocate(1)
    pool.publish(pages[0], b"c")
    assert pool.drain_events() == CacheEvents([b"c"], [b"b"])
    for _ in range(2):
        pool.release(pages)
        pool.allocate(1)
        pool.publish(pages[0], b"c")
        assert pool.drain_events() == CacheEvents([], []), "removed and stored again between two looks"


def test_a_page_cannot_be_released_or_published_by_nobody() -> None:
    pool = PagePool(2)
    with pytest.raises(ValueError, match="page 1 is released"):
        pool.release([1])
    with pytest.raises(ValueError, match="page 0 is published"):
        pool.publish(0, b"a")
    pages = pool.allocate(1)
    assert pages is not None
    pool.publish(pages[0], b"a")
    with pytest.raises(ValueError, match="published already"):
        pool.publish(pages[0], b"b")


def test_check_names_the_three_numbers() -> None:
    pool = PagePool(5)
    pool.allocate(2)
    pool._free.pop()
    with pytest.raises(RuntimeError, match=r"2 free \+ 0 cached \+ 2 held .* of 5"):
        pool.check()


def test_pages_for() -> None:
    assert [pages_for(n) for n in (0, 1, 64, 65, 128)] == [0, 1, 1, 2, 2]
