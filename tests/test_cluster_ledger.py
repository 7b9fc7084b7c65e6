"""The ledger: what it refuses, what settles once, and what an audit finds."""

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_records import opening, settlement

from cluster.ledger import (
    Ledger,
    LedgerUnavailable,
    Opening,
    RecordRefused,
    Settled,
    Settlement,
    _Tail,
    main,
    verify,
)
from cluster.ledger_tables import HEAD, Database
from cluster.prices import Price
from cluster.records import GENESIS, chain


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/books/ledger.db"


def write(url: str, *records: Opening | Settlement) -> list[Any]:
    ledger = Ledger(url)
    answers = ledger.append(records)
    ledger.close()
    return answers


def tamper(url: str, statement: str, *values: Any) -> None:
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
        connection.execute(statement, values)


def test_a_request_costs_what_its_quote_and_its_price_say(url: str) -> None:
    first, last = write(url, opening(), settlement())
    assert first == opening()
    assert last.amount_nanodollars == 64 * 28 + 136 * 280 + 10 * 420
    assert verify(url).bad is None


def test_more_found_than_quoted_is_billed_as_found(url: str) -> None:
    _, settled = write(url, opening(), settlement(hit_tokens=192, miss_tokens=8))
    assert settled.amount_nanodollars == 192 * 28 + 8 * 280 + 10 * 420


@pytest.mark.parametrize(
    ("finish", "output_tokens", "is_free"),
    [
        ("error", 10, True),
        ("cancelled", 0, True),
        ("orphaned", 0, True),
        ("cancelled", 1, False),
        ("orphaned", 1, False),
        ("stop", 0, False),
    ],
)
def test_free_is_what_we_broke_and_what_was_given_up_before_its_first_token(
    url: str, finish: str, output_tokens: int, is_free: bool
) -> None:
    _, settled = write(url, opening(), settlement(finish=finish, output_tokens=output_tokens))
    full = 64 * 28 + 136 * 280 + output_tokens * 420
    assert settled.amount_nanodollars == (0 if is_free else full)
    assert verify(url).bad is None


def test_a_second_settlement_changes_nothing_and_answers_with_the_first(url: str) -> None:
    _, first, in_batch = write(url, opening(), settlement(), settlement(output_tokens=99))
    (later,) = write(url, settlement(finish="cancelled"))
    assert first == in_batch == later
    assert verify(url).records == 2


def test_the_same_opening_again_is_taken_for_the_first(url: str) -> None:
    write(url, opening())
    (again,) = write(url, opening(time_ms=1_765_000_009_000))
    assert again == opening()
    (other,) = write(url, opening(tenant="other"))
    assert "already open with another quote" in str(other)
    assert verify(url).records == 1


def test_a_clients_own_id_is_part_of_the_record(url: str) -> None:
    write(url, opening("a"), opening("b", client_id="order-17"))
    ledger = Ledger(url)
    assert [ledger.find(request_id) for request_id in "ab"] == [
        opening("a"),
        opening("b", client_id="order-17"),
    ]
    ledger.close()
    assert verify(url).bad is None
    tamper(url, "UPDATE openings SET client_id = 'order-18' WHERE request_id = 'b'")
    assert "request b: the hash does not match" in str(verify(url).bad)


def test_a_ledger_from_before_clients_ids_is_read_and_gone_on_with(url: str) -> None:
    write(url, opening("a"), settlement("a"))
    tamper(url, "ALTER TABLE openings DROP COLUMN client_id")
    before = verify(url)
    assert (before.bad, before.records) == (None, 2)
    write(url, opening("b", client_id="order-17"))
    after = verify(url)
    assert (after.bad, after.records) == (None, 3)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (opening("x", miss_tokens=137), "hit_tokens 64 \\+ miss_tokens 137 must be prompt_tokens 200"),
        (opening("x", hit_tokens=63, miss_tokens=137), "hit_tokens 63 is not a multiple of 64"),
        (opening("x", hit_tokens=-64, miss_tokens=264), "Expected `int` >= 0 - at `\\$.hit_tokens`"),
        (opening("x", tenant=None), "Expected `str`, got `null` - at `\\$.tenant`"),
        (settlement("never"), "request never was never opened"),
        (settlement(hit_tokens=0, miss_tokens=200), "hit_tokens 0 is less than the quoted 64"),
        (settlement(miss_tokens=135), "must be prompt_tokens 200"),
        (settlement(hit_tokens=100, miss_tokens=100), "hit_tokens 100 is not a multiple of 64"),
        (settlement(reasoning_tokens=11), "reasoning_tokens 11 is more than output_tokens 10"),
        (settlement(resumes=-1), "resumes"),
        (settlement(output_tokens=2**70), "output_tokens"),
        (settlement(finish="bored"), "finish"),
    ],
)
def test_a_record_that_breaks_a_rule_is_refused_alone(
    url: str, record: Opening | Settlement, reason: str
) -> None:
    answers = write(url, opening(), record, opening("r2"))
    assert [type(answer) for answer in answers] == [Opening, RecordRefused, Opening]
    with pytest.raises(RecordRefused, match=reason):
        raise answers[1]
    assert verify(url).records == 2


def test_sqlite_writes_ahead_and_syncs_every_transaction(url: str) -> None:
    Ledger(url).close()
    with Database(url).existing() as connection:
        modes = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
        ]
    assert modes == ["wal", 2]


def test_what_was_written_is_there_after_the_process_was_killed(url: str) -> None:
    code = (
        "import os, sys; sys.path.insert(0, 'tests'); import test_cluster_ledger as t;"
        f"l = t.Ledger({url!r}); l.append([t.opening(), t.settlement()]); os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parent.parent
    killed = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={"PYTHONPATH": str(root)}, check=False
    )
    assert killed.returncode == -9
    report = verify(url)
    assert (report.records, report.unsettled, report.bad) == (2, 0, None)


class TestUnavailable:
    def test_locked(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cluster.ledger_tables.LOCK_WAIT_S", 0)
        ledger = Ledger(url)
        other = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerUnavailable, match=r"ledger\.db cannot be used: database is locked"):
            ledger.append([opening()])
        other.close()
        assert ledger.append([opening()]) == [opening()]
        ledger.close()

    def test_disk_full(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        ledger = Ledger(url)
        ledger.append([opening()])
        connect = ledger._database._engine.pool.connect
        guard = connect()
        pages = guard.cursor().execute("PRAGMA page_count").fetchone()[0]
        guard.cursor().execute(f"PRAGMA max_page_count={pages}")
        guard.close()
        with pytest.raises(LedgerUnavailable, match="database or disk is full"):
            ledger.append([opening(f"r{i}") for i in range(2, 500)])
        ledger.close()
        assert verify(url).records == 1

    def test_read_only(self, url: str) -> None:
        write(url, opening())
        with pytest.raises(LedgerUnavailable, match="attempt to write a readonly database"):
            write(f"sqlite:///file:{url.removeprefix('sqlite:///')}?mode=ro&uri=true", opening("r2"))

    def test_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(LedgerUnavailable, match="cannot be used"):
            Ledger(f"sqlite:///{tmp_path}/file/ledger.db")

    @pytest.mark.parametrize("bad", ["ledger.db", "oraculum://x/y", "postgresql+nodriver://x/y"])
    def test_a_url_that_means_nothing(self, bad: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(LedgerUnavailable, match="URL cannot be used"):
            Ledger(bad)
        assert main(["verify", "--url", bad]) == 1
        assert "URL cannot be used" in capsys.readouterr().err

    def test_not_a_database(self, tmp_path: Path) -> None:
        (tmp_path / "ledger.db").write_text("something else altogether" * 100)
        with pytest.raises(LedgerUnavailable, match="file is not a database"):
            Ledger(f"sqlite:///{tmp_path}/ledger.db")

    def test_a_second_writer_waits_for_the_first(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cluster.ledger_tables.LOCK_WAIT_S", 0)
        first = Ledger(url)
        honest = _Tail.write

        def interrupted(tail: _Tail, connection: sa.Connection) -> None:
            monkeypatch.setattr(_Tail, "write", honest)
            with pytest.raises(LedgerUnavailable, match="database is locked"):
                write(url, opening("r2"))
            honest(tail, connection)

        monkeypatch.setattr(_Tail, "write", interrupted)
        first.append([opening()])
        first.close()
        assert verify(url).records == 1

    def test_a_second_writer_moved_the_end_of_the_chain(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As it looks on a database that does not lock the whole file."""
        late = Ledger(url)
        honest = _Tail.write

        def overtaken(tail: _Tail, connection: sa.Connection) -> None:
            connection.execute(HEAD.update().values(seq=1))
            honest(tail, connection)

        monkeypatch.setattr(_Tail, "write", overtaken)
        with pytest.raises(LedgerUnavailable, match="second writer"):
            late.append([opening()])
        late.close()
        assert verify(url).records == 0


REQUEST = st.tuples(
    st.integers(1, 500),
    st.integers(0, 7),
    st.integers(0, 7),
    st.integers(0, 300),
    st.sampled_from(["stop", "error", "cancelled", None]),
)


def records_of(requests: list[tuple[int, int, int, int, str | None]]) -> list[Opening | Settlement]:
    """A run of openings and settlements; `None` as the finish leaves a request open."""
    records: list[Opening | Settlement] = []
    for number, (prompt, quoted, found, output, finish) in enumerate(requests):
        low, high = sorted(min(units, prompt // 64) * 64 for units in (quoted, found))
        records.append(opening(f"q{number}", prompt_tokens=prompt, hit_tokens=low, miss_tokens=prompt - low))
        if finish is not None:
            hit = {"hit_tokens": high, "miss_tokens": prompt - high}
            records.append(settlement(f"q{number}", **hit, output_tokens=output, finish=finish))
    return records


@given(st.lists(REQUEST, max_size=8), st.data())
@settings(max_examples=20)
def test_any_batching_gives_the_same_chain_and_the_sums_of_its_records(
    tmp_path_factory: pytest.TempPathFactory, requests: list[Any], data: st.DataObject
) -> None:
    records = records_of(requests)
    heads = set()
    for batched in (False, True):
        url = f"sqlite:///{tmp_path_factory.mktemp('l')}/ledger.db"
        ledger = Ledger(url)
        left = list(records)
        answers = []
        while left:
            size = data.draw(st.integers(1, len(left))) if batched else len(left)
            answers += ledger.append(left[:size])
            left = left[size:]
        settled = [answer for answer in answers if isinstance(answer, Settled)]
        report, totals = verify(url), ledger.totals()
        ledger.close()
        assert report.bad is None
        assert report.records == len(records)
        assert (
            report.unsettled == sum(total.unsettled for total in totals) == 2 * len(requests) - len(records)
        )
        assert report.amount_nanodollars == sum(s.amount_nanodollars for s in settled)
        assert report.amount_nanodollars == sum(total.amount_nanodollars for total in totals)
        prompts = {r.request_id: r.prompt_tokens for r in records if isinstance(r, Opening)}
        assert all(s.hit_tokens + s.miss_tokens == prompts[s.request_id] for s in settled)
        heads.add(report.head)
    assert len(heads) == 1


RECORDS = [
    *[opening(f"r{i}", prompt_tokens=130 + i, miss_tokens=66 + i) for i in range(6)],
    *[settlement(f"r{i}", miss_tokens=66 + i, output_tokens=i, reasoning_tokens=i) for i in range(4)],
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger in which nothing is wrong."""
    path = tmp_path_factory.mktemp("sound") / "ledger.db"
    write(f"sqlite:///{path}", *RECORDS)
    return path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all examples of a property."""
    return tmp_path_factory.mktemp("scratch") / "ledger.db"


def restore(path: Path, sound: Path) -> str:
    for end in ("-wal", "-shm"):
        Path(f"{path}{end}").unlink(missing_ok=True)
    shutil.copyfile(sound, path)
    return f"sqlite:///{path}"


def rows_of(url: str) -> list[tuple[str, dict[str, Any]]]:
    connection = sqlite3.connect(url.removeprefix("sqlite:///"))
    connection.row_factory = sqlite3.Row
    rows = [
        (table, dict(row))
        for table in ("openings", "settlements")
        for row in connection.execute(f"SELECT * FROM {table}")
    ]
    connection.close()
    return sorted(rows, key=lambda row: str(row[1]["seq"]).zfill(9))


@given(
    st.integers(0, len(RECORDS) - 1),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.sampled_from("0123456789abz-"),
)
@settings(max_examples=120)
def test_an_audit_finds_every_changed_byte(
    scratch: Path, sound: Path, record: int, column: int, at: int, byte: str
) -> None:
    url = restore(scratch, sound)
    before = rows_of(url)
    table, row = before[record]
    name = sorted(row)[column % len(row)]
    old = str(row[name])
    at %= len(old)
    new = old[:at] + byte + old[at + 1 :]
    try:
        tamper(url, f"UPDATE {table} SET {name} = ? WHERE seq = ?", new, row["seq"])
    except sqlite3.IntegrityError:  # the id or the number of another record
        tamper(url, f"UPDATE {table} SET {name} = ? WHERE seq = ?", f"{new}7", row["seq"])
    changed = rows_of(url) != before
    bad = verify(url).bad
    assert (bad is not None) == changed
    if bad is not None and name != "seq":
        assert bad.startswith(f"Record {record + 1}: ")


@pytest.mark.parametrize("seq", range(1, len(RECORDS) + 1))
def test_an_audit_finds_a_removed_record(tmp_path: Path, sound: Path, seq: int) -> None:
    url = restore(tmp_path / "ledger.db", sound)
    for table in ("openings", "settlements"):
        tamper(url, f"DELETE FROM {table} WHERE seq = ?", seq)
    bad = verify(url).bad
    assert bad is not None
    assert bad.startswith(f"Record {seq}: missing")


@given(st.lists(st.integers(1, len(RECORDS)), min_size=2, max_size=2, unique=True), st.booleans())
@settings(max_examples=40)
def test_an_audit_finds_records_in_another_order(
    scratch: Path, sound: Path, pair: list[int], hashes_too: bool
) -> None:
    url = restore(scratch, sound)
    rows = rows_of(url)
    places = [rows[pair[0] - 1], rows[pair[1] - 1]]
    for table, row in places:
        tamper(url, f"UPDATE {table} SET seq = ? WHERE request_id = ?", -row["seq"], row["request_id"])
    for (table, row), (_, other) in zip(places, reversed(places), strict=True):
        digest = other["hash"] if hashes_too else row["hash"]
        statement = f"UPDATE {table} SET seq = ?, hash = ? WHERE request_id = ?"
        tamper(url, statement, other["seq"], digest, row["request_id"])
    bad = verify(url).bad
    assert bad is not None
    assert bad.startswith(f"Record {min(pair)}: ")


def test_an_audit_finds_a_changed_record_though_its_own_hash_was_made_to_fit(url: str) -> None:
    write(url, opening(), opening("r2"), opening("r3"))
    tamper(
        url,
        "UPDATE openings SET tenant = 'zoo', hash = ? WHERE seq = 1",
        chain(GENESIS, opening(tenant="zoo")),
    )
    assert "Record 2: request r2: the hash does not match" in str(verify(url).bad)


def test_an_audit_finds_a_wrong_amount_though_the_chain_was_made_to_fit(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Price.charge
    monkeypatch.setattr(Price, "charge", lambda self, usage: honest(self, usage) + 1)
    write(url, opening(), settlement())
    monkeypatch.undo()
    assert "amount_nanodollars is 44073 but should be 44072" in str(verify(url).bad)


class TestCommandLine:
    def test_verify(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        write(url, opening(), settlement(), opening("r2"))
        assert main(["verify", "--url", url]) == 0
        assert "holds: 3 records, 1 requests still open, $0.000044072 in all" in capsys.readouterr().out

    def test_verify_names_the_first_bad_record(self, url: str, capsys: pytest.CaptureFixture[str]) -> None:
        write(url, opening(), settlement(), opening("r2"))
        tamper(url, "UPDATE settlements SET output_tokens = 9")
        assert main(["verify", "--url", url]) == 1
        assert "Record 2: request r1: the hash does not match" in capsys.readouterr().err

    def test_no_ledger(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", "--url", f"sqlite:///{tmp_path}/none.db"]) == 1
        assert "There is no ledger at" in capsys.readouterr().err
        assert not (tmp_path / "none.db").exists()

    def test_show(
        self, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        write(url, opening(), settlement(), opening("r2"), opening("r3", tenant="zoo"))
        assert main(["show", "--url", url, "--tenant", "acme", "--last", "5"]) == 0
        shown = capsys.readouterr().out
        assert shown.index("r1") < shown.index("r2")
        assert "$0.000044072" in shown
        assert "zoo" not in shown
        assert main(["show", "--url", url, "--last", "1"]) == 0
        assert "r1" not in capsys.readouterr().out


def test_records_travel_between_processes_unchanged() -> None:
    import pickle

    for record in (opening(), settlement(), RecordRefused("no"), LedgerUnavailable("no")):
        copy = pickle.loads(pickle.dumps(record))
        assert (type(copy), str(copy)) == (type(record), str(record))
    assert msgspec.json.decode(msgspec.json.encode(opening()), type=Opening) == opening()
