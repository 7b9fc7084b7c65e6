"""Where the ledger is kept: its tables, its connection, and the way from a record to a row and back.

Portable SQL through SQLAlchemy Core. Knows nothing of what may be written when; that is `cluster.ledger`.
"""

import heapq
from collections.abc import Collection, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError

from cluster.records import LedgerUnavailable, Opening, Record, RecordRefused, Settled, read

LOCK_WAIT_S = 2.0  # how long to wait for another process that holds a SQLite file
FETCH_ROWS = 1000

METADATA = sa.MetaData()


def _columns(kind: type[sa.types.TypeEngine[Any]], *names: str) -> list[sa.Column[Any]]:
    return [sa.Column(name, kind, nullable=False) for name in names]


def _chained(name: str, *columns: sa.Column[Any]) -> sa.Table:
    return sa.Table(
        name,
        METADATA,
        sa.Column("seq", sa.BigInteger, nullable=False, unique=True),  # one numbering for both tables
        sa.Column("request_id", sa.Text, primary_key=True),
        *columns,
        *_columns(sa.BigInteger, "time_ms"),
        *_columns(sa.Text, "hash"),
    )


OPENINGS = _chained(
    "openings",
    *_columns(sa.Text, "tenant", "key_id", "model", "price_version"),
    *_columns(sa.BigInteger, "price_hit", "price_miss", "price_output"),
    *_columns(sa.BigInteger, "prompt_tokens", "hit_tokens", "miss_tokens"),
    sa.Column("client_id", sa.Text),  # later than the first ledgers: see `add_missing_columns`
)
SETTLEMENTS = _chained(
    "settlements",
    *_columns(sa.BigInteger, "hit_tokens", "miss_tokens", "output_tokens", "reasoning_tokens", "resumes"),
    *_columns(sa.Text, "finish"),
    *_columns(sa.BigInteger, "amount_nanodollars"),
)
# One row, moved on by every transaction: without it the last records could be cut off unseen, and two writers could fork.
HEAD = sa.Table("head", METADATA, *_columns(sa.BigInteger, "seq"), *_columns(sa.Text, "hash"))
REQUESTS = OPENINGS.outerjoin(SETTLEMENTS, OPENINGS.c.request_id == SETTLEMENTS.c.request_id)


class Database:
    """An engine, and the translation of its errors into one sentence. Raises LedgerUnavailable for a URL it cannot use."""

    def __init__(self, url: str) -> None:
        try:
            self._url = sa.make_url(url)
            self._path = _sqlite_path(self._url)
            self._engine = _create_engine(self._url)
        except (ArgumentError, ImportError) as error:
            raise LedgerUnavailable(f"The ledger's URL cannot be used: {error}") from error

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A transaction on one snapshot, durable once the block has ended. Raises LedgerUnavailable."""
        with self._translated(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """As `begin`, for a transaction that will write. On SQLite it waits for its turn at once: one that has read before it
        waits would find its snapshot outdated by another process, such as `cluster.keys`. Raises LedgerUnavailable.
        """
        engine = self._engine.execution_options(will_write=True)
        with self._translated(), engine.begin() as connection:
            yield connection

    @contextmanager
    def existing(self) -> Iterator[sa.Connection]:
        """A transaction to read from, on a ledger that must be there; closes the engine. Raises LedgerUnavailable."""
        if self._path is not None and not self._path.is_file():
            raise LedgerUnavailable(f"There is no ledger at {self._path}.")
        try:
            with self.begin() as connection:
                yield connection.execution_options(yield_per=FETCH_ROWS)
        finally:
            self.close()

    def make_folder(self) -> None:
        """Makes the folder of a SQLite file. Raises LedgerUnavailable."""
        if self._path is not None:
            with self._translated():
                self._path.parent.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, OSError) as error:
            reason = " ".join(str(error.orig if isinstance(error, DBAPIError) else error).split())
            raise LedgerUnavailable(
                f"The ledger {self._url.render_as_string()} cannot be used: {reason}"
            ) from error


def add_missing_columns(connection: sa.Connection) -> None:
    """Brings a ledger of an earlier version up to date. Its records and their hashes stay as they are."""
    if not set(OPENINGS.c) <= set(_present(connection, OPENINGS)):
        connection.execute(sa.text(f"ALTER TABLE {OPENINGS.name} ADD COLUMN client_id TEXT"))


def find_openings(connection: sa.Connection, request_ids: Collection[str]) -> dict[str, Opening]:
    """The openings of these requests, by request id."""
    return {row["request_id"]: to_opening(row) for row in _find(connection, OPENINGS, request_ids)}


def find_settled(connection: sa.Connection, request_ids: Collection[str]) -> dict[str, Settled]:
    """The settlements of these requests, by request id."""
    return {row["request_id"]: to_settled(row) for row in _find(connection, SETTLEMENTS, request_ids)}


def all_rows(connection: sa.Connection) -> Generator[sa.RowMapping, None, None]:
    """The rows of both tables in the order of their numbers. Raises RecordRefused where a number is none."""
    tables = (OPENINGS, SETTLEMENTS)
    queries = [sa.select(*_present(connection, table)).order_by(table.c.seq) for table in tables]
    with ExitStack() as stack:  # an audit that finds something reads no further
        results = [stack.enter_context(connection.execute(query)) for query in queries]
        yield from heapq.merge(*[result.mappings() for result in results], key=_number)


def to_row(record: Record) -> dict[str, Any]:
    row = msgspec.structs.asdict(record)
    if isinstance(record, Opening):
        row |= {f"price_{name}": value for name, value in msgspec.structs.asdict(row.pop("price")).items()}
    return row


def to_record(row: sa.RowMapping) -> Record:
    """The record of a row of `all_rows`. Raises RecordRefused."""
    return to_settled(row) if "finish" in row else to_opening(row)


def to_opening(row: sa.RowMapping) -> Opening:
    price = {name: row[f"price_{name}"] for name in ("version", "hit", "miss", "output")}
    return read({**_plain(row), "price": price, "kind": "open"}, Opening)


def to_settled(row: sa.RowMapping) -> Settled:
    return read({**_plain(row), "kind": "settle"}, Settled)


def _present(connection: sa.Connection, table: sa.Table) -> list[sa.Column[Any]]:
    """The columns that the database has: an audit reads a ledger as it is."""
    names = {column["name"] for column in sa.inspect(connection).get_columns(table.name)}
    return [column for column in table.c if column.name in names]


def _find(connection: sa.Connection, table: sa.Table, request_ids: Collection[str]) -> sa.MappingResult:
    return connection.execute(sa.select(table).where(table.c.request_id.in_(request_ids))).mappings()


def _plain(row: sa.RowMapping) -> dict[str, Any]:
    return {str(name): value for name, value in row.items()}  # SQLAlchemy's names are a subclass of str


def _number(row: sa.RowMapping) -> int:
    if not isinstance(row["seq"], int):
        raise RecordRefused(f"request {row['request_id']}: its number is {row['seq']!r}")
    return row["seq"]


def _sqlite_path(url: sa.URL) -> Path | None:
    """Of the file, where there is one: not in memory, and no URI of SQLite's own."""
    is_file = url.get_backend_name() == "sqlite" and url.database and not url.database.startswith("file:")
    return Path(url.database or "") if is_file else None


def _create_engine(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, isolation_level="REPEATABLE READ", pool_pre_ping=True)
    engine = sa.create_engine(url, connect_args={"timeout": LOCK_WAIT_S})
    sa.event.listen(engine, "connect", _set_up_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _: object) -> None:
    # Python's driver begins a transaction only at the first write, which would give readers no snapshot.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def _begin_sqlite(connection: sa.Connection) -> None:
    will_write = connection.get_execution_options().get("will_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if will_write else "BEGIN")
