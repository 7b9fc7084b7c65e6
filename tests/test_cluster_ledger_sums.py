"""What the ledger adds up: for each tenant, and for one key by day."""

from pathlib import Path

import pytest
from ledger_records import opening, settlement

from cluster.ledger import DAY_MS, Ledger


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/books/ledger.db"


def test_totals_of_each_tenant(url: str) -> None:
    ledger = Ledger(url)
    ledger.append(
        [
            opening("a"),
            opening("b"),
            opening("c", tenant="zoo"),
            settlement("a"),
            settlement("b", output_tokens=1),
        ]
    )
    acme, zoo = ledger.totals()
    ledger.close()
    assert (acme.tenant, acme.requests, acme.unsettled, acme.hit_tokens, acme.miss_tokens) == (
        "acme",
        2,
        0,
        128,
        272,
    )
    assert acme.output_tokens == 11
    assert acme.amount_nanodollars == 128 * 28 + 272 * 280 + 11 * 420
    assert (zoo.tenant, zoo.requests, zoo.unsettled, zoo.amount_nanodollars) == ("zoo", 0, 1, 0)


def test_days_of_one_key(url: str) -> None:
    ledger = Ledger(url)
    start = 20_000 * DAY_MS
    times = {
        "a": start,
        "b": start + DAY_MS - 1,
        "c": start + DAY_MS,
        "d": start - 1,
        "e": start + 9 * DAY_MS,
    }
    for request_id, time_ms in times.items():
        ledger.append([opening(request_id), settlement(request_id, time_ms=time_ms)])
    ledger.append([opening("f", key_id="another"), settlement("f", time_ms=start)])
    ledger.append([opening("g", tenant="zoo"), settlement("g", time_ms=start)])
    ledger.append([opening("h")])
    sibling = {"hit_tokens": 0, "miss_tokens": 0}
    ledger.append([opening("i", prompt_tokens=0, **sibling), settlement("i", time_ms=start, **sibling)])
    key = opening("a").key_id
    first, second = ledger.days("acme", key, 20_000, 20_008)
    assert ledger.days("acme", key, 20_002, 20_008) == []
    assert ledger.days("nobody", key, 20_000, 20_008) == []
    ledger.close()
    one = settlement("a")
    assert (first.day, first.requests, second.day, second.requests) == (20_000, 2, 20_001, 1)
    assert first.hit_tokens == 2 * one.hit_tokens
    assert first.miss_tokens == 2 * one.miss_tokens
    assert first.output_tokens == 3 * one.output_tokens, "a further choice has tokens, but is no request"
    assert first.amount_nanodollars == 2 * second.amount_nanodollars + one.output_tokens * 420
