"""The price book: what a token costs, in integer nano-dollars, since when. Knows nothing of requests or the ledger.

One nano-dollar a token is a thousandth of a dollar per million tokens, so list prices are exact.
"""

import datetime
from pathlib import Path
from typing import Annotated

import msgspec

NANODOLLARS = 10**9  # in one dollar

Rate = Annotated[int, msgspec.Meta(ge=0, le=NANODOLLARS)]  # nano-dollars per token


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What one request is charged for, in tokens. Output includes reasoning."""

    hit_tokens: int
    miss_tokens: int
    output_tokens: int


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """Nano-dollars per token. `version` names it for good: a version never changes its numbers."""

    version: str
    hit: Rate
    miss: Rate
    output: Rate

    def charge(self, usage: Usage) -> int:
        """The amount in nano-dollars."""
        return usage.hit_tokens * self.hit + usage.miss_tokens * self.miss + usage.output_tokens * self.output


class Dated(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A price as the file states it: valid from 00:00 UTC of `since` until the next one of the same entry."""

    since: datetime.date
    hit: Rate
    miss: Rate
    output: Rate
    source: str

    @property
    def starts_at(self) -> float:
        """Seconds since the epoch."""
        return datetime.datetime.combine(self.since, datetime.time(), datetime.UTC).timestamp()


class PriceBook:
    """Entries by name, each with its dated prices, oldest first."""

    def __init__(self, entries: dict[str, list[Dated]]) -> None:
        for name, prices in entries.items():
            dates = [price.since for price in prices]
            if not dates or dates != sorted(set(dates)):
                raise ValueError(
                    f"price book entry {name!r}: its dates must be there and rise, got {list(map(str, dates))}"
                )
        self._entries = entries

    @classmethod
    def load(cls, path: Path | None = None) -> "PriceBook":
        """Reads a price book (None: the one that comes with Lightship). Raises ValueError naming the file."""
        path = path or Path(__file__).with_name("prices.yaml")
        try:
            return cls(msgspec.yaml.decode(path.read_bytes(), type=dict[str, list[Dated]]))
        except (msgspec.DecodeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def price_at(self, entry: str, time_s: float) -> Price:
        """The price of `entry` at a time in seconds since the epoch. Raises ValueError where there is none."""
        if entry not in self._entries:
            raise ValueError(
                f"the price book has no entry {entry!r}, only {', '.join(sorted(self._entries))}"
            )
        started = [price for price in self._entries[entry] if price.starts_at <= time_s]
        if not started:
            raise ValueError(
                f"price book entry {entry!r} starts on {self._entries[entry][0].since}, later than asked for"
            )
        price = started[-1]
        return Price(version=f"{entry}@{price.since}", hit=price.hit, miss=price.miss, output=price.output)


def dollars(nanodollars: int) -> str:
    """An exact amount for people: 161_280 is "$0.000161280"."""
    sign, nanodollars = ("-", -nanodollars) if nanodollars < 0 else ("", nanodollars)
    return f"{sign}${nanodollars // NANODOLLARS}.{nanodollars % NANODOLLARS:09d}"
