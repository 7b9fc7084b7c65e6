"""The ranks of one worker as one group of collectives: NCCL between GPUs, Gloo between CPUs, nothing for one rank alone.

A collective is started and waited for apart, so that what does not need it can run meanwhile: on GPUs it runs on a stream of
its own, after what was queued before it on the current stream. Knows nothing of what is exchanged.
"""

import os
import threading
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

# torch does not declare these as public, but has nothing else for a group outside its one default group.
_GlooOptions: Any = dist.ProcessGroupGloo._Options  # type: ignore[attr-defined]


class Exchange(NamedTuple):
    """A collective under way."""

    result: torch.Tensor
    work: dist.Work | None

    def wait(self) -> torch.Tensor:
        """The result, for work queued on the current stream from now on. Raises RuntimeError when a rank is gone."""
        if self.work is not None:
            self.work.wait()
        return self.result


class Group:
    """Rank `rank` of `size`. Every rank must call the same methods in the same order with equal shapes.

    shares_rows: the ranks share the rows of every request and hold the same pages (prefill). Otherwise each rank has requests
    of its own and pages of its own (decode).
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        shares_rows: bool = False,
        process_group: Any = None,
        can_abort: bool = False,
    ) -> None:
        self.rank = rank
        self.size = size
        self.shares_rows = shares_rows
        self._group = process_group
        self._can_abort = can_abort

    def all_gather(self, x: torch.Tensor) -> Exchange:
        """[n, ...] of each rank -> [size x n, ...] of all, in the order of ranks. x must stay as it is until the wait."""
        if self._group is None:
            return Exchange(x, None)
        x = x.contiguous()
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        return Exchange(out, self._group._allgather_base(_bytes(out), _bytes(x)))

    def all_to_all(self, x: torch.Tensor) -> Exchange:
        """[size x n, ...], n rows for each rank -> [size x n, ...], n rows from each rank."""
        if self._group is None:
            return Exchange(x, None)
        x = x.contiguous()
        out = torch.empty_like(x)
        return Exchange(out, self._group.alltoall_base(_bytes(out), _bytes(x), [], []))

    def abort(self) -> None:
        """Frees what NCCL is stuck in. Gloo notices by itself that a process has died.

        On a thread, because the stuck work is freed at once while the call lasts until every recorded graph with a collective
        in it is gone.
        """
        if self._can_abort:
            threading.Thread(target=self._group.abort, name="abort", daemon=True).start()


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8 [rows, bytes of a row]: collectives know no FP8 and need no types."""
    return x.view(x.shape[0], -1).view(torch.uint8)


ALONE = Group()


def join_group(
    store: Store,
    *,
    rank: int,
    size: int,
    shares_rows: bool,
    device: torch.device,
    address: str,
    timeout_s: float,
) -> Group:
    """Makes the group; all ranks call it at the same time. `address` is this rank's own, for Gloo."""
    prefixed, timeout = PrefixStore("ranks", store), timedelta(seconds=timeout_s)
    if device.type == "cuda":
        # The default tears the whole process down before anybody can say why.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        process_group: Any = dist.ProcessGroupNCCL(prefixed, rank, size, nccl)
    else:
        gloo = _GlooOptions()
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        gloo._threads = 1
        gloo._timeout = timeout
        process_group = dist.ProcessGroupGloo(prefixed, rank, size, gloo)
    group = Group(
        rank,
        size,
        shares_rows=shares_rows,
        process_group=process_group,
        can_abort=device.type == "cuda",
    )
    # NCCL makes its communicator with the first message, which must not be a request's.
    group.all_gather(torch.zeros(1, dtype=torch.uint8, device=device)).wait()
    return group
