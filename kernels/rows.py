"""Which cached tokens the query rows of a batch may see."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch


class Rows(NamedTuple):
    """T query rows of R requests, request after request.

    query_starts: R+1 host integers; the rows of request r are query_starts[r] to query_starts[r+1].
    owners:       int32 [T], the row's request: query_starts for a kernel, which cannot wait for the host.
    positions:    int64 [T], the row's position in its request; it sees the tokens 0..position.
    page_table:   int32 [R, max_pages], physical page of each logical page, -1 where there is none.
    """

    query_starts: tuple[int, ...]
    owners: torch.Tensor
    positions: torch.Tensor
    page_table: torch.Tensor

    @classmethod
    def of(cls, query_starts: Sequence[int], positions: torch.Tensor, page_table: torch.Tensor) -> Self:
        counts = torch.tensor([end - start for start, end in itertools.pairwise(query_starts)])
        owners = torch.repeat_interleave(counts).int().to(positions.device)
        return cls(tuple(query_starts), owners, positions, page_table)

    def to(self, device: str | torch.device) -> Self:
        return self._replace(
            owners=self.owners.to(device),
            positions=self.positions.to(device),
            page_table=self.page_table.to(device),
        )
