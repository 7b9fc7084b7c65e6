"""Holds what replies said they cost against the ledger: every request of a load test, to the nano-dollar.

With the ledger's URL each request is looked up by the id that it was sent with, so that those whose client hung up are accounted for as well.
Without it GET /v1/usage, before and after, tells the sum for the key; that is exact where nobody else uses the key meanwhile.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import sqlalchemy as sa

from cluster import client
from cluster.ledger import verify
from cluster.ledger_tables import OPENINGS, REQUESTS, SETTLEMENTS, Database
from cluster.loadtest_report import Record
from cluster.prices import dollars

SETTLE_S = 30.0  # how long a settlement may take after its reply
LOOK_S = 0.25


@dataclass(kw_only=True)
class Bill:
    """Amounts in nano-dollars."""

    source: str
    replies: int  # the sum of usage.cost of the replies
    cut_short: int  # what was charged where no usage came: for cancelled and failed requests
    ledger: int  # the sum that the ledger has for the test
    differences: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.differences

    def sentence(self) -> str:
        parts = f"replies {dollars(self.replies)}"
        if self.cut_short:
            parts += f" + cut short {dollars(self.cut_short)}"
        verdict = "equal" if self.holds else "NOT EQUAL: " + "; ".join(self.differences[:3])
        return f"{parts}, {self.source} {dollars(self.ledger)}: {verdict}"


def of_ledger(url: str, prefix: str, records: Sequence[Record]) -> Bill:
    """Compares with a ledger's own records, those whose client id begins with `prefix`. Raises LedgerUnavailable.

    Waits for settlements, which come shortly after the replies.
    """
    deadline = time.monotonic() + SETTLE_S
    while True:
        bill = compare(_rows(url, prefix), records)
        if bill.holds or time.monotonic() > deadline:
            break
        time.sleep(LOOK_S)
    report = verify(url)
    if report.bad is not None:
        bill.differences.append(f"the chain does not hold: {report.bad}")
    return bill


def compare(rows: Sequence[dict[str, Any]], records: Sequence[Record]) -> Bill:
    """rows: client_id, finish, output_tokens, hit_tokens, miss_tokens and amount of each request; None: not settled."""
    found: dict[str | None, dict[str, Any]] = {}
    bill = Bill(source="the ledger", replies=0, cut_short=0, ledger=sum(row["amount"] or 0 for row in rows))
    for row in rows:
        if row["client_id"] in found:
            bill.differences.append(f"{row['client_id']} is there twice")
        found[row["client_id"]] = row
    for record in records:
        mine = found.pop(record.client_id) if record.client_id in found else None
        bill.differences += [f"{record.client_id}: {what}" for what in _differences(record, mine)]
        if record.completed:
            bill.replies += _cost(record)
        elif mine is not None:
            bill.cut_short += mine["amount"] or 0
    bill.differences += [f"{client_id} was never sent" for client_id in found]
    if bill.replies + bill.cut_short != bill.ledger:
        bill.differences.append("the sums differ")
    return bill


def _differences(record: Record, row: dict[str, Any] | None) -> list[str]:
    if row is None:  # what failed may have been refused before it was opened
        return [] if record.error is not None else ["is not in the ledger"]
    if row["amount"] is None:
        return ["is not settled"]
    if record.completed:
        same = row["amount"] == _cost(record) and row["output_tokens"] == record.output_tokens
        return [] if same else [f"its reply said {_cost(record)}, the ledger {row['amount']} nano-dollars"]
    prompt = row["hit_tokens"] + row["miss_tokens"]
    if record.cancelled and record.input_tokens not in (prompt, 0):  # 0: only the usage would have told
        return [f"its prompt had {record.input_tokens} tokens, the ledger says {prompt}"]
    if record.cancelled and row["output_tokens"] > record.output_tokens:
        return [f"{row['output_tokens']} output tokens, more than were asked for"]
    return []


class UsageMeter:
    """What GET /v1/usage says of one key, from `start` to `bill`."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._before = 0

    async def start(self) -> None:
        self._before = await self._total()

    async def bill(self, records: Sequence[Record]) -> Bill:
        """What was charged for answers without a usage is what is left over: only the ledger itself can tell more."""
        replies = sum(_cost(record) for record in records if record.completed)
        charged = await self._settled(replies, all_known=all(record.completed for record in records))
        bill = Bill(source="/v1/usage", replies=replies, cut_short=0, ledger=charged)
        if all(record.completed for record in records):
            if charged != replies:
                bill.differences.append("the sums differ")
        elif charged < replies:
            bill.differences.append("less was charged than the replies said")
        else:
            bill.cut_short = charged - replies
        return bill

    async def _settled(self, replies: int, *, all_known: bool) -> int:
        """The charges once they are as expected, or else once they no longer change."""
        deadline = time.monotonic() + SETTLE_S
        charged, before = await self._total() - self._before, -1
        while time.monotonic() < deadline and (charged != replies if all_known else charged != before):
            await asyncio.sleep(LOOK_S)
            charged, before = await self._total() - self._before, charged
        return charged

    async def _total(self) -> int:
        answer = await self._http.get("/v1/usage")
        if answer.status_code != 200:
            raise ConnectionError(client.error_text(answer.status_code, answer.content))
        return int(answer.json()["total"]["cost_nanodollars"])


def _cost(record: Record) -> int:
    usage = record.usage or {}
    nanodollars = int(usage.get("cost_nanodollars", 0))
    if usage.get("cost", "") != dollars(nanodollars).removeprefix("$"):
        raise ValueError(f"{record.client_id}: cost {usage.get('cost')!r} is not {nanodollars} nano-dollars")
    return nanodollars


def _rows(url: str, prefix: str) -> list[dict[str, Any]]:
    names = ("finish", "output_tokens", "hit_tokens", "miss_tokens")
    query = sa.select(
        OPENINGS.c.client_id,
        SETTLEMENTS.c.amount_nanodollars.label("amount"),
        *(SETTLEMENTS.c[name] for name in names),
    ).select_from(REQUESTS)
    with Database(url).existing() as connection:
        found = connection.execute(query.where(OPENINGS.c.client_id.startswith(prefix, autoescape=True)))
        return [dict(row) for row in found.mappings()]
