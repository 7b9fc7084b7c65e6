"""How often the lightning indexer selected each page of a request, for those who want to see what was read.

It only looks at what the indexer has selected, so no result depends on whether somebody asked.
"""

from typing import NamedTuple

import torch

from kernels.layout import PAGE_SIZE
from workers.scheduler import Scheduled


class PageCounts:
    """The counts of one request, over the rows at positions `next_row` and later; each row counts once.

    A preempted request computes rows again that it had computed: those are before `next_row` by then.
    """

    def __init__(self, next_row: int) -> None:
        self.next_row = next_row
        self._counts: torch.Tensor | None = None  # int64 [layers, pages]

    def add(self, selected: torch.Tensor, pages: list[int]) -> None:
        """selected: int32 [layers, n, topk] on the host, slots of these pages, -1 padded; n rows from `next_row` on."""
        layers, num_rows, _ = selected.shape
        ordered, order = torch.tensor(pages).sort()
        found = torch.searchsorted(ordered, selected.flatten(1).long().clamp(min=0) // PAGE_SIZE)
        # One more page, the last, takes the padding. A bin for each layer and page, so that one pass counts them all.
        logical = order[found.clamp(max=len(pages) - 1)].masked_fill(selected.flatten(1) < 0, len(pages))
        bins = logical + torch.arange(layers).unsqueeze(1) * (len(pages) + 1)
        counts = bins.flatten().bincount(minlength=layers * (len(pages) + 1)).view(layers, -1)[:, :-1].clone()
        if self._counts is not None:
            num_before = self._counts.shape[1]  # a request's pages never become fewer
            counts[:, :num_before] += self._counts
        self._counts = counts
        self.next_row += num_rows

    def tolist(self) -> list[list[int]]:
        """[layers][pages], pages in the order of the request's sequence; [] while no row has been counted."""
        return [] if self._counts is None else self._counts.tolist()


class _Wanted(NamedTuple):
    counts: PageCounts
    pages: list[int]
    rows: range  # of the batch


class SelectionWatch:
    """Keeps what one forward pass selects for the rows that are counted, and adds it up afterwards."""

    def __init__(self, wanted: list[_Wanted], device: str) -> None:
        self._wanted = wanted
        rows = [row for item in wanted for row in item.rows]
        self._rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self._layers: list[torch.Tensor] = []

    @classmethod
    def of(cls, batch: list[Scheduled], device: str) -> "SelectionWatch | None":
        """None where none of the batch's rows are counted."""
        wanted, first = [], 0
        for item in batch:
            counts: PageCounts | None = item.request.page_counts
            if counts is not None and item.end > counts.next_row:
                skipped = max(0, counts.next_row - item.start)
                rows = range(first + skipped, first + item.num_tokens)
                wanted.append(_Wanted(counts, item.request.pages, rows))
            first += item.num_tokens
        return cls(wanted, device) if wanted else None

    def take(self, selected: torch.Tensor) -> None:
        """The next layer's selection: slots int32 [T, topk] of all rows of the batch."""
        self._layers.append(selected[self._rows])

    def add_up(self) -> None:
        selected = torch.stack(self._layers).cpu()
        parts = selected.split([len(item.rows) for item in self._wanted], dim=1)
        for item, part in zip(self._wanted, parts, strict=True):
            item.counts.add(part, item.pages)
