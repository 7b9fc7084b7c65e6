"""The loop of one worker: schedule, run, sample, update. Synchronous. Knows nothing of threads, sockets, Ray or HTTP."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from workers.config import EngineConfig
from workers.grammar import Grammars
from workers.messages import Load
from workers.page_pool import PagePool
from workers.page_pools import PagePools
from workers.request import Request, TokenLogprobs
from workers.sampler import sample
from workers.scheduler import Plan, Scheduled, Scheduler


@dataclass(frozen=True)
class Result:
    """One new token. `finish`: "stop", "length", "prefilled", or None if the request goes on."""

    request: Request
    token: int
    logprobs: TokenLogprobs | None
    finish: str | None


@dataclass(frozen=True)
class StepOutput:
    """What one step did.

    scheduled: what was computed; request.num_computed_tokens is now item.end. results: the requests that caught up.
    preempted: requests that lost their pages and wait again. failed: requests that ended because their grammar cannot be
    followed, and why. seconds: wall time of the step.
    """

    scheduled: list[Scheduled]
    results: list[Result]
    preempted: list[Request]
    failed: list[tuple[Request, str]]
    seconds: float


class Runs(Protocol):
    """Computes a step: on this rank alone, or on all ranks of the worker."""

    def run(self, plan: Plan) -> torch.Tensor:
        """fp32 [S, V]: the logits of the last row of each request of plan.sampling."""

    def record(self) -> None:
        """Records what can be replayed later, once everything is loaded."""

    def check(self) -> None:
        """Raises if no step can be computed any more."""

    def close(self) -> None:
        """Ends what computes elsewhere."""


class Engine:
    """Serves requests with one model. `num_pages` are those of each of `num_pools` ranks with pages of their own, `max_context` is the most tokens of prompt and output a request may have."""

    def __init__(
        self,
        runner: Runs,
        *,
        num_pages: int,
        num_pools: int = 1,
        config: EngineConfig,
        eos_token_ids: Collection[int],
        max_context: int,
        grammars: Grammars | None = None,
    ) -> None:
        """grammars: None where no request has one."""
        self.config = config
        self.pools = PagePools([PagePool(num_pages) for _ in range(num_pools)])
        self._runner = runner
        self._eos_token_ids = eos_token_ids
        self._grammars = grammars
        self._scheduler = Scheduler(self.pools, config, eos_token_ids=eos_token_ids, max_context=max_context)

    def check_fits(self, request: Request) -> None:
        """Raises ValueError if the request could not be served even by an empty engine."""
        self._scheduler.check_fits(request)

    def add(self, request: Request) -> None:
        """Queues a request. Raises ValueError if it can never be served, QueueFull (a ValueError) if too many wait."""
        self._scheduler.add(request)
        self._begin_grammar(request)

    def reserve(self, request: Request) -> bool:
        """Pages for a prompt that a prefill worker will fill: all of them now, or False."""
        reserved = self._scheduler.reserve(request)
        if reserved:
            self._begin_grammar(request)
        return reserved

    def landed(self, request_id: str, page_index: int) -> None:
        """A page of a reserved request has arrived and was verified."""
        self._scheduler.landed(request_id, page_index)

    def join(self, request_id: str, first_token: int) -> str | None:
        """A reserved request starts to run; the finish reason if its first token is also its last."""
        reason = self._scheduler.join(request_id, first_token)
        self._check_if_idle()
        return reason

    def abort(self, request_id: str) -> bool:
        """Ends a request in any state; False if there is none of this id that has not ended."""
        aborted = self._scheduler.abort(request_id)
        self._check_if_idle()
        return aborted

    def release(self, request_id: str) -> bool:
        """Lets go of the pages of a `hold_pages` request that has ended; False if the id is unknown."""
        released = self._scheduler.release(request_id)
        self._check_if_idle()
        return released

    def has_work(self) -> bool:
        """Whether a step has something to do. If not, only another call can change that."""
        return self._scheduler.has_work()

    def step(self) -> StepOutput:
        started = time.perf_counter()
        plan = self._scheduler.schedule()
        requests = plan.sampling
        tokens: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        failed: dict[str, str] = {}
        if plan.scheduled:
            logits = self._runner.run(plan)
            masks, failed = (
                self._grammars.masks(requests) if self._grammars else (None, failed)
            )  # beside a GPU
            tokens, logprobs = sample(logits, requests, self._eos_token_ids, masks)
        self._scheduler.update(plan, tokens)
        for request_id in failed:
            self._scheduler.abort(request_id)
        results = [
            Result(request, token, logprob, request.finish_reason)
            for request, token, logprob in zip(requests, tokens, logprobs, strict=True)
            if request.id not in failed
        ]
        self._check_if_idle()
        return StepOutput(
            scheduled=plan.scheduled,
            results=results,
            preempted=plan.preempted,
            failed=[(request, failed[request.id]) for request in requests if request.id in failed],
            seconds=time.perf_counter() - started,
        )

    def check(self) -> None:
        """Raises if the engine cannot go on, even if there is nothing to do."""
        self._runner.check()

    def close(self) -> None:
        """Ends the other ranks of the worker. Safe to call twice."""
        self._runner.close()
        if self._grammars:
            self._grammars.close()

    def load(self, *, extra_waiting: int = 0, **figures: Any) -> Load:
        """How busy the engine is. `extra_waiting` requests wait outside; `figures` are further fields of Load."""
        return Load(
            waiting=self._scheduler.num_waiting + extra_waiting,
            running=self._scheduler.num_running,
            max_running=self.config.max_running,
            queued_tokens=self._scheduler.num_queued_tokens,
            free_pages=self.pools.free,
            cached_pages=self.pools.cached,
            held_pages=self.pools.held,
            **figures,
        )

    def _begin_grammar(self, request: Request) -> None:
        if self._grammars:
            self._grammars.begin(request)

    def _check_if_idle(self) -> None:
        if not self._scheduler.num_running and not self._scheduler.num_waiting:
            self._scheduler.check()
