"""What the ledger's records are, the rules they keep and how they are chained. Knows nothing of databases, HTTP or Ray.

LedgerError
  +-- RecordRefused       one record breaks a rule
  +-- LedgerUnavailable   the database cannot be used now: nothing was written, and nothing may be served
"""

import hashlib
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from cluster.prices import Price, Usage
from kernels.layout import PAGE_SIZE

HIT_UNIT = PAGE_SIZE  # tokens; a cache hit is a whole number of pages
GENESIS = hashlib.sha256(
    b"lightship ledger, version 1"
).hexdigest()  # stands where the first record looks for its predecessor's

Tokens = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
Time = Annotated[int, msgspec.Meta(ge=0, le=10**15)]  # milliseconds since the epoch
Finish = Literal["stop", "length", "tool_calls", "cancelled", "orphaned", "error"]


class LedgerError(Exception):
    """The root of the ledger's errors."""


class RecordRefused(LedgerError):
    """This record cannot be written; the sentence names the request and the rule."""


class LedgerUnavailable(LedgerError):
    """The sentence says which ledger and why."""


class Opening(msgspec.Struct, frozen=True, kw_only=True, tag="open", tag_field="kind", omit_defaults=True):
    """A request about to send its first token: what was quoted."""

    request_id: str
    tenant: str
    key_id: str
    model: str
    price: Price
    prompt_tokens: Tokens
    hit_tokens: Tokens
    miss_tokens: Tokens
    time_ms: Time
    client_id: str | None = (
        None  # what the client calls it; where it says nothing, no part of the hashed record
    )


class Settlement(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a request: what it used. `hit_tokens` may be more than was quoted, never less."""

    request_id: str
    hit_tokens: Tokens
    miss_tokens: Tokens
    output_tokens: Tokens
    finish: Finish  # "orphaned": its gateway vanished; "error": ended by a fault of ours
    time_ms: Time
    reasoning_tokens: Tokens = 0  # part of output_tokens
    resumes: Annotated[int, msgspec.Meta(ge=0, le=10**6)] = 0  # how often another worker had to go on


class Settled(Settlement, frozen=True, kw_only=True, tag="settle", tag_field="kind"):
    """A settled request as it is recorded."""

    amount_nanodollars: int


Record = Opening | Settled
R = TypeVar("R", Opening, Settlement, Settled)


def amount(settlement: Settlement, price: Price) -> int:
    """What a request costs, in nano-dollars. Free: ended by a fault of ours, or over before its first token was sent."""
    gave_up = settlement.finish in ("cancelled", "orphaned")
    if settlement.finish == "error" or (gave_up and not settlement.output_tokens):
        return 0
    return price.charge(
        Usage(
            hit_tokens=settlement.hit_tokens,
            miss_tokens=settlement.miss_tokens,
            output_tokens=settlement.output_tokens,
        )
    )


def price_settlement(settlement: Settlement, opening: Opening | None) -> Settled:
    """Prices the end of a request. Raises RecordRefused where it breaks a rule; `opening` None: it was never opened."""
    if opening is None:
        raise RecordRefused(f"request {settlement.request_id} was never opened")
    charged = amount(settlement, opening.price)
    settled = Settled(**msgspec.structs.asdict(settlement), amount_nanodollars=charged)
    check_settled(settled, opening)
    return settled


def check_opening(record: Opening) -> None:
    """Raises RecordRefused unless hit + miss = prompt and the hit is in whole units."""
    _check_prompt(record, record.prompt_tokens)


def check_settled(record: Settled, opening: Opening) -> None:
    """Raises RecordRefused unless the record agrees with the quote and its amount with the price of the quote."""
    _check_prompt(record, opening.prompt_tokens)
    name = f"request {record.request_id}"
    if record.hit_tokens < opening.hit_tokens:
        raise RecordRefused(
            f"{name}: hit_tokens {record.hit_tokens} is less than the quoted {opening.hit_tokens}"
        )
    if record.reasoning_tokens > record.output_tokens:
        raise RecordRefused(
            f"{name}: reasoning_tokens {record.reasoning_tokens} is more than output_tokens {record.output_tokens}"
        )
    due = amount(record, opening.price)
    if record.amount_nanodollars != due:
        raise RecordRefused(f"{name}: amount_nanodollars is {record.amount_nanodollars} but should be {due}")


def read(fields: dict[str, Any], record: type[R]) -> R:
    """A record of type `record` from its fields. Raises RecordRefused for a missing one, a wrong type or a wrong range."""
    try:
        return msgspec.convert(fields, record)
    except msgspec.ValidationError as error:
        raise RecordRefused(f"request {fields['request_id']}: {error}") from None


def chain(previous: str, record: Record) -> str:
    """The hash of a record: sha256 over the hash of the record before it and its own canonical JSON."""
    return hashlib.sha256(previous.encode() + msgspec.json.encode(record, order="deterministic")).hexdigest()


def _check_prompt(record: Record, prompt_tokens: int) -> None:
    name, hit, miss = f"request {record.request_id}", record.hit_tokens, record.miss_tokens
    if hit + miss != prompt_tokens:
        raise RecordRefused(
            f"{name}: hit_tokens {hit} + miss_tokens {miss} must be prompt_tokens {prompt_tokens}"
        )
    if hit % HIT_UNIT:
        raise RecordRefused(f"{name}: hit_tokens {hit} is not a multiple of {HIT_UNIT}")
