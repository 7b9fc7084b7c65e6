"""Which rank of a worker takes which rows, requests and experts. Decisions only: knows nothing of tensors or processes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

MAX_EXPERT_BLOCKS = 8


class Run(NamedTuple):
    """The tokens start .. end - 1 of one item of a step."""

    item: int
    start: int
    end: int


class Room(NamedTuple):
    """What one rank has to offer a request."""

    rank: int
    num_hits: int  # leading pages of the request that it holds already
    num_free: int  # pages it could give
    num_requests: int  # that hold pages there


def deal_rows(spans: Sequence[tuple[int, int]], num_ranks: int) -> list[list[Run]]:
    """Spreads the rows of a step over the ranks; span i is the (start, end) of item i's rows.

    A row costs the more the later it comes, so a rank's rows of a span are half of them early ones and half of them their mirror
    image among the late. The rank with the fewest rows so far comes first, so that short spans even out.
    Returns each rank's runs, by item and start; runs that touch are one.
    """
    shares: list[list[Run]] = [[] for _ in range(num_ranks)]
    counts = [0] * num_ranks
    for item, (start, end) in enumerate(spans):
        order = sorted(range(num_ranks), key=counts.__getitem__)
        each, left_over = divmod(end - start, num_ranks)
        totals = [each + (place < left_over) for place in range(num_ranks)]
        sizes = [total // 2 for total in totals] + [total - total // 2 for total in reversed(totals)]
        for rank, size in zip(order + order[::-1], sizes, strict=True):
            if size:
                _append(shares[rank], Run(item, start, start + size))
            counts[rank] += size
            start += size
    return shares


def _append(runs: list[Run], run: Run) -> None:
    before = runs[-1] if runs else None
    if before is not None and (before.item, before.end) == (run.item, run.start):
        runs[-1] = before._replace(end=run.end)
    else:
        runs.append(run)


def even_runs(total: int, number: int) -> list[slice]:
    """Cuts 0 .. total into `number` runs, all about as long."""
    return [slice(total * i // number, total * (i + 1) // number) for i in range(number)]


def choose_rank(rooms: Sequence[Room]) -> int:
    """The rank for a new request, of those with room for it: the one that knows most of it, then the one least busy."""
    return min(rooms, key=lambda room: (-room.num_hits, room.num_requests, -room.num_free, room.rank)).rank


def expert_blocks(num_experts: int) -> int:
    """In how many equal blocks of experts a token's outputs are added up.

    Each block by itself, then blocks in pairs, pairs in pairs and so on. That order is the same for every number of ranks
    that `experts_of` allows, because what one rank adds up is a branch of that tree: the same bits come out.
    """
    return math.gcd(num_experts, MAX_EXPERT_BLOCKS)


def experts_of(rank: int, num_ranks: int, num_experts: int) -> range:
    """The experts of a rank. Raises ValueError for a number of ranks that whole branches cannot be given to."""
    blocks = expert_blocks(num_experts)
    if blocks % num_ranks:
        allowed = [str(2**i) for i in range(blocks.bit_length())]
        raise ValueError(f"ranks is {num_ranks}, but {num_experts} experts allow {' or '.join(allowed)}")
    count = num_experts // num_ranks
    return range(rank * count, (rank + 1) * count)
