"""A follower's copies of the leader's requests: told in full once, then only what is new. Knows nothing of tensors."""

from collections.abc import Iterable
from dataclasses import dataclass

from kernels.layout import PAGE_SIZE
from workers.ranks.messages import Known, Step
from workers.request import Request, SamplingParams, Status
from workers.scheduler import Lockstep, Plan, Scheduled

_UNUSED = SamplingParams(max_tokens=0)  # the leader samples


@dataclass
class _Told:
    """What a follower knows of a request. `pages` is the leader's own list: a preempted request gets another one."""

    request: Request
    pages: list[int]
    num_tokens: int = 0
    num_pages: int = 0


class Teller:
    """The leader's side, for one follower."""

    def __init__(self) -> None:
        self._told: dict[str, _Told] = {}

    def forget(self) -> list[str]:
        """Requests that the follower knows and that have ended."""
        gone = [name for name, told in self._told.items() if told.request.status is Status.FINISHED]
        for name in gone:
            del self._told[name]
        return gone

    def known(self, items: Iterable[Scheduled]) -> list[Known]:
        """What must be told before a step with these items."""
        requests = {item.request.id: item.request for item in items}.values()
        return [known for request in requests if (known := self._news(request)) is not None]

    def _news(self, request: Request) -> Known | None:
        told = self._told.setdefault(request.id, _Told(request, request.pages))
        if told.pages is not request.pages:
            told.pages, told.num_pages = request.pages, 0
        known = Known(
            request_id=request.id,
            tokens_from=told.num_tokens,
            tokens=request.tokens[told.num_tokens :],
            pages_from=told.num_pages,
            pages=request.pages[told.num_pages :],
        )
        told.num_tokens, told.num_pages = len(request.tokens), len(request.pages)
        return known if known.tokens or known.pages else None


class Mirror:
    """The follower's side."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}

    def plan(self, step: Step) -> list[Scheduled]:
        """The step's items, after learning what it tells."""
        for request_id in step.forget:
            del self._requests[request_id]
        for known in step.known:
            self._learn(known)
        return [Scheduled(self._requests[name], start, end - start) for name, start, end in step.items]

    def _learn(self, known: Known) -> None:
        request = self._requests.get(known.request_id)
        if request is None:
            request = Request(known.request_id, [], 0, _UNUSED, b"")
            self._requests[request.id] = request
        request.tokens[known.tokens_from :] = known.tokens
        request.pages[known.pages_from :] = known.pages


def part(items: list[Scheduled], lockstep: Lockstep, *, spare_page: int) -> Plan:
    """One rank's part of a step. Unless it is replayed, with rows for nothing if other ranks have more.

    Those rows are of a request that sees only itself, on a page that is nobody's.
    """
    missing = 0 if lockstep.replays else lockstep.num_rows - sum(item.num_tokens for item in items)
    nothing = Request("", [0] * (PAGE_SIZE + 1), 0, _UNUSED, b"", pages=[spare_page])
    fill = [Scheduled(nothing, 0, min(PAGE_SIZE, missing - done)) for done in range(0, missing, PAGE_SIZE)]
    return Plan(scheduled=[*items, *fill], preempted=[], lockstep=lockstep)
