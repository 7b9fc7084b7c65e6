"""The prefill role: reads prompts and ships their caches.

Life of a request here:
  1. Prefill arrives with a landing ticket; the engine queues the request.
  2. After each step the pages that became full are handed to the shipper, which packs and sends them while the next
     chunk computes. Pages that the decode worker already holds are left out. A gateway that wants to know is told how far
     the prompt has been read.
  3. The last chunk samples the first token, which goes to the gateway at once. The rest of the pages is shipped, then the
     commit that carries the token.
  4. The pages stay held until the shipper has said that it will not read them again; then they are prefix cache.
"""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from kernels.layout import PAGE_SIZE
from workers.engine import Engine, StepOutput
from workers.messages import Load, Prefill, Progress, Submit, Ticket, Tokens
from workers.ranks.shippers import Shippers
from workers.request import Request
from workers.scheduler import QueueFull
from workers.worker import Emit, Job, Worker

MIN_MEASURED_TOKENS = 256
SMOOTHING = 0.2  # weight of the newest step in the moving averages that routing reads


@dataclass(eq=False, kw_only=True)
class PrefillJob(Job):
    ticket: Ticket
    num_pages: int  # of the prompt
    num_shipped: int  # leading pages that are on their way, or need none
    progress: bool  # whether its gateway wants to know how far it is
    over: bool = False  # nothing more will be shipped for it; waiting for the shipper's last word


class PrefillWorker(Worker):
    """`make_shipper(on_done, on_failed)` builds the sending half of the links; its callbacks may come on any thread."""

    jobs: dict[str, PrefillJob]  # type: ignore[assignment]

    def __init__(
        self,
        *,
        worker_id: str,
        epoch: int,
        engine: Engine,
        emit: Emit,
        make_shipper: Callable[[Callable[[str], None], Callable[[str, str], None]], Shippers],
    ) -> None:
        super().__init__(worker_id=worker_id, epoch=epoch, engine=engine, emit=emit)
        self._seconds_per_token = 0.0
        self.shipper = make_shipper(
            lambda request_id: self.post(lambda: self._shipping_over(request_id, None)),
            lambda request_id, reason: self.post(lambda: self._shipping_over(request_id, reason)),
        )

    def _accept(self, message: Submit, owner: Hashable) -> None:
        assert isinstance(message, Prefill)
        request = Request(
            id=message.request_id,
            tokens=list(message.tokens),
            num_prompt_tokens=message.num_prompt_tokens,
            sampling=message.sampling,
            namespace=message.namespace,
            num_public_pages=message.num_public_pages,
            hold_pages=True,
            one_token=True,
        )
        job = PrefillJob(
            request,
            owner,
            ticket=message.ticket,
            num_pages=len(message.ticket.pages),
            num_shipped=message.ticket.num_resident_tokens // PAGE_SIZE,
            progress=message.progress,
            num_reported=request.num_output_tokens,
        )
        try:
            self.engine.add(request)
        except QueueFull as error:
            self._fail(job, str(error), retry=True)
        except ValueError as error:
            self._fail(job, str(error), retry=False)
        else:
            self.jobs[request.id] = job
            self._watch_grammar(job)

    def abort(self, request_id: str) -> None:
        job = self.jobs.get(request_id)
        if job is None or job.over:
            return
        self.engine.abort(request_id)
        job.over = True
        self.shipper.abandon(job.ticket)

    def load(self) -> Load:
        return self.engine.load(
            seconds_per_token=self._seconds_per_token,
            peers=self.shipper.peers(),
            counters=self.shipper.counters(),
        )

    def _after_step(self, output: StepOutput) -> None:
        now = time.monotonic()
        self._measure(sum(scheduled.num_tokens for scheduled in output.scheduled), output.seconds)
        for scheduled in output.scheduled:
            job = self.jobs[scheduled.request.id]
            job.first_step_at = job.first_step_at or now - output.seconds
            self._ship(job, scheduled.request.num_computed_tokens // PAGE_SIZE)
            if job.progress:
                self._report(job)
        for result in output.results:
            job = self.jobs[result.request.id]
            self._ship(job, job.num_pages)
            assert job.first_step_at is not None
            finish = None if result.finish == "prefilled" else result.finish
            self._send(
                job,
                Tokens(
                    request_id=job.request.id,
                    start=job.num_reported,
                    tokens=[result.token],
                    logprobs=None if result.logprobs is None else [result.logprobs],
                    finish=finish,
                    num_cached_tokens=job.request.num_cached_tokens,
                    queued_s=job.first_step_at - job.arrived_at,
                    prefill_s=now - job.first_step_at,
                ),
            )
            self.shipper.commit(job.ticket, result.token, finish)

    def _report(self, job: PrefillJob) -> None:
        request = job.request
        assert request.num_cached_tokens is not None
        self._send(job, Progress(request.id, request.num_computed_tokens, request.num_cached_tokens))

    def _measure(self, num_tokens: int, seconds: float) -> None:
        """Small steps say more about overhead than about speed: after one of them alone a worker would look slow."""
        if num_tokens < MIN_MEASURED_TOKENS:
            return
        rate = seconds / num_tokens
        self._seconds_per_token += (
            SMOOTHING * (rate - self._seconds_per_token) if self._seconds_per_token else rate
        )

    def _ship(self, job: PrefillJob, num_ready: int) -> None:
        """Hands over the pages up to `num_ready`; pages are immutable from here on."""
        indices = list(range(job.num_shipped, min(num_ready, job.num_pages)))
        if indices:
            self.shipper.ship(job.ticket, indices, [job.request.pages[i] for i in indices])
            job.num_shipped = indices[-1] + 1

    def _shipping_over(self, request_id: str, reason: str | None) -> None:
        """The shipper's last word on a request: its pages may be let go."""
        job = self.jobs.pop(request_id)
        if reason is not None and not job.over:
            self.engine.abort(request_id)
            self._fail(job, reason, retry=True)
        self.engine.release(request_id)
