"""Operators that select other tokens than the indexer would, or write down what it selects. For experiments only."""

from types import SimpleNamespace
from typing import Any, cast

import torch

from kernels import dispatch
from kernels.dispatch import Ops
from kernels.layout import PAGE_SIZE, CacheLayout
from kernels.rows import Rows


def window() -> Ops:
    """The last top-k tokens: a sliding window of the same budget."""

    def select(
        q: torch.Tensor, weights: Any, index_pages: Any, rows: Rows, topk: int, layout: CacheLayout
    ) -> torch.Tensor:
        back = torch.arange(topk - 1, -1, -1, device=q.device)
        return _slots(rows, rows.positions.unsqueeze(1) - back)

    return _with(select_tokens=select)


def at_random(seed: int) -> Ops:
    """As many tokens as top-k, drawn from all that are visible; with repeats, which count once in effect."""
    generators: dict[torch.device, torch.Generator] = {}

    def select(
        q: torch.Tensor, weights: Any, index_pages: Any, rows: Rows, topk: int, layout: CacheLayout
    ) -> torch.Tensor:
        generator = generators.setdefault(q.device, torch.Generator(q.device).manual_seed(seed))
        drawn = torch.rand(len(q), topk, device=q.device, generator=generator)
        visible = rows.positions.unsqueeze(1) + 1
        positions = (drawn * visible).long().clamp(max=visible - 1).sort(dim=1).values
        repeated = torch.zeros_like(positions, dtype=torch.bool)
        repeated[:, 1:] = positions[:, 1:] == positions[:, :-1]
        few = visible <= topk
        everything = torch.arange(topk, device=q.device).expand_as(positions)
        everything = everything.masked_fill(everything >= visible, -1)
        return _slots(rows, torch.where(few, everything, positions.masked_fill(repeated, -1)))

    return _with(select_tokens=select)


def dense() -> Ops:
    """Every visible token: the indexer is left out."""
    reference = dispatch.select("reference")
    current: list[Rows] = []  # of the layer that is attending

    def select(
        q: torch.Tensor, weights: Any, index_pages: Any, rows: Rows, topk: int, layout: CacheLayout
    ) -> torch.Tensor:
        current[:] = [rows]
        return torch.empty(len(q), 0, dtype=torch.int32, device=q.device)

    def attend(
        q: torch.Tensor, pages: torch.Tensor, slots: Any, softmax_scale: float, layout: CacheLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.dense_mla(q, pages, current[0], softmax_scale, layout)

    return _with(select_tokens=select, sparse_mla=attend)


class Recorder:
    """Keeps what the indexer selects, layer after layer, while `on`. `taken`: int64 [T, topk] positions, -1 padded."""

    def __init__(self) -> None:
        self.on = False
        self.taken: list[torch.Tensor] = []
        reference = dispatch.select("reference")

        def select(
            q: torch.Tensor,
            weights: torch.Tensor,
            index_pages: torch.Tensor,
            rows: Rows,
            topk: int,
            layout: CacheLayout,
        ) -> torch.Tensor:
            slots = reference.select_tokens(q, weights, index_pages, rows, topk, layout)
            if self.on:
                self.taken.append(_positions(rows, slots))
            return slots

        self.ops = _with(select_tokens=select)


def _with(**replaced: Any) -> Ops:
    return cast(Ops, SimpleNamespace(**vars(dispatch.select("reference")) | replaced))


def _owners(rows: Rows) -> torch.Tensor:
    """int64 [T]: the request of each row."""
    starts = torch.tensor(rows.query_starts)
    return torch.repeat_interleave(starts.diff()).to(rows.positions.device)


def _slots(rows: Rows, positions: torch.Tensor) -> torch.Tensor:
    """Positions int64 [T, k], negative where there is none -> slots int32 [T, k], -1 last as the operators want them."""
    ordered = positions.masked_fill(positions < 0, torch.iinfo(torch.int64).max).sort(dim=1).values
    missing = ordered == torch.iinfo(torch.int64).max
    ordered = ordered.masked_fill(missing, 0)
    pages = rows.page_table[_owners(rows).unsqueeze(1), ordered // PAGE_SIZE].long()
    return (pages * PAGE_SIZE + ordered % PAGE_SIZE).masked_fill(missing, -1).int()


def _positions(rows: Rows, slots: torch.Tensor) -> torch.Tensor:
    """The inverse of _slots, for one request: int64 [T, k], -1 where there is none."""
    if len(rows.query_starts) != 2:
        raise ValueError(f"rows holds {len(rows.query_starts) - 1} requests, but one is recorded at a time")
    (table,) = rows.page_table
    where = torch.full((int(table.max()) + 1,), -1, device=table.device)
    where[table.long()] = torch.arange(len(table), device=table.device)
    pages = where[slots.clamp(min=0).long() // PAGE_SIZE]
    return (pages * PAGE_SIZE + slots % PAGE_SIZE).masked_fill(slots < 0, -1)
