"""An engine on a thread of its own: the part that the prefill and the decode role share.

Everything that touches pages happens on the engine thread. Other threads (gateway connections, shipping links) only post
commands to its inbox. Once a step, all updates leave together through `emit`. Knows nothing of sockets, Ray or HTTP.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from workers.cpu_threads import use_threads
from workers.engine import Engine, StepOutput
from workers.grammar import GrammarError
from workers.messages import Failed, Load, Submit, Update
from workers.request import Request, Status

log = logging.getLogger(__name__)

T = TypeVar("T")
Emit = Callable[[list[tuple[Hashable, Update]]], None]
IDLE_S = 0.1  # how long an idle engine thread sleeps before it shows that it is alive


@dataclass(eq=False)
class Job:
    """A request and what its role remembers of it. `owner` is the gateway connection that submitted it."""

    request: Request
    owner: Hashable
    arrived_at: float = field(default_factory=time.monotonic)
    first_step_at: float | None = None
    num_reported: int = 0  # output tokens the gateway has been told of


class Worker:
    """Subclasses add what a role does with a message, a step's output and a shipment."""

    def __init__(self, *, worker_id: str, epoch: int, engine: Engine, emit: Emit) -> None:
        self.id = worker_id
        self.epoch = epoch
        self.engine = engine
        self.jobs: dict[str, Job] = {}
        self.on_orphan: Callable[[str, int], None] = lambda request_id, num_output_tokens: None
        self.alive_at = time.monotonic()
        self.busy_seconds = 0.0  # in steps, since the start
        self.latest_load = Load()  # as of the last step; safe to read from any thread
        self.error: BaseException | None = None
        self._emit = emit
        self._updates: list[tuple[Hashable, Update]] = []
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._draining = False
        self._drained = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"engine-{worker_id}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the engine thread. Safe to call twice."""
        self._stopping = True
        self.post(lambda: None)
        if self._thread.is_alive():
            self._thread.join()

    def drain(self, timeout: float) -> bool:
        """Takes no more requests and waits until those that it has have ended; False where `timeout` seconds were too few."""
        self.post(self._begin_draining)
        return self._drained.wait(timeout) and self.error is None

    def post(self, command: Callable[[], None]) -> None:
        """Runs `command` on the engine thread before the next step."""
        self._inbox.put(command)

    def ask(self, question: Callable[[], T]) -> Future[T]:
        """As `post`, for a thread that wants the answer."""
        answer: Future[T] = Future()
        self.post(lambda: answer.set_result(question()))
        return answer

    # From here on everything runs on the engine thread.

    def submit(self, message: Submit, owner: Hashable) -> None:
        if self._draining:  # sent before the gateway heard of it
            self._updates.append((owner, Failed(message.request_id, "the worker is draining", retry=True)))
        else:
            self._accept(message, owner)

    def abort(self, request_id: str) -> None:
        """Ends a request without a word to its gateway, in whatever state it is. Unknown ids are fine."""
        raise NotImplementedError

    def abort_owner(self, owner: Hashable) -> None:
        """A gateway has gone: its requests end, and what they had emitted is reported for the ledger."""
        for request_id, job in list(self.jobs.items()):
            if job.owner == owner:
                self.on_orphan(request_id, job.request.num_output_tokens)
                self.abort(request_id)

    def load(self) -> Load:
        raise NotImplementedError

    def _accept(self, message: Submit, owner: Hashable) -> None:
        raise NotImplementedError

    def _begin_draining(self) -> None:
        self._draining = True

    def _after_step(self, output: StepOutput) -> None:
        raise NotImplementedError

    def _send(self, job: Job, update: Update) -> None:
        self._updates.append((job.owner, update))

    def _fail(self, job: Job, reason: str, *, retry: bool, grammar: bool = False) -> None:
        self._send(job, Failed(job.request.id, reason, retry, grammar))

    def _watch_grammar(self, job: Job) -> None:
        """Ends an accepted request, if it has a grammar, as soon as that turns out to be wrong."""
        compiled: Future[Any] | None = job.request.matcher
        if compiled is not None:
            compiled.add_done_callback(lambda _: self.post(lambda: self._compiled(job, compiled)))

    def _compiled(self, job: Job, compiled: Future[Any]) -> None:
        error = compiled.exception()
        if isinstance(error, GrammarError) and job.request.status is not Status.FINISHED:
            self._end_for_grammar(job, str(error))

    def _end_for_grammar(self, job: Job, reason: str) -> None:
        self._fail(job, reason, retry=False, grammar=True)
        self.abort(job.request.id)

    def _run(self) -> None:
        if self.engine.config.threads is not None:
            use_threads(self.engine.config.threads)
        try:
            while not self._stopping:
                self._run_commands()
                self.engine.check()
                if self.engine.has_work():
                    output = self.engine.step()
                    self.busy_seconds += output.seconds
                    self._after_step(output)
                    for request, reason in output.failed:
                        self._end_for_grammar(self.jobs[request.id], reason)
                self._flush()
                self.alive_at = time.monotonic()
        except (
            BaseException
        ) as error:  # the outermost loop: the health check reports it and Serve replaces the worker
            self.error = error
            self._drained.set()
            log.exception("worker %s: engine thread died", self.id)

    def _run_commands(self) -> None:
        timeout = 0.0 if self.engine.has_work() else IDLE_S
        try:
            self._inbox.get(timeout=timeout)() if timeout else self._inbox.get_nowait()()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return

    def _flush(self) -> None:
        self.latest_load = msgspec.structs.replace(self.load(), draining=self._draining)
        if self._updates:
            updates, self._updates = self._updates, []
            self._emit(updates)
        if self._draining and not self.jobs:
            self._drained.set()
