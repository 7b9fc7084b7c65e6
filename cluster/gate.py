"""The gateway's one queue of requests, before any worker: a request passes when workers have use for it, tenants by turns.

Workers take requests in order of arrival, so whatever waits there waits unfairly. Therefore they are given no more than keeps
them busy: prefill workers about WINDOW_S of work ahead, decode workers no more requests than they run at once. Knows
nothing of HTTP or money.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from cluster.fair_queue import FairQueue
from cluster.router import WorkerView
from kernels.layout import PAGE_SIZE

WINDOW_S = (
    0.5  # of prompt tokens that a prefill worker is given ahead; covers a gateway's and a ticket's delay
)
FIRST_WINDOW = 512  # tokens ahead of one that has not measured its speed: enough for a step that it measures
OUTPUT_COST = 2  # an output token in prompt tokens, as virtual token counters usually weigh it
LOOK_S = 0.25
SOON_S = 0.01

T = TypeVar("T")
G = TypeVar("G")


@dataclass(eq=False)
class _Waiting(Generic[T, G]):
    item: T
    turn: "asyncio.Future[G]"


class Gate(Generic[T, G]):
    """`admit` is asked for the item whose turn it is: what it gets, or None while workers have no use for it.

    `look` or `look_soon` must be called whenever that may have changed. `take_back` gets what was given to one that has gone by then.
    """

    def __init__(self, admit: Callable[[T], G | None], take_back: Callable[[G], None]) -> None:
        self._admit = admit
        self._take_back = take_back
        self._queue: FairQueue[_Waiting[T, G]] = FairQueue()
        self._looking: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._queue)

    async def wait(self, flow: str, cost: int, item: T, *, give_up: Callable[[float], None]) -> G:
        """Returns what `admit` gave. Now and then `give_up` is called with the seconds waited, and may raise."""
        waiting: _Waiting[T, G] = _Waiting(item, asyncio.get_running_loop().create_future())
        since = time.monotonic()
        self._queue.push(flow, cost, waiting)
        self.look()
        try:
            while not waiting.turn.done():
                await asyncio.wait([waiting.turn], timeout=LOOK_S)
                if not waiting.turn.done():
                    give_up(time.monotonic() - since)
        except BaseException:
            if waiting.turn.done():
                self._take_back(waiting.turn.result())
            else:
                self._queue.remove(flow, waiting)
            self.look()
            raise
        return waiting.turn.result()

    def charge(self, flow: str, num_output_tokens: int) -> None:
        """Tokens that a request of this flow has written."""
        self._queue.charge(flow, OUTPUT_COST * num_output_tokens)

    def look_soon(self) -> None:
        """As `look`, for what happens thousands of times a second."""
        if self._queue and self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(SOON_S, self.look)

    def look(self) -> None:
        """Lets through whatever workers have use for now."""
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        while (waiting := self._queue.peek()) is not None:
            granted = self._admit(waiting.item)
            if granted is None:
                return
            self._queue.pop()
            waiting.turn.set_result(granted)


def have_room(num_tokens: int, *, prefills: Sequence[WorkerView], decodes: Sequence[WorkerView]) -> bool:
    """Whether a prefill worker will soon have nothing to do, and a decode worker has a place for one more request.

    num_tokens: to be in the caches
    """
    step_s = max((view.step_seconds for view in decodes), default=0.0)  # a ticket waits for a step that runs
    return any(_is_nearly_idle(view, step_s) for view in prefills) and any(
        _has_place(view, num_tokens) for view in decodes
    )


def _is_nearly_idle(view: WorkerView, step_s: float) -> bool:
    ahead, rate = view.queued_tokens + view.assigned_tokens, view.seconds_per_token
    return ahead * rate < WINDOW_S + step_s if rate else ahead < FIRST_WINDOW


def _has_place(view: WorkerView, num_tokens: int) -> bool:
    taken = view.running + view.assigned_requests
    if not taken:
        return True  # whether the request fits at all is the worker's to say
    needed = (
        -(-num_tokens // PAGE_SIZE) + taken
    )  # a page to grow for each, or they would lose theirs to each other
    return taken < view.max_running and view.available_pages - view.assigned_tokens // PAGE_SIZE >= needed
