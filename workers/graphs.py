"""Decode steps as CUDA graphs: one row for each request, replayed with one launch instead of thousands.

A graph belongs to a number of rows, a bucket; what a step is about lies in buffers that all graphs read. Surplus rows are at
position -1, so they see no token, and write into a page that no request has. Knows nothing of policy.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kernels.layout import PAGE_SIZE
from kernels.rows import Rows
from workers.request import Request
from workers.scheduler import Scheduled

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
WARM_RUNS = 2  # the first compiles, the second finds what the first has compiled


def buckets(max_rows: int) -> list[int]:
    """Ascending, the last exactly max_rows."""
    return [bucket for bucket in BUCKETS if bucket < max_rows] + [max_rows]


class Seats:
    """What a decode step is about, on the host, row by row. A request keeps its row, so that only its new pages are written.

    inputs: int64 [4, max_rows]: token ids, positions, slots, and the row of each request in the order of the batch
    table:  int32 [max_rows, width], the page table; what lies beyond a request's pages is never looked at
    """

    def __init__(self, inputs: Any, table: Any, *, scratch_page: int) -> None:
        self._inputs = inputs
        self._table = table
        self._buckets = buckets(inputs.shape[1])
        self._scratch = scratch_page * PAGE_SIZE + np.arange(inputs.shape[1]) % PAGE_SIZE
        self._rows: dict[str, int] = {}
        self._written: dict[str, tuple[list[int], int]] = {}  # pages of a request, how many are in the table

    def fill(self, batch: Sequence[Scheduled], num_rows: int) -> tuple[int, bool]:
        """-> the bucket for num_rows, and whether the page table has changed. A batch of fewer rows leaves some for nothing."""
        bucket = next(size for size in self._buckets if size >= num_rows)
        self._sit(batch, bucket)
        rows = [self._rows[item.request.id] for item in batch]
        changed = [self._write(item.request, row) for item, row in zip(batch, rows, strict=True)]
        self._inputs[:, :bucket] = ((0,), (-1,), (0,), (0,))
        self._inputs[2, :bucket] = self._scratch[:bucket]
        if rows:
            self._inputs[:3, rows] = list(zip(*map(_row, batch), strict=True))
        self._inputs[3, : len(rows)] = rows
        return bucket, any(changed)

    def _sit(self, batch: Sequence[Scheduled], bucket: int) -> None:
        requests = [item.request.id for item in batch]
        staying = {name: self._rows[name] for name in requests if name in self._rows}
        if any(row >= bucket for row in staying.values()):
            staying = {}  # a smaller graph will do: everyone moves up
        free = iter(sorted(set(range(bucket)) - set(staying.values())))
        rows = {name: staying[name] if name in staying else next(free) for name in requests}
        moved = {name for name in rows if self._rows.get(name) != rows[name]}
        self._written = {name: self._written[name] for name in rows if name not in moved}
        self._rows = rows

    def _write(self, request: Request, row: int) -> bool:
        """A preempted request comes back with another list of pages; the one it has only grows."""
        pages, count = self._written.get(request.id, ([], 0))
        if pages is not request.pages:
            count = 0
        new = request.pages[count:]
        self._table[row, count : count + len(new)] = new
        self._written[request.id] = (request.pages, count + len(new))
        return bool(new)


def _row(item: Scheduled) -> tuple[int, int, int]:
    position = item.start
    page = item.request.pages[position // PAGE_SIZE]
    return item.request.tokens[position], position, page * PAGE_SIZE + position % PAGE_SIZE


class DecodeGraphs:
    """`model` is workers.model.Model, `cache` its PagedCache, whose last page belongs to nobody."""

    def __init__(self, model: Any, cache: Any, *, max_rows: int, max_context: int) -> None:
        self._model = model
        self._cache = cache
        self._max_rows = max_rows
        width = -(-max_context // PAGE_SIZE)
        # Pinned: a copy from it does not hold up the host, which fills it again only after the step's tokens were read.
        self._host_inputs = torch.zeros(4, max_rows, dtype=torch.int64).pin_memory()
        self._host_table = torch.full((max_rows, width), -1, dtype=torch.int32).pin_memory()
        self._inputs = self._host_inputs.to(model.device)
        self._table = self._host_table.to(model.device)
        self._owners = torch.arange(max_rows, dtype=torch.int32, device=model.device)
        self._everyone = torch.arange(max_rows, device=model.device)
        scratch_page = cache.num_pages - 1
        self._seats = Seats(self._host_inputs.numpy(), self._host_table.numpy(), scratch_page=scratch_page)
        self._inputs[1] = -1
        self._inputs[2] = scratch_page * PAGE_SIZE + self._everyone % PAGE_SIZE
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def capture(self) -> None:
        """Runs every bucket, largest first, and records it. All graphs share one pool of memory: only one runs at a time."""
        pool = torch.cuda.graph_pool_handle()
        for bucket in reversed(buckets(self._max_rows)):
            self._graphs[bucket] = record(functools.partial(self._forward, bucket), pool)

    def takes(self, batch: Sequence[Scheduled]) -> bool:
        """Whether the batch is a decode step: one row each, every one samples, and nobody watches what is selected."""
        return (
            0 < len(batch) <= self._max_rows
            and bool(self._graphs)
            and all(i.num_tokens == 1 and i.samples and i.request.page_counts is None for i in batch)
        )

    def run(self, batch: Sequence[Scheduled], num_rows: int | None = None) -> torch.Tensor:
        """fp32 [S, V]: the logits of each request, in the order of the batch. Valid until the next call.

        num_rows: the most that any rank of several has; the logits are then those of all ranks, rank after rank
        """
        bucket, new_pages = self._seats.fill(batch, num_rows or len(batch))
        self._inputs.copy_(self._host_inputs, non_blocking=True)
        if new_pages:
            self._table.copy_(self._host_table, non_blocking=True)
        graph, logits = self._graphs[bucket]
        graph.replay()
        return logits if num_rows else logits[: len(batch)]

    def _forward(self, bucket: int) -> torch.Tensor:
        token_ids, positions, slots, _ = self._inputs[:, :bucket]
        rows = Rows(tuple(range(bucket + 1)), self._owners[:bucket], positions, self._table[:bucket])
        return self._model.forward(token_ids, rows, slots, self._cache, self._inputs[3, :bucket])


def record(step: Callable[[], torch.Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of the step and the tensor that every replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_RUNS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads pack pages and watch collectives meanwhile; that is no part of the graph.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = step()
    return graph, out
