"""A plan as tensors: token ids, positions, slots, page table; and one call of the model. Knows nothing of policy.

On a GPU nothing here waits for the step it starts. A decode step replays a graph; any other is at most one step ahead of the device.
"""

from array import array
from collections.abc import Callable
from typing import Any, Protocol

import torch

from kernels.layout import PAGE_SIZE
from kernels.rows import Rows
from workers.device import to_device
from workers.graphs import DecodeGraphs
from workers.page_counts import SelectionWatch
from workers.scheduler import Plan, Scheduled


class Model(Protocol):
    device: str

    def forward(
        self,
        token_ids: torch.Tensor,
        rows: Rows,
        slots: torch.Tensor,
        cache: Any,
        logits_rows: torch.Tensor,
        on_selected: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Computes T rows, writes their caches, and returns the logits of S of them.

        token_ids, slots: int64 [T]; a slot is page x 64 + offset. logits_rows: int64 [S]. Returns fp32 [S, V].
        on_selected is called layer after layer with the slots that the rows attend to: int32 [T, topk], -1 padded.
        """


class Runner:
    """`cache` is the model's own: it is passed on and never looked into."""

    def __init__(self, model: Model, cache: Any, graphs: DecodeGraphs | None = None) -> None:
        self._model = model
        self._cache = cache
        self._graphs = graphs
        self._before: torch.cuda.Event | None = None  # the end of the last step that was not a graph's

    def run(self, plan: Plan, on_selected: Callable[[torch.Tensor], None] | None = None) -> torch.Tensor:
        """fp32 [S, V]: the logits of the last row of each request that catches up, in the order of plan.sampling.

        on_selected: gets what the model shows of each layer, instead of the requests that want their pages counted
        """
        lockstep = plan.lockstep
        if self._graphs is not None and (lockstep.replays if lockstep else self.replays(plan.scheduled)):
            return self._graphs.run(plan.scheduled, lockstep.num_rows if lockstep else None)
        logits = self._run_eagerly(plan.scheduled, lockstep.num_logits if lockstep else 0, on_selected)
        if logits.is_cuda:
            self._pace()
        return logits

    def replays(self, batch: list[Scheduled]) -> bool:
        """Whether the batch is a step that was recorded."""
        return self._graphs is not None and self._graphs.takes(batch)

    def record(self) -> None:
        """Records decode steps, on a GPU. All ranks at the same time."""
        if self._graphs is not None:
            self._graphs.capture()

    def check(self) -> None:
        """This rank alone can always go on."""

    def close(self) -> None:
        """Nothing computes elsewhere."""

    def _run_eagerly(
        self,
        batch: list[Scheduled],
        num_logits: int,
        on_selected: Callable[[torch.Tensor], None] | None,
    ) -> torch.Tensor:
        device = self._model.device
        token_ids, positions = array("q"), array("q")
        query_starts, logits_rows = [0], array("q")
        for item in batch:
            token_ids.fromlist(item.request.tokens[item.start : item.end])
            positions.extend(range(item.start, item.end))
            query_starts.append(len(token_ids))
            if item.samples:
                logits_rows.append(len(token_ids) - 1)
        logits_rows.extend([0] * (num_logits - len(logits_rows)))
        position = torch.frombuffer(positions, dtype=torch.int64)
        table = page_table(batch)
        rows = Rows.of(query_starts, position, table)
        slots = table[rows.owners, position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE
        watch = None if on_selected else SelectionWatch.of(batch, device)
        logits = self._model.forward(
            to_device(torch.frombuffer(token_ids, dtype=torch.int64), device),
            Rows(
                rows.query_starts,
                to_device(rows.owners, device),
                to_device(position, device),
                to_device(table, device),
            ),
            to_device(slots, device),
            self._cache,
            to_device(torch.tensor(logits_rows, dtype=torch.int64), device),
            watch.take if watch else on_selected,
        )
        if watch:
            watch.add_up()
        return logits

    def _pace(self) -> None:
        """Waits for the step before this one. Otherwise a long prompt would be planned, and timed, far ahead of the device."""
        if self._before is not None:
            self._before.synchronize()
        self._before = torch.cuda.Event()
        self._before.record()


def page_table(batch: list[Scheduled]) -> torch.Tensor:
    """int32 [R, max_pages] on the host: the pages up to each request's last row, then -1."""
    used = [item.request.pages[: -(-item.end // PAGE_SIZE)] for item in batch]
    width = max(map(len, used))
    cells = array("i")
    for pages in used:
        cells.fromlist(pages)
        cells.fromlist([-1] * (width - len(pages)))
    return torch.frombuffer(cells, dtype=torch.int32).view(len(used), width)
