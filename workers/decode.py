"""The decode role: receives caches and writes answers.

Life of a request here:
  1. Reserve arrives: pages for the whole prompt are taken as soon as there are enough, and a landing ticket goes back. It
     names the leading pages this worker already holds.
  2. Shipments arrive from the prefill worker. Epochs and generations are checked before anything is written, checksums as
     pages are written; the link learns how that went while the engine goes on. A page whose every layer has landed is
     published as prefix cache, even if the request fails later.
  3. The commit arrives with the first token: the request joins the running batch.
  4. Tokens go to the gateway, one update a step, until the request ends; its pages stay as prefix cache.
"""

import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from kernels.layout import PAGE_SIZE
from workers.engine import Engine, StepOutput
from workers.messages import Landed, Load, Reserve, Submit, Ticket, Ticketed, Tokens
from workers.page_counts import PageCounts
from workers.paged_cache import PagedCache
from workers.prefill import SMOOTHING
from workers.ranks.landings import Landings
from workers.ranks.messages import rank_name
from workers.request import Request, Status
from workers.shipping.receiver import Commit, Shipment, staleness, write
from workers.worker import Emit, Job, Worker


@dataclass(eq=False, kw_only=True)
class DecodeJob(Job):
    missing: dict[int, int] = field(default_factory=dict)  # page index -> layers x kinds that have not landed
    num_commits: int = 0
    landed_at: float | None = None  # until that has been reported


class DecodeWorker(Worker):
    """`landing` is the receiving half of the links; its callbacks may come on any thread. `cache` is rank 0's."""

    jobs: dict[str, DecodeJob]  # type: ignore[assignment]

    def __init__(
        self, *, worker_id: str, epoch: int, engine: Engine, emit: Emit, cache: PagedCache, landing: Landings
    ) -> None:
        super().__init__(worker_id=worker_id, epoch=epoch, engine=engine, emit=emit)
        self._cache = cache
        self._landing = landing
        self._waiting: deque[DecodeJob] = deque()
        self._max_waiting = engine.config.max_waiting
        self._step_seconds = 0.0
        landing.on_shipment = lambda shipment: self.post(lambda: self._land(shipment))
        landing.on_verified = lambda shipment: self.post(lambda: self._verified(shipment))
        landing.on_landed = lambda *landed: self.post(lambda: self._landed_elsewhere(*landed))
        landing.on_commit = lambda commit: self.post(lambda: self._commit(commit))
        landing.on_abandon = lambda request_id: self.post(lambda: self._abandoned(request_id))

    def _accept(self, message: Submit, owner: Hashable) -> None:
        assert isinstance(message, Reserve)
        request = Request(
            id=message.request_id,
            tokens=list(message.tokens),
            num_prompt_tokens=message.num_prompt_tokens,
            sampling=message.sampling,
            namespace=message.namespace,
            num_public_pages=message.num_public_pages,
            # The first row computed here is that of the token which the prefill worker samples.
            page_counts=PageCounts(len(message.tokens)) if message.selected_pages else None,
        )
        job = DecodeJob(
            request, owner, num_reported=request.num_output_tokens + 1
        )  # the first token comes from prefill
        if len(self._waiting) >= self._max_waiting:
            self._fail(job, f"{len(self._waiting)} requests already wait for pages", retry=True)
            return
        try:
            self.engine.check_fits(request)
        except ValueError as error:
            self._fail(job, str(error), retry=False)
            return
        self.jobs[request.id] = job
        self._waiting.append(job)
        self._reserve_waiting()

    def abort(self, request_id: str) -> None:
        job = self.jobs.pop(request_id, None)
        if job is None:
            return
        if job in self._waiting:
            self._waiting.remove(job)
        else:
            self.engine.abort(request_id)
            self._landing.forget(job.request.rank, request_id)
        self._reserve_waiting()

    def load(self) -> Load:
        return self.engine.load(
            extra_waiting=len(self._waiting),
            step_seconds=self._step_seconds if self.engine.has_work() else 0.0,  # nothing to wait for
            peers=self._landing.peers(),
            counters=self._landing.counters(),
        )

    def _begin_draining(self) -> None:
        """Those that wait for pages need not wait here."""
        super()._begin_draining()
        while self._waiting:
            job = self._waiting.popleft()
            del self.jobs[job.request.id]
            self._fail(job, "the worker is draining", retry=True)

    def _reserve_waiting(self) -> None:
        """Gives out tickets in order of arrival, as far as the pages go."""
        while self._waiting and self.engine.reserve(self._waiting[0].request):
            job = self._waiting.popleft()
            request = job.request
            num_resident = request.num_computed_tokens
            parts = 2 * self._cache.latent.shape[0]  # latents and index keys of every layer
            job.missing = dict.fromkeys(range(num_resident // PAGE_SIZE, len(request.pages)), parts)
            pool, landing = self.engine.pools[request.rank], rank_name(self.id, request.rank)
            generations = [pool.generation(page) for page in request.pages]
            ticket = Ticket(landing, self.epoch, request.id, list(request.pages), generations, num_resident)
            self._landing.expect(request.rank, ticket)
            self._send(job, Ticketed(request.id, ticket))
            self._watch_grammar(job)

    def _land(self, shipment: Shipment) -> None:
        if shipment.passes(self._objection(shipment)):
            write(shipment, self._cache)

    def _verified(self, shipment: Shipment) -> None:
        """Its pages are written and right; they count unless their request has ended meanwhile."""
        if not shipment.passes(self._objection(shipment)):
            return
        self._landed(self.jobs[shipment.request_id], shipment.page_indices, shipment.num_layers)
        shipment.accept()

    def _objection(self, shipment: Shipment) -> str | None:
        """The reason not to take it, if there is one."""
        job = self.jobs.get(shipment.request_id)
        if job is None or job.request.status is not Status.LANDING or job.request.rank:
            return "no such request is landing here"
        if not _expected(shipment, job):
            return "pages that the ticket does not name, or that have landed already"
        return staleness(shipment, generation_of=self.engine.pools[0].generation, epoch=self.epoch)

    def _landed_elsewhere(self, request_id: str, page_indices: list[int], num_layers: int) -> None:
        """Another rank has verified and written pages of its own."""
        job = self.jobs.get(request_id)
        if job is not None and job.request.status is Status.LANDING:
            self._landed(job, page_indices, num_layers)

    def _landed(self, job: DecodeJob, page_indices: list[int], num_layers: int) -> None:
        for index in page_indices:
            job.missing[index] -= num_layers
            if not job.missing[index]:
                del job.missing[index]
                self.engine.landed(job.request.id, index)

    def _commit(self, commit: Commit) -> None:
        job = self.jobs.get(commit.request_id)
        if job is None or job.request.status is not Status.LANDING:
            return  # aborted while the commit was under way
        job.num_commits += 1
        if job.num_commits < commit.num_commits:
            return  # other ranks of the prefill worker have pages under way
        if job.missing:
            self._end(job)
            self._fail(job, f"{len(job.missing)} pages of the prompt never landed", retry=True)
            return
        job.landed_at = time.monotonic()
        self._send(job, Landed(commit.request_id))
        if self.engine.join(commit.request_id, commit.token) is not None:
            self._end(job)

    def _abandoned(self, request_id: str) -> None:
        job = self.jobs.get(request_id)
        if job is not None and job.request.status is Status.LANDING:
            self._end(job)
            self._fail(job, "the prefill worker gave the request up", retry=True)

    def _end(self, job: DecodeJob) -> None:
        """Forgets the job and lets its pages go; what was published stays as prefix cache."""
        self.abort(job.request.id)

    def _after_step(self, output: StepOutput) -> None:
        self._step_seconds += (
            SMOOTHING * (output.seconds - self._step_seconds) if self._step_seconds else output.seconds
        )
        now = time.monotonic()
        for result in output.results:
            job = self.jobs[result.request.id]
            decode_s = 0.0 if job.landed_at is None else now - job.landed_at
            job.landed_at = None
            counts: PageCounts | None = job.request.page_counts if result.finish is not None else None
            self._send(
                job,
                Tokens(
                    request_id=job.request.id,
                    start=job.num_reported,
                    tokens=[result.token],
                    logprobs=None if result.logprobs is None else [result.logprobs],
                    finish=result.finish,
                    selected_pages=None if counts is None else counts.tolist(),
                    num_cached_tokens=job.request.num_cached_tokens,
                    decode_s=decode_s,
                ),
            )
            job.num_reported += 1
            if result.finish is not None:
                del self.jobs[job.request.id]
        self._reserve_waiting()


def _expected(shipment: Shipment, job: DecodeJob) -> bool:
    pages = job.request.pages
    return all(
        index in job.missing and pages[index] == page
        for index, page in zip(shipment.page_indices, shipment.header.page_ids, strict=True)
    )
