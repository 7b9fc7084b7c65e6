"""Why a request went where it did, for clients that ask with the header `x-explain-routing: 1`.

Made from what the flight wrote down: nothing is computed for it, and routing is the same without it. Knows nothing of HTTP.
"""

from msgspec import Struct

from cluster.errors import InvalidRequest, echo
from cluster.flight import Attempt, Flight
from cluster.router import Score

HEADER = "x-explain-routing"


class Alternative(Struct, frozen=True, kw_only=True):
    """A pair that could have been chosen. `seconds`: its expected time to first token, the sum of the four after it."""

    prefill: str
    decode: str
    seconds: float
    queue: float  # prompt tokens ahead of it at the prefill worker
    compute: float  # prompt tokens that the prefill worker does not hold
    ship: float  # prompt tokens that the decode worker does not hold
    decode_step: float  # the decode worker's step, and how full it is
    prefill_hit_tokens: int
    decode_hit_tokens: int
    has_room: bool  # the decode worker has pages for the prompt; without, it is a last resort


class RoutingAttempt(Struct, frozen=True, kw_only=True):
    """The workers chosen, and among how many pairs. `failure`: why other workers had to go on."""

    id: str  # in the workers' logs
    prefill: str
    decode: str
    hit_tokens: int  # that the better of the two holds; of the first attempt: the quote
    num_pairs: int
    alternatives: list[Alternative]  # the best of the pairs, best first; the first was chosen
    failure: str | None


class Phases(Struct, frozen=True, kw_only=True):
    """Seconds. queue: at the gateway and at the prefill worker before its first step; ship: from the first token until the
    caches had landed; first_token and total: since the whole body had been read."""

    queue: float
    prefill: float
    ship: float
    first_token: float
    total: float

    @classmethod
    def of(cls, flight: Flight) -> "Phases":
        timing = flight.timing
        return cls(
            queue=timing.queue,
            prefill=timing.prefill,
            ship=timing.ship or 0.0,
            first_token=timing.first_token,
            total=timing.total,
        )


class Routing(Struct, frozen=True, kw_only=True):
    """Of one choice of an answer."""

    index: int
    attempts: list[RoutingAttempt]
    phases: Phases


def is_wanted(header: str | None) -> bool:
    """Reads the header. Raises InvalidRequest."""
    if header not in (None, "0", "1"):
        raise InvalidRequest(f"{HEADER}: must be 0 or 1, not {echo(header)}", param=HEADER)
    return header == "1"


def explain(index: int, flight: Flight) -> Routing:
    """What became of a flight that is over."""
    attempts = [_attempt(attempt) for attempt in flight.attempts]
    return Routing(index=index, attempts=attempts, phases=Phases.of(flight))


def _attempt(attempt: Attempt) -> RoutingAttempt:
    route = attempt.route
    return RoutingAttempt(
        id=attempt.id,
        prefill=route.prefill,
        decode=route.decode,
        hit_tokens=route.quote,
        num_pairs=route.num_pairs,
        alternatives=[_alternative(score) for score in route.alternatives],
        failure=attempt.failure,
    )


def _alternative(score: Score) -> Alternative:
    return Alternative(
        prefill=score.prefill,
        decode=score.decode,
        seconds=score.seconds,
        queue=score.queue_s,
        compute=score.compute_s,
        ship=score.ship_s,
        decode_step=score.decode_s,
        prefill_hit_tokens=score.prefill_hit_tokens,
        decode_hit_tokens=score.decode_hit_tokens,
        has_room=score.has_room,
    )
