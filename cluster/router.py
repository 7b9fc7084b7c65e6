"""Which prefill worker reads a prompt and which decode worker writes the answer: those with the earliest first token.

A pure function of the request, the workers' last load frames and the pairs that can ship to each other. Knows nothing of
how these were collected, nor of prices: it minimises time, never the number of hits that are billed.
"""

import heapq
from collections.abc import Collection, Mapping, Sequence

import msgspec

from kernels.layout import PAGE_SIZE

MAX_ALTERNATIVES = 8  # how many scores a route carries to explain itself


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """What the estimate is made with besides the load frames."""

    bytes_per_token: float  # both caches, all layers
    bytes_per_second: float = 5e9  # of one link between a prefill and a decode worker
    seconds_per_token: float = 1e-4  # of a prefill worker, while none has measured its own
    seconds_per_running: float = 1e-3  # what one more request in a decode batch is worth
    seconds_when_full: float = 0.5  # what taking the last free page of a decode worker is worth


class RouteRequest(msgspec.Struct, frozen=True, kw_only=True):
    num_tokens: int  # to be in the caches before the first new token
    hits: Mapping[str, int]  # leading pages that each worker holds, by the prefix directory


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's last load frame, and what this gateway has sent it since."""

    worker: str
    queued_tokens: int = 0  # prompt tokens it has still to compute
    assigned_tokens: int = 0  # prompt tokens of this gateway that it has not dealt with yet
    seconds_per_token: float = 0.0  # prefill; 0: not measured yet
    step_seconds: float = 0.0  # decode
    running: int = 0
    max_running: int = 0  # at once
    assigned_requests: int = 0  # decode: of this gateway, whose caches have not landed yet
    available_pages: int = 0  # free or cached


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """Why a pair is worth what it is: the parts of its expected time to first token, in seconds."""

    prefill: str
    decode: str
    queue_s: float
    compute_s: float
    ship_s: float
    decode_s: float
    prefill_hit_tokens: int  # of the prompt, that the prefill worker holds
    decode_hit_tokens: int  # that the decode worker holds, so that they need not be shipped
    has_room: bool  # the decode worker has pages for the prompt now

    @property
    def seconds(self) -> float:
        return self.queue_s + self.compute_s + self.ship_s + self.decode_s


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """The choice. `quote`: hit tokens that are promised, whole units, never the prompt's last token."""

    prefill: str
    decode: str
    quote: int
    num_pairs: int  # that there were to choose from
    alternatives: list[Score]  # best first; the first is the choice


class _PrefillCost(msgspec.Struct, frozen=True):
    queue_s: float
    compute_s: float
    hit_tokens: int
    assigned: int


class _DecodeCost(msgspec.Struct, frozen=True):
    ship_s: float
    decode_s: float
    hit_tokens: int
    has_room: bool
    assigned: int


def choose(
    request: RouteRequest,
    *,
    prefills: Sequence[WorkerView],
    decodes: Sequence[WorkerView],
    pairs: Collection[tuple[str, str]],
    costs: Costs,
    exclude: Collection[str] = (),
) -> Route | None:
    """The routable pair with the least expected time to first token; None when there is no pair.

    `pairs` are (prefill, decode) ids. A decode worker without room is taken only where none has room. Ties go to the pair
    with the fewest assigned tokens, then to the lowest ids.
    """
    rate = _usual_rate(prefills, costs)
    fronts = {view.worker: _prefill_cost(request, view, view.seconds_per_token or rate) for view in prefills}
    backs = {view.worker: _decode_cost(request, view, costs) for view in decodes}

    def rank(pair: tuple[str, str]) -> tuple[bool, float, int, tuple[str, str]]:
        front, back = fronts[pair[0]], backs[pair[1]]
        seconds = front.queue_s + front.compute_s + back.ship_s + back.decode_s
        return not back.has_room, seconds, front.assigned + back.assigned, pair

    usable = [
        (prefill, decode)
        for prefill, decode in pairs
        if prefill in fronts and decode in backs and prefill not in exclude and decode not in exclude
    ]
    best = heapq.nsmallest(MAX_ALTERNATIVES, usable, key=rank)
    if not best:
        return None
    prefill, decode = best[0]
    return Route(
        prefill=prefill,
        decode=decode,
        quote=max(fronts[prefill].hit_tokens, backs[decode].hit_tokens),
        num_pairs=len(usable),
        alternatives=[_score(pair, fronts[pair[0]], backs[pair[1]]) for pair in best],
    )


def _hit_tokens(request: RouteRequest, worker: str) -> int:
    """Whole pages; the last token is always computed, since its logits are wanted."""
    return PAGE_SIZE * min(request.hits.get(worker, 0), (request.num_tokens - 1) // PAGE_SIZE)


def _usual_rate(prefills: Sequence[WorkerView], costs: Costs) -> float:
    """Seconds per token of a worker that has not measured: as the others, or else it would look infinitely fast."""
    known = [view.seconds_per_token for view in prefills if view.seconds_per_token]
    return sum(known) / len(known) if known else costs.seconds_per_token


def _prefill_cost(request: RouteRequest, view: WorkerView, seconds_per_token: float) -> _PrefillCost:
    hit_tokens = _hit_tokens(request, view.worker)
    ahead = view.queued_tokens + view.assigned_tokens
    return _PrefillCost(
        queue_s=ahead * seconds_per_token,
        compute_s=(request.num_tokens - hit_tokens) * seconds_per_token,
        hit_tokens=hit_tokens,
        assigned=view.assigned_tokens,
    )


def _decode_cost(request: RouteRequest, view: WorkerView, costs: Costs) -> _DecodeCost:
    hit_tokens = _hit_tokens(request, view.worker)
    needed = -(-request.num_tokens // PAGE_SIZE)
    available = view.available_pages - view.assigned_tokens // PAGE_SIZE
    has_room = available >= needed
    fill = needed / available if has_room else 1.0
    return _DecodeCost(
        ship_s=(request.num_tokens - hit_tokens) * costs.bytes_per_token / costs.bytes_per_second,
        decode_s=view.step_seconds
        + view.running * costs.seconds_per_running
        + fill * costs.seconds_when_full,
        hit_tokens=hit_tokens,
        has_room=has_room,
        assigned=view.assigned_tokens,
    )


def _score(pair: tuple[str, str], front: _PrefillCost, back: _DecodeCost) -> Score:
    return Score(
        prefill=pair[0],
        decode=pair[1],
        queue_s=front.queue_s,
        compute_s=front.compute_s,
        ship_s=back.ship_s,
        decode_s=back.decode_s,
        prefill_hit_tokens=front.hit_tokens,
        decode_hit_tokens=back.hit_tokens,
        has_room=back.has_room,
    )
