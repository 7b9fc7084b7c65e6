"""Which worker holds which page of which prefix. Pure: knows nothing of networks, tenants or prices.

The prefix-cache controller keeps the authority, fed by the workers; each gateway keeps a copy, fed by the controller. It
may be behind the truth: a page that is no longer there costs time, never a wrong answer, since workers look for themselves.
"""

from collections.abc import Iterable, Sequence

import msgspec

MAX_PAGES = 2**18  # of one worker; more than any cache holds, so that no report can exhaust the memory


class PageChange(msgspec.Struct, frozen=True, array_like=True):
    """What a worker's prefix cache has lost and then gained. `reset`: it now holds exactly `stored`."""

    worker: str
    epoch: int
    stored: list[bytes] = []  # hashes of pages; chained, so that one names the whole prefix up to its page
    removed: list[bytes] = []
    reset: bool = False


class PrefixDirectory:
    """The pages of each worker's present incarnation (epoch), at most `max_pages` of them: what comes later is left out."""

    def __init__(self, max_pages: int = MAX_PAGES) -> None:
        self._max_pages = max_pages
        self._epochs: dict[str, int] = {}
        self._pages: dict[str, set[bytes]] = {}

    def apply(
        self,
        worker: str,
        epoch: int,
        stored: Iterable[bytes] = (),
        removed: Iterable[bytes] = (),
        reset: bool = False,
    ) -> None:
        """Takes over a change: first what was removed, then what was stored. A new epoch begins with no pages."""
        if reset or epoch != self._epochs.get(worker):
            self._epochs[worker], self._pages[worker] = epoch, set()
        pages = self._pages[worker]
        pages.difference_update(removed)
        for page in stored:
            if len(pages) >= self._max_pages:
                return
            pages.add(page)

    def drop(self, worker: str) -> None:
        """Forgets a worker. Unknown ones are fine."""
        self._epochs.pop(worker, None)
        self._pages.pop(worker, None)

    def follow(self, changes: Iterable[PageChange], members: Iterable[str]) -> None:
        """Takes over what the controller has sent, and forgets everyone who is no member."""
        for change in changes:
            self.apply(change.worker, change.epoch, change.stored, change.removed, change.reset)
        for worker in self._pages.keys() - set(members):
            self.drop(worker)

    def snapshot(self) -> list[PageChange]:
        """Changes that give another directory, whatever it holds, the state of this one."""
        return [
            PageChange(worker, self._epochs[worker], sorted(pages), [], True)
            for worker, pages in sorted(self._pages.items())
        ]

    def lookup(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """How many leading pages of a prompt each worker holds, by its page hashes; workers without the first are left out."""
        found = {}
        for worker, pages in self._pages.items():
            num_pages = next((i for i, page in enumerate(hashes) if page not in pages), len(hashes))
            if num_pages:
                found[worker] = num_pages
        return found
