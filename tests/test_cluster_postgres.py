"""The ledger in a real PostgreSQL, which is killed while it writes: nothing is lost and nothing is there twice."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from ledger_records import opening, settlement
from private_postgres import MISSING, Postgres, bin_folder, running_postgres

from cluster.controller import PrefixCacheController
from cluster.key_store import KeyStore
from cluster.ledger import Ledger, LedgerUnavailable, main, verify

pytestmark = pytest.mark.skipif(bin_folder() is None and not os.environ.get("CI"), reason=MISSING)

ROOT = Path(__file__).parent.parent
NUM_WRITERS = 3
NUM_REQUESTS = 60  # of each


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with running_postgres() as postgres:
        yield postgres


@pytest.fixture
def postgres(server: Postgres) -> Postgres:
    """The server without any table."""
    engine = sa.create_engine(server.url)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    engine.dispose()
    return server


def test_records_sums_and_audit_are_as_on_sqlite(
    postgres: Postgres, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        opening("a"),
        opening("b", client_id="mine"),
        settlement("a"),
        opening("c", tenant="other"),
        settlement("c", finish="cancelled", output_tokens=0),
        settlement("a", output_tokens=99),  # too late: the first stays
        opening("a", hit_tokens=128, miss_tokens=72),  # another quote: refused
    ]
    found = []
    for url in (f"sqlite:///{tmp_path}/ledger.db", postgres.url):
        ledger = Ledger(url)
        answers = [str(answer) for answer in ledger.append(records)]
        day = settlement().time_ms // 86_400_000
        sums = ledger.totals(), ledger.days("acme", opening().key_id, day, day), ledger.find("b")
        ledger.close()
        found.append((answers, sums, verify(url)))
    assert found[0] == found[1]
    assert found[1][2].bad is None
    assert main(["verify", "--url", postgres.url]) == 0
    assert main(["show", "--url", postgres.url]) == 0
    assert "The ledger holds: 5 records, 1 requests still open" in capsys.readouterr().out


def test_an_audit_finds_a_changed_amount(postgres: Postgres) -> None:
    ledger = Ledger(postgres.url)
    ledger.append([opening("a"), settlement("a"), opening("b"), settlement("b")])
    ledger.close()
    engine = sa.create_engine(postgres.url)
    with engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE settlements SET output_tokens = output_tokens - 1 WHERE request_id = 'b'")
        )
    engine.dispose()
    report = verify(postgres.url)
    assert report.records == 3
    assert "Record 4" in str(report.bad)


def test_keys_are_kept_beside_the_ledger(postgres: Postgres) -> None:
    store = KeyStore(postgres.url)
    before = store.read(-1)
    assert before is not None
    key = store.make("acme")
    assert key not in str(store.all())
    after = store.read(before.version)
    assert after is not None
    assert after.version > before.version
    assert store.read(after.version) is None
    store.close()


def _writers(url: str) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "tests/ledger_writer.py", url, f"writer{number}", str(NUM_REQUESTS)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(NUM_WRITERS)
    ]


def test_killed_while_many_write_it_loses_nothing_and_has_nothing_twice(postgres: Postgres) -> None:
    """Writers go on until each request is settled; one that was told so before a kill does not ask again."""
    writers = _writers(postgres.url)
    told: list[str] = []
    for watched in (0, 1):
        stdout = writers[watched].stdout
        assert stdout is not None
        told += [stdout.readline().strip() for _ in range(10)]
        postgres.kill()
        postgres.start()
        ledger = Ledger(postgres.url)
        assert all(ledger.find(request_id) is not None for request_id in told)
        ledger.close()
    for writer in writers:
        with writer:
            assert writer.stdout is not None
            told += writer.stdout.read().split()
        assert writer.returncode == 0
    num_requests = NUM_WRITERS * NUM_REQUESTS
    assert len(told) == len(set(told)) == num_requests
    report = verify(postgres.url)
    assert report.bad is None
    assert (report.records, report.unsettled) == (2 * num_requests, 0)
    assert report.amount_nanodollars == num_requests * (64 * 28 + 136 * 280 + 10 * 420)
    ledger = Ledger(postgres.url)
    (totals,) = ledger.totals()
    ledger.close()
    assert (totals.requests, totals.output_tokens) == (num_requests, 10 * num_requests)


def test_the_controller_says_no_while_the_database_is_away_and_goes_on_after(postgres: Postgres) -> None:
    async def body() -> None:
        controller = PrefixCacheController(postgres.url, "secret")
        await controller.open(opening("before"))
        postgres.kill()
        with pytest.raises(LedgerUnavailable):
            await controller.open(opening("meanwhile"))
        await asyncio.to_thread(postgres.start)
        await asyncio.gather(*(controller.open(opening(f"after-{number}")) for number in range(20)))
        names = ("before", *(f"after-{number}" for number in range(20)))
        await asyncio.gather(*(controller.settle(settlement(name)) for name in names))
        assert [totals.requests for totals in await controller.totals()] == [21]
        await controller.close()

    asyncio.run(body())
    report = verify(postgres.url)
    assert (report.records, report.unsettled, report.bad) == (42, 0, None)
