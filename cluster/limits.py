"""How much a tenant may ask for: requests and tokens a minute, and requests at once. Pure: whoever calls brings the time.

A bucket holds at most one minute's limit and fills at the limit's rate, so that in any window of w seconds no more than
limit + limit * w / 60 is let in. Tokens are reserved on arrival for the longest answer that is asked for; what was not used
goes back at the end. Knows nothing of HTTP or of who a tenant is.
"""

import math
from typing import Annotated

import msgspec

MINUTE_S = 60.0
AtLeastOne = Annotated[int, msgspec.Meta(ge=1, le=2**53)]


class TenantLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """None: no limit."""

    requests_per_minute: AtLeastOne | None = None
    tokens_per_minute: AtLeastOne | None = None  # of prompts and answers
    concurrency: AtLeastOne | None = None  # requests at once

    def share(self, gateways: int) -> "TenantLimits":
        """What one of so many gateways may let in. Rounded up: a limit of 1 must not become 0."""
        values = msgspec.structs.asdict(self).items()
        return TenantLimits(
            **{name: None if value is None else math.ceil(value / gateways) for name, value in values}
        )


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Which limit is reached, and after how many seconds it may be worth trying again; None: never."""

    limit: str  # its name in TenantLimits
    value: int
    wait_s: float | None


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What a limit leaves. `reset_s`: seconds until all of it is there again if nothing is asked for meanwhile."""

    limit: int
    remaining: int
    reset_s: float


class Bucket:
    """What is left of one limit a minute. Full at the start."""

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._at = now

    def wait_s(self, amount: int, now: float) -> float | None:
        """Seconds until `amount` can be taken; 0: now; None: never, it is more than a full bucket."""
        self._fill(now)
        if amount > self.limit:
            return None
        return max(0.0, amount - self._level) * MINUTE_S / self.limit

    def take(self, amount: int, now: float) -> None:
        """Where `wait_s` is 0."""
        self._fill(now)
        self._level -= amount

    def give_back(self, amount: int, now: float) -> None:
        self._fill(now)
        self._level = min(self._level + amount, float(self.limit))

    def standing(self, now: float) -> Standing:
        self._fill(now)
        missing = self.limit - self._level
        return Standing(
            limit=self.limit,
            remaining=max(0, math.floor(self._level)),
            reset_s=missing * MINUTE_S / self.limit,
        )

    def _fill(self, now: float) -> None:
        elapsed = max(0.0, now - self._at)
        self._level = min(self._level + elapsed * self.limit / MINUTE_S, float(self.limit))
        self._at = max(self._at, now)


class Quota:
    """One tenant's limits and what is left of them."""

    def __init__(self, limits: TenantLimits, now: float) -> None:
        self.limits = limits
        self.running = 0
        self._requests = _bucket(limits.requests_per_minute, now)
        self._tokens = _bucket(limits.tokens_per_minute, now)

    def change(self, limits: TenantLimits, now: float) -> None:
        """Other limits from now on; what runs goes on counting. A minute's limit that was changed begins full."""
        if limits.requests_per_minute != self.limits.requests_per_minute:
            self._requests = _bucket(limits.requests_per_minute, now)
        if limits.tokens_per_minute != self.limits.tokens_per_minute:
            self._tokens = _bucket(limits.tokens_per_minute, now)
        self.limits = limits

    def enter(self, now: float) -> Refusal | None:
        """Lets one request in, or says why not. `leave` must follow where it was let in."""
        limits = self.limits
        if limits.concurrency is not None and self.running >= limits.concurrency:
            return Refusal(limit="concurrency", value=limits.concurrency, wait_s=1.0)
        if self._requests is not None:
            wait_s = self._requests.wait_s(1, now)
            if wait_s != 0:
                return Refusal(limit="requests_per_minute", value=self._requests.limit, wait_s=wait_s)
            self._requests.take(1, now)
        self.running += 1
        return None

    def leave(self) -> None:
        self.running -= 1

    def reserve(self, num_tokens: int, now: float) -> Refusal | None:
        """Takes tokens for a request that was let in, or says why not. `correct` must follow where they were taken."""
        if self._tokens is None:
            return None
        wait_s = self._tokens.wait_s(num_tokens, now)
        if wait_s != 0:
            return Refusal(limit="tokens_per_minute", value=self._tokens.limit, wait_s=wait_s)
        self._tokens.take(num_tokens, now)
        return None

    def correct(self, num_reserved: int, num_used: int, now: float) -> None:
        """The request has ended: what it did not use is there again."""
        if self._tokens is not None:
            self._tokens.give_back(max(0, num_reserved - num_used), now)

    def standings(self, now: float) -> dict[str, Standing]:
        """By what is counted: requests, tokens. A limit that is not set is left out."""
        buckets = {"requests": self._requests, "tokens": self._tokens}
        return {name: bucket.standing(now) for name, bucket in buckets.items() if bucket is not None}


def _bucket(limit: int | None, now: float) -> Bucket | None:
    return None if limit is None else Bucket(limit, now)
