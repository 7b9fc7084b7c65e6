"""One request with its text and its bill: a flight, detokenised, opened in the ledger before its first token leaves.

Whatever ends it (the model, a stop string, a client that went away, a fault of ours) it is settled once, here.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from cluster.activity import Activity, Ending, workers_of
from cluster.billing import Books
from cluster.errors import ApiError, DeadlineExceeded
from cluster.explanation import Phases
from cluster.flight import Flight, Pilot, Reading
from cluster.metrics import Metrics
from cluster.output import Delta, Output
from cluster.records import Finish, Opening, Settlement, amount
from cluster.responses import Debug, PromptProgress, Timing, Usage
from cluster.tenants import Tenant
from workers.request import TokenLogprobs


@dataclass(frozen=True)
class Part:
    """What one step added to the reply."""

    delta: Delta
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None

    @classmethod
    def joined(cls, parts: Iterable["Part"]) -> "Part":
        """One after another, in one piece."""
        deltas, tokens, logprobs = [Delta()], [], []
        for part in parts:
            deltas.append(part.delta)
            tokens += part.tokens
            logprobs += part.logprobs or []
        return cls(Delta.joined(deltas), tokens, logprobs or None)


class Completion:
    """Iterate over `parts`, then read `finish_reason`, `usage`, `timing`, `debug` and `ending`.

    client_id: what the client calls its request; it stands beside our id in the ledger.
    bills_prompt False: another completion of the same request has the same prompt and pays for it. on_begun: called with
    the first token.
    """

    def __init__(
        self,
        flight: Flight,
        output: Output,
        *,
        tenant: Tenant,
        model: str,
        pilot: Pilot,
        books: Books,
        metrics: Metrics,
        activity: Activity,
        client_id: str | None = None,
        bills_prompt: bool = True,
        on_begun: Callable[[], None] = lambda: None,
    ) -> None:
        self.flight = flight
        self._output = output
        self._tenant = tenant
        self._model = model
        self._pilot = pilot
        self._books = books
        self._metrics = metrics
        self._activity = activity
        self._client_id = client_id
        self.ending: Ending | None = None  # once it is over
        self._bills_prompt = bills_prompt
        self._on_begun = on_begun
        self._price = books.price(time.time())
        self._opening: asyncio.Task[None] | None = None

    @property
    def finish_reason(self) -> str:
        finish = self.flight.finish or "stop"
        if self._output.stopped:
            return "stop"
        return "tool_calls" if finish == "stop" and self._output.has_calls else finish

    @property
    def usage(self) -> Usage:
        settlement = self._settlement("stop")
        return Usage.of(
            hit_tokens=settlement.hit_tokens,
            miss_tokens=settlement.miss_tokens,
            output_tokens=settlement.output_tokens,
            reasoning_tokens=settlement.reasoning_tokens,
            cost_nanodollars=amount(settlement, self._price),
        )

    @property
    def timing(self) -> Timing:
        timing = self.flight.timing
        return Timing(
            queue=timing.queue,
            prefill=timing.prefill,
            ship=timing.ship or 0.0,
            first_token=timing.first_token,
        )

    @property
    def debug(self) -> Debug | UnsetType:
        wanted = self.flight.wants_selected_pages
        return Debug(selected_pages=self.flight.selected_pages) if wanted else UNSET

    async def parts(self) -> AsyncGenerator[Part | PromptProgress, None]:
        """Yields the reply as it comes, and before it its progress where the flight wants that.

        Raises ApiError; close it (contextlib.aclosing) to abort the request.
        """
        finish: Finish = "cancelled"
        self._metrics.started()
        self._activity.started(self.flight, self._tenant)
        try:
            async with contextlib.aclosing(self._pilot.fly(self.flight, on_quote=self._open)) as steps:
                async for step in steps:
                    assert self._opening is not None
                    await self._opening
                    if isinstance(step, Reading):
                        yield PromptProgress(total=step.total, cache=step.cache, processed=step.processed)
                        continue
                    self._on_begun()
                    before = self._output.num_tokens
                    delta = self._output.push(step.tokens)
                    count = self._output.num_tokens - before
                    self._metrics.tokens(self.flight, count)
                    yield Part(delta, step.tokens[:count], step.logprobs and step.logprobs[:count])
                    if self._output.stopped:
                        break
            finish = "length" if self.finish_reason == "length" else "stop"
            rest = self._output.finish(cut=finish == "length")
            if any(rest):
                yield Part(rest, [], None)
        except ApiError as error:
            # Past its deadline a request has had what it asked for: it ends, and is billed, as one whose client left.
            finish = "cancelled" if isinstance(error, DeadlineExceeded) else "error"
            raise
        finally:
            self._settle(finish)

    def _open(self) -> None:
        """Called with the quote; goes on beside the prefill, and the first token waits for it."""
        flight = self.flight
        assert flight.num_quoted is not None
        hit_tokens, miss_tokens = self._prompt_tokens(flight.num_quoted)
        opening = Opening(
            request_id=flight.id,
            tenant=self._tenant.name,
            key_id=self._tenant.key_id,
            model=self._model,
            price=self._price,
            prompt_tokens=hit_tokens + miss_tokens,
            hit_tokens=hit_tokens,
            miss_tokens=miss_tokens,
            time_ms=time.time_ns() // 10**6,
            client_id=self._client_id,
        )
        self._opening = asyncio.create_task(self._books.open(opening))

    def _settle(self, finish: Finish) -> None:
        settlement = self._settlement(finish)
        nanodollars = amount(settlement, self._price)
        self._metrics.ended(self.flight, finish, tenant=self._tenant.name, nanodollars=nanodollars)
        self.ending = Ending(
            tenant=self._tenant,
            settlement=settlement,
            nanodollars=nanodollars,
            phases=Phases.of(self.flight),
            workers=workers_of(self.flight),
        )
        self._activity.ended(self.ending)
        if self._opening is not None:
            self._books.settle(settlement, after=self._opening)

    def _settlement(self, finish: Finish) -> Settlement:
        flight, output = self.flight, self._output
        hit_tokens, miss_tokens = self._prompt_tokens(flight.num_hit)
        return Settlement(
            request_id=flight.id,
            hit_tokens=hit_tokens,
            miss_tokens=miss_tokens,
            output_tokens=output.num_tokens,
            reasoning_tokens=output.num_reasoning_tokens,
            finish=finish,
            resumes=flight.restarts,
            time_ms=time.time_ns() // 10**6,
        )

    def _prompt_tokens(self, num_hit: int) -> tuple[int, int]:
        """Tokens to bill as hit and as miss."""
        return (num_hit, len(self.flight.prompt) - num_hit) if self._bills_prompt else (0, 0)
