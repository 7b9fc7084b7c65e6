"""Which cached tokens each query row of a batch may see."""

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """T query rows of R requests, request after request.

    query_starts: R+1 host integers; the rows of request r are query_starts[r] to query_starts[r+1].
    positions:    int64 [T], the row's position in its request; it sees the tokens 0..position.
    page_table:   int32 [R, max_pages], physical page of each logical page, -1 where there is none.
    """

    query_starts: tuple[int, ...]
    positions: torch.Tensor
    page_table: torch.Tensor
