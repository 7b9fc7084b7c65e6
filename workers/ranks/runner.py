"""One step on all ranks: deals a plan out, tells the followers, runs the leader's part. Knows nothing of policy."""

from collections.abc import Callable

import torch

from workers.page_counts import SelectionWatch
from workers.ranks.leader import Followers
from workers.ranks.messages import Record, Step
from workers.ranks.mirror import Teller, part
from workers.scheduler import Lockstep, Plan, Scheduled
from workers.shard import Shard
from workers.shares import deal_rows


class RankedRunner:
    """As workers.runner.Runner, for the engine of the leader."""

    def __init__(self, shard: Shard, followers: Followers) -> None:
        self._shard = shard
        self._followers = followers
        self._group = followers.group
        self._tellers = {rank: Teller() for rank in range(1, self._group.size)}

    def run(self, plan: Plan) -> torch.Tensor:
        """fp32 [S, V]: the logits of the last row of each request that catches up, in the order of plan.sampling."""
        shares = self._deal(plan.scheduled)
        lockstep = Lockstep(
            num_rows=max(sum(item.num_tokens for item in share) for share in shares),
            num_logits=max(sum(item.samples for item in share) for share in shares),
            replays=not self._group.shares_rows and self._shard.runner.replays(plan.scheduled),
        )
        parts = [part(share, lockstep, spare_page=self._shard.spare_page) for share in shares]
        watch = SelectionWatch.of([item for one in parts for item in one.scheduled], self._shard.model.device)
        for rank, teller in self._tellers.items():
            step = Step(
                forget=teller.forget(),
                known=teller.known(shares[rank]),
                items=[(item.request.id, item.start, item.end) for item in shares[rank]],
                lockstep=lockstep,
                shows=watch is not None,
            )
            self._followers.send(rank, step)
        with self._followers.watched():
            logits = self._shard.runner.run(parts[0], self._take(watch) if watch else None)
            if watch:
                watch.add_up()
            return logits[self._rows_of(plan, shares, len(logits) // self._group.size)]

    def record(self) -> None:
        for rank in self._tellers:
            self._followers.send(rank, Record())
        with self._followers.watched():
            self._shard.runner.record()

    def check(self) -> None:
        self._followers.check()

    def close(self) -> None:
        self._followers.close()

    def _deal(self, batch: list[Scheduled]) -> list[list[Scheduled]]:
        """What each rank computes."""
        if not self._group.shares_rows:
            return [[item for item in batch if item.request.rank == rank] for rank in range(self._group.size)]
        dealt = deal_rows([(item.start, item.end) for item in batch], self._group.size)
        return [
            [Scheduled(batch[run.item].request, run.start, run.end - run.start) for run in runs]
            for runs in dealt
        ]

    def _take(self, watch: SelectionWatch) -> Callable[[torch.Tensor], None]:
        return lambda selected: watch.take(self._group.all_gather(selected).wait())

    def _rows_of(self, plan: Plan, shares: list[list[Scheduled]], each: int) -> list[int]:
        """Where the logits of plan.sampling are among those of all ranks, which are as many of each."""
        rows: dict[str, int] = {}
        for rank, share in enumerate(shares):
            sampling = [item.request.id for item in share if item.samples]
            rows |= {name: rank * each + index for index, name in enumerate(sampling)}
        return [rows[request.id] for request in plan.sampling]
