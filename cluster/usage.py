"""A key's own usage by day: the question and the answer of GET /v1/usage. Knows nothing of HTTP or of the ledger's tables."""

import datetime
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from cluster.bodies import invalid
from cluster.errors import echo
from cluster.ledger import DayTotals
from cluster.prices import dollars

MAX_DAYS = 366
USUAL_DAYS = 30
MAX_DAY = 10**6  # after the epoch
_EPOCH = datetime.date(1970, 1, 1)


class Sums(msgspec.Struct, frozen=True, kw_only=True):
    requests: int
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int
    completion_tokens: int
    cost: str  # dollars, exact
    cost_nanodollars: int


class DayUsage(Sums, frozen=True, kw_only=True):
    date: str  # UTC


class UsageReport(msgspec.Struct, frozen=True, kw_only=True):
    """Days without usage are left out."""

    object: str = "usage"
    start: str
    end: str
    data: list[DayUsage]
    total: Sums


def days_of(query: Mapping[str, str]) -> tuple[int, int]:
    """First and last day, since the epoch, of `start` and `end`; the last 30 if left out. Raises InvalidRequest."""
    for name in query:
        if name not in ("start", "end"):
            raise invalid(name, "is not a parameter that is known here")
    today = int(time.time()) // 86400
    last = _day(query["end"], "end") if "end" in query else today
    first = _day(query["start"], "start") if "start" in query else last - USUAL_DAYS + 1
    if not 0 <= last - first < MAX_DAYS:
        raise invalid("start", f"must be at most {MAX_DAYS - 1} days before end, and not after it")
    return first, last


def report(days: Sequence[DayTotals], first: int, last: int) -> UsageReport:
    return UsageReport(
        start=_date(first),
        end=_date(last),
        data=[DayUsage(date=_date(day.day), **_sums([day])) for day in days],
        total=Sums(**_sums(days)),
    )


def _sums(days: Sequence[DayTotals]) -> dict[str, Any]:
    nanodollars = sum(each.amount_nanodollars for each in days)
    return {
        "requests": sum(each.requests for each in days),
        "prompt_cache_hit_tokens": sum(each.hit_tokens for each in days),
        "prompt_cache_miss_tokens": sum(each.miss_tokens for each in days),
        "completion_tokens": sum(each.output_tokens for each in days),
        "cost": dollars(nanodollars).removeprefix("$"),
        "cost_nanodollars": nanodollars,
    }


def _day(text: str, param: str) -> int:
    try:
        days = (datetime.datetime.strptime(text, "%Y-%m-%d").date() - _EPOCH).days
    except ValueError:
        days = -1
    if not 0 <= days < MAX_DAY:
        raise invalid(param, f"must be a day like 2026-01-31, not {echo(text)}")
    return days


def _date(day: int) -> str:
    return (_EPOCH + datetime.timedelta(days=day)).isoformat()
