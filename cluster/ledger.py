"""The ledger: each request opened before its first token leaves, settled once, in a database that only grows.

Every record carries the sha256 of the hash before it and of its own canonical JSON, so that one changed, removed or moved
later is found offline. What a record is and may say is in `cluster.records`. Knows nothing of HTTP or Ray.

    python -m cluster.ledger verify [--url URL]     exit code 1 and the first bad record when the chain does not hold
    python -m cluster.ledger show [--url URL] [--tenant NAME] [--last N]
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import msgspec
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from cluster.config import LedgerConfig
from cluster.ledger_tables import (
    HEAD,
    METADATA,
    OPENINGS,
    REQUESTS,
    SETTLEMENTS,
    Database,
    add_missing_columns,
    all_rows,
    find_openings,
    find_settled,
    to_record,
    to_row,
)
from cluster.prices import dollars
from cluster.records import (
    GENESIS,
    LedgerError,
    LedgerUnavailable,
    Opening,
    Record,
    RecordRefused,
    Settled,
    Settlement,
    chain,
    check_opening,
    check_settled,
    price_settlement,
    read,
)

__all__ = [
    "Ledger",
    "LedgerError",
    "LedgerUnavailable",
    "Opening",
    "RecordRefused",
    "Report",
    "Settled",
    "Settlement",
    "Totals",
    "verify",
]


DAY_MS = 24 * 60 * 60 * 1000


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant's sums over its settled requests. `unsettled` requests count nowhere else."""

    tenant: str
    requests: int
    unsettled: int
    hit_tokens: int
    miss_tokens: int
    output_tokens: int
    amount_nanodollars: int


class DayTotals(msgspec.Struct, frozen=True, kw_only=True):
    """One key's sums over the requests that were settled on one day. Further choices of a prompt are no requests."""

    day: int  # since the epoch, UTC
    requests: int
    hit_tokens: int
    miss_tokens: int
    output_tokens: int
    amount_nanodollars: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `verify` found. `bad` names the first record that does not hold; the rest counts what lies before it."""

    records: int
    unsettled: int
    amount_nanodollars: int
    head: str  # hash of the last good record
    bad: str | None


class Ledger:
    """The one writer; makes the database where there is none. Raises LedgerUnavailable, here and from every method.

    Not for several threads at once. Of two writers on one database, the one that comes second waits, or gets LedgerUnavailable.
    """

    def __init__(self, url: str) -> None:
        self._database = Database(url)
        self._database.make_folder()
        with self._database.begin() as connection:
            METADATA.create_all(connection)
            add_missing_columns(connection)
            if connection.execute(sa.select(HEAD)).first() is None:
                connection.execute(HEAD.insert().values(seq=0, hash=GENESIS))

    def append(self, batch: Sequence[Opening | Settlement]) -> list[Record | RecordRefused]:
        """Writes many records in one transaction, on disk when this returns. Answers in the order of `batch`.

        A record that is there already (the same opening again; any settlement of a settled request) changes nothing and
        is answered with the first one. A refused record does not keep the others from being written. Where this raises,
        nothing of the batch was written.
        """
        with self._database.write() as connection:
            tail = _Tail(connection, {record.request_id for record in batch})
            answers = [tail.add(record) for record in batch]
            tail.write(connection)
        return answers

    def find(self, request_id: str) -> Opening | None:
        """What a request was opened with."""
        with self._database.begin() as connection:
            return find_openings(connection, {request_id}).get(request_id)

    def totals(self) -> list[Totals]:
        """Every tenant's sums, by name."""
        names = ("hit_tokens", "miss_tokens", "output_tokens", "amount_nanodollars")
        sums = [sa.func.coalesce(sa.func.sum(SETTLEMENTS.c[name]), 0) for name in names]
        settled = sa.func.count(SETTLEMENTS.c.request_id)
        query = (
            sa.select(
                OPENINGS.c.tenant,
                settled.label("requests"),
                (sa.func.count() - settled).label("unsettled"),
                *[sa.cast(total, sa.BigInteger).label(name) for name, total in zip(names, sums, strict=True)],
            )
            .select_from(REQUESTS)
            .group_by(OPENINGS.c.tenant)
            .order_by(OPENINGS.c.tenant)
        )
        with self._database.begin() as connection:
            return [Totals(**row) for row in connection.execute(query).mappings()]

    def days(self, tenant: str, key_id: str, first: int, last: int) -> list[DayTotals]:
        """One key's sums for each day from `first` to `last` on which it used anything, in order."""
        day = SETTLEMENTS.c.time_ms // DAY_MS
        names = ("hit_tokens", "miss_tokens", "output_tokens", "amount_nanodollars")
        sums = [sa.cast(sa.func.sum(SETTLEMENTS.c[name]), sa.BigInteger).label(name) for name in names]
        requests = sa.func.sum(sa.case((OPENINGS.c.prompt_tokens > 0, 1), else_=0))
        query = (
            sa.select(day.label("day"), sa.cast(requests, sa.BigInteger).label("requests"), *sums)
            .select_from(REQUESTS)
            .where(OPENINGS.c.tenant == tenant, OPENINGS.c.key_id == key_id)
            .where(SETTLEMENTS.c.time_ms.between(first * DAY_MS, (last + 1) * DAY_MS - 1))
            .group_by(day)
            .order_by(day)
        )
        with self._database.begin() as connection:
            return [DayTotals(**row) for row in connection.execute(query).mappings()]

    def close(self) -> None:
        self._database.close()


class _Tail:
    """The end of the chain, and what is known of the requests of one batch."""

    def __init__(self, connection: sa.Connection, request_ids: set[str]) -> None:
        self._start = self._end = tuple(connection.execute(sa.select(HEAD)).one())
        self._openings = find_openings(connection, request_ids)
        self._settled = find_settled(connection, request_ids)
        self._rows: dict[sa.Table, list[dict[str, Any]]] = {OPENINGS: [], SETTLEMENTS: []}

    def add(self, record: Opening | Settlement) -> Record | RecordRefused:
        try:
            if isinstance(record, Opening):
                return self._open(read(msgspec.to_builtins(record), Opening))
            return self._settle(read(msgspec.to_builtins(record), Settlement))
        except RecordRefused as refused:
            return refused

    def write(self, connection: sa.Connection) -> None:
        if self._end == self._start:
            return
        (old_seq, old_hash), (seq, digest) = self._start, self._end
        at_start = sa.and_(HEAD.c.seq == old_seq, HEAD.c.hash == old_hash)
        if connection.execute(HEAD.update().where(at_start).values(seq=seq, hash=digest)).rowcount != 1:
            raise LedgerUnavailable("The ledger has a second writer, which came first; nothing was written.")
        for table, rows in self._rows.items():
            if rows:
                connection.execute(table.insert(), rows)

    def _open(self, opening: Opening) -> Opening:
        first = self._openings.get(opening.request_id)
        if first is None:
            check_opening(opening)
            self._openings[opening.request_id] = opening
            self._link(OPENINGS, opening)
            return opening
        if msgspec.structs.replace(opening, time_ms=first.time_ms) != first:
            raise RecordRefused(f"request {opening.request_id} is already open with another quote")
        return first

    def _settle(self, settlement: Settlement) -> Settled:
        first = self._settled.get(settlement.request_id)
        if first is not None:
            return first
        settled = price_settlement(settlement, self._openings.get(settlement.request_id))
        self._settled[settlement.request_id] = settled
        self._link(SETTLEMENTS, settled)
        return settled

    def _link(self, table: sa.Table, record: Record) -> None:
        seq, previous = self._end
        digest = chain(previous, record)
        self._rows[table].append({"seq": seq + 1, **to_row(record), "hash": digest})
        self._end = seq + 1, digest


def verify(url: str) -> Report:
    """Replays the chain and the arithmetic from the first record on, in one snapshot. Raises LedgerUnavailable."""
    audit = _Audit()
    bad = None
    with Database(url).existing() as connection:
        try:
            with closing(all_rows(connection)) as rows:
                for row in rows:
                    audit.step(row)
            audit.end([tuple(row) for row in connection.execute(sa.select(HEAD))])
        except RecordRefused as refused:
            bad = f"Record {audit.seq + 1}: {refused}"
    return Report(
        records=audit.seq,
        unsettled=len(audit.unsettled),
        amount_nanodollars=audit.amount_nanodollars,
        head=audit.head,
        bad=bad,
    )


class _Audit:
    """Goes through all records in order. Raises RecordRefused at the first that does not hold."""

    def __init__(self) -> None:
        self.seq = 0
        self.head = GENESIS
        self.amount_nanodollars = 0
        self.unsettled: dict[str, Opening] = {}

    def step(self, row: sa.RowMapping) -> None:
        if row["seq"] != self.seq + 1:
            raise RecordRefused(f"missing; the next one is number {row['seq']}")
        record = to_record(row)
        digest = chain(self.head, record)
        if row["hash"] != digest:
            raise RecordRefused(
                f"request {record.request_id}: the hash does not match the content and the record before"
            )
        if isinstance(record, Opening):
            check_opening(record)
            self.unsettled[record.request_id] = record
        else:
            self._close(record)
        self.seq, self.head = row["seq"], digest

    def end(self, heads: list[tuple[Any, ...]]) -> None:
        if heads != [(self.seq, self.head)]:
            raise RecordRefused(
                f"missing; the chain should end at {heads}, but ends at {(self.seq, self.head)}"
            )

    def _close(self, settled: Settled) -> None:
        opening = self.unsettled.pop(settled.request_id, None)
        if opening is None:
            raise RecordRefused(f"request {settled.request_id} was not open")
        check_settled(settled, opening)
        self.amount_nanodollars += settled.amount_nanodollars


def show(url: str, *, tenant: str | None, last: int) -> Table:
    """The newest requests, oldest first. Raises LedgerUnavailable."""
    shown = [c for c in OPENINGS.c if c.name != "client_id"]
    query = sa.select(*shown, *[c.label(f"settled_{c.name}") for c in SETTLEMENTS.c]).select_from(REQUESTS)
    if tenant is not None:
        query = query.where(OPENINGS.c.tenant == tenant)
    with Database(url).existing() as connection:
        rows = connection.execute(query.order_by(OPENINGS.c.seq.desc()).limit(last)).mappings().all()
    table = Table(
        "time (UTC)", "request", "tenant", "prompt", "hit", "miss", "output", "resumes", "finish", "amount"
    )
    for row in reversed(rows):
        opened_at = datetime.fromtimestamp(row["time_ms"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        start = [opened_at, row["request_id"], row["tenant"], row["prompt_tokens"]]
        if row["settled_seq"] is None:
            cells = [*start, row["hit_tokens"], row["miss_tokens"], "", "", "open", ""]
        else:
            names = ("hit_tokens", "miss_tokens", "output_tokens", "resumes", "finish")
            cells = [
                *start,
                *[row[f"settled_{name}"] for name in names],
                dollars(row["settled_amount_nanodollars"]),
            ]
        table.add_row(*map(str, cells))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.ledger", description="Check or show a ledger.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("verify", "replay the chain and the arithmetic"),
        ("show", "show the newest requests"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "--url", default=LedgerConfig().url, help="SQLAlchemy URL (default: %(default)s)"
        )
    command.add_argument("--tenant", help="only this tenant's")
    command.add_argument("--last", type=int, default=20, metavar="N", help="how many (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "show":
            Console().print(show(options.url, tenant=options.tenant, last=options.last))
            return 0
        report = verify(options.url)
    except LedgerUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    if report.bad is not None:
        print(f"The ledger does not hold. {report.bad}", file=sys.stderr)
        return 1
    print(
        f"The ledger holds: {report.records} records, {report.unsettled} requests still open, "
        f"{dollars(report.amount_nanodollars)} in all. The last hash is {report.head}."
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
