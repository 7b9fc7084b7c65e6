"""Which two workers a flight goes to, and what it means for them until their load frames show it.

Knows nothing of queues, prompts or HTTP.
"""

from dataclasses import dataclass

from cluster.fleet import Connection
from cluster.router import Route, WorkerView


class Claim:
    """Prompt tokens sent to a worker, until its load frames must show them."""

    def __init__(self, connection: Connection, num_tokens: int) -> None:
        self._connection = connection
        self._num_tokens = num_tokens
        connection.assigned_tokens += num_tokens

    @property
    def held(self) -> bool:
        return self._num_tokens > 0

    def release(self) -> None:
        self._connection.assigned_tokens -= self._num_tokens
        self._num_tokens = 0


class Place:
    """A request sent to a decode worker, until its load frames must show it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._num_requests = 1
        connection.assigned_requests += 1

    @property
    def held(self) -> bool:
        return self._num_requests > 0

    def release(self) -> None:
        self._connection.assigned_requests -= self._num_requests
        self._num_requests = 0


@dataclass(frozen=True)
class Course:
    """Two workers, and what one flight means for them until that shows in their load frames."""

    route: Route
    prefill: Connection
    decode: Connection
    reading: Claim  # what the prefill worker has to compute
    pages: Claim  # what the decode worker has to keep
    place: Place

    def release(self) -> None:
        for claim in (self.reading, self.pages, self.place):
            claim.release()


def view_of(connection: Connection) -> WorkerView:
    load = connection.load
    return WorkerView(
        worker=connection.info.worker,
        queued_tokens=max(0, load.queued_tokens - connection.assigned_tokens),  # it may show them already
        assigned_tokens=connection.assigned_tokens,
        seconds_per_token=load.seconds_per_token,
        step_seconds=load.step_seconds,
        running=load.running + load.waiting,
        max_running=load.max_running,
        assigned_requests=connection.assigned_requests,
        available_pages=load.free_pages + load.cached_pages,
    )
