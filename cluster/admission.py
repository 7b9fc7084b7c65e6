"""What a request must pass before any work is done for it: the tenant's limits, the gateway's room, its own deadline.

What a request takes it holds in `Call.exits`, which gives it back however the request ends. Knows nothing of bodies or
workers.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence

from cluster.access_log import Call
from cluster.activity import Ending
from cluster.config import ClusterConfig
from cluster.errors import ApiError, InvalidRequest, Overloaded, RateLimited, echo
from cluster.limits import MINUTE_S, Quota, Refusal
from cluster.room import Room
from cluster.tenants import Tenant, Tenants

TIMEOUT_HEADER = "x-request-timeout"
RETRY_AFTER_S = 1  # where it is not known when there will be room
_NAMES = {
    "concurrency": "requests at once",
    "requests_per_minute": "requests a minute",
    "tokens_per_minute": "tokens a minute",
}


class Admission:
    """One gateway's. Where there are several, each lets in its share of a tenant's limits."""

    def __init__(
        self, config: ClusterConfig, tenants: Tenants, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config.gateway
        self._tenants = tenants
        self._clock = clock
        self._quotas: dict[str, Quota] = {}
        self._requests = Room(config.gateway.max_concurrency)
        self._tokens = Room(config.gateway.max_queued_tokens)

    def enter(self, call: Call, tenant: Tenant) -> None:
        """Lets one more request in. Raises RateLimited and Overloaded."""
        quota = self._quota(tenant)
        refusal = quota.enter(self._clock())
        self.show(call, tenant)
        if refusal is not None:
            raise _refused(refusal)
        call.exits.callback(quota.leave)
        self._hold(call, self._requests, tenant, [1], "requests are in progress")

    def reserve(
        self, call: Call, tenant: Tenant, *, prompts: Sequence[int], output_tokens: int
    ) -> list[Callable[[], None]]:
        """Lets its tokens in: those of each prompt, and the most that its answers may have. Raises as `enter`.

        Of each prompt a function, to be called when its first token has been written: the prompt waits no longer.
        """
        quota, num_reserved = self._quota(tenant), sum(prompts) + output_tokens
        refusal = quota.reserve(num_reserved, self._clock())
        self.show(call, tenant)
        if refusal is not None:
            raise _refused(refusal)
        call.exits.callback(lambda: quota.correct(num_reserved, used_tokens(call), self._clock()))
        return self._hold(call, self._tokens, tenant, prompts, "prompt tokens are queued")

    def longest_answer(self, tenant: Tenant, *, prompt_tokens: int, num_answers: int) -> int | None:
        """Tokens of each answer to these prompts that the tenant's limit leaves; None: it has no such limit."""
        limit = self._quota(tenant).limits.tokens_per_minute
        return None if limit is None else max(1, (limit - prompt_tokens) // num_answers)

    def show(self, call: Call, tenant: Tenant) -> None:
        """Puts what is left of the tenant's limits into the headers of the answer, under OpenAI's names."""
        for name, standing in self._quota(tenant).standings(self._clock()).items():
            call.headers[f"x-ratelimit-limit-{name}"] = str(standing.limit)
            call.headers[f"x-ratelimit-remaining-{name}"] = str(standing.remaining)
            call.headers[f"x-ratelimit-reset-{name}"] = duration(standing.reset_s)

    def deadline(self, header: str | None) -> float:
        """When, by the event loop's clock, a request that arrives now has had its time. Raises InvalidRequest."""
        seconds = self._config.request_timeout_s if header is None else self._timeout(header)
        return asyncio.get_running_loop().time() + seconds

    def _timeout(self, header: str) -> float:
        try:
            seconds = float(header)
        except ValueError:
            seconds = math.nan
        most = self._config.max_request_timeout_s
        if not 0 < seconds <= most:
            raise InvalidRequest(
                f"{TIMEOUT_HEADER}: must be seconds above 0 and at most {most:g}, not {echo(header)}",
                param=TIMEOUT_HEADER,
            )
        return seconds

    def _quota(self, tenant: Tenant) -> Quota:
        limits = self._tenants.limits(tenant.name).share(self._config.replicas)
        quota = self._quotas.setdefault(tenant.name, Quota(limits, self._clock()))
        if quota.limits != limits:
            quota.change(limits, self._clock())
        return quota

    def _hold(
        self, call: Call, room: Room, tenant: Tenant, amounts: Sequence[int], what: str
    ) -> list[Callable[[], None]]:
        reason = room.refuses(tenant.name, sum(amounts))
        if reason is not None:
            raise _full(reason, f"{room.held} {what}, of {room.capacity} that this gateway takes")
        holds = [_Hold(room, tenant.name, amount) for amount in amounts]
        for hold in holds:
            call.exits.callback(hold.release)
        return [hold.release for hold in holds]


class _Hold:
    """A part of a room, until it is released for the first time."""

    def __init__(self, room: Room, tenant: str, amount: int) -> None:
        self._room = room
        self._tenant = tenant
        self._amount = amount
        room.take(tenant, amount)

    def release(self) -> None:
        if self._amount:
            self._room.give_back(self._tenant, self._amount)
            self._amount = 0


def used_tokens(call: Call) -> int:
    """Tokens of prompts and answers that a call which is over has cost us: nothing for those that never got a worker."""
    return sum(_used(ending) for ending in call.answer.endings) if call.answer is not None else 0


def duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 7.66s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < MINUTE_S:
        return f"{seconds:.2f}".rstrip("0").rstrip(".") + "s"
    minutes, rest = divmod(math.ceil(seconds), int(MINUTE_S))
    return f"{minutes}m{rest}s"


def _used(ending: Ending) -> int:
    settlement = ending.settlement
    if settlement.finish == "error" or not ending.workers:
        return 0
    return settlement.hit_tokens + settlement.miss_tokens + settlement.output_tokens


def _refused(refusal: Refusal) -> RateLimited:
    limit = f"{refusal.limit}: the limit of {refusal.value} {_NAMES[refusal.limit]}"
    if refusal.wait_s is None:
        return RateLimited(
            f"{limit} is less than this request alone may need: ask for a shorter answer with max_tokens, or send less",
            retry_after_s=None,
        )
    retry_after_s = max(1, math.ceil(refusal.wait_s))
    return RateLimited(f"{limit} is reached; try again in {retry_after_s} s", retry_after_s=retry_after_s)


def _full(reason: str, sentence: str) -> ApiError:
    if reason == "tenant":
        return RateLimited(f"{sentence}; your part of them is used up", retry_after_s=RETRY_AFTER_S)
    return Overloaded(sentence, retry_after_s=RETRY_AFTER_S)
