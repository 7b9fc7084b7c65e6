"""The prefix-cache controller without Ray: membership, directory, and the ledger's writer, on a clock of the test's own."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import controller as module
from cluster.controller import (
    GATHER_S,
    ORPHAN_GRACE_S,
    WORKER_SILENCE_S,
    PrefixCacheController,
    WatchUpdate,
    WorkerInfo,
)
from cluster.ledger import Ledger, verify
from cluster.prefix_directory import PrefixDirectory
from cluster.prices import Price
from cluster.records import LedgerUnavailable, Opening, RecordRefused, Settlement

PAGES = [bytes([number]) * 16 for number in range(8)]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Follower:
    """What a gateway keeps."""

    def __init__(self, controller: PrefixCacheController) -> None:
        self.controller = controller
        self.version = -1
        self.directory = PrefixDirectory()
        self.members: list[str] = []

    async def catch_up(self, timeout: float = 0) -> WatchUpdate:
        update = await self.controller.watch(self.version, timeout)
        self.version = update.version
        self.members = [info.worker for info in update.members]
        self.directory.follow(update.changes, self.members)
        return update


def info(worker: str, epoch: int = 1, **changes: Any) -> WorkerInfo:
    fields = {"role": "prefill", "host": "127.0.0.1", "port": 4000, "pid": 1, "node": "n"}
    return WorkerInfo(**{**fields, "worker": worker, "epoch": epoch, **changes})


def opening(request_id: str = "r1") -> Opening:
    price = Price(version="x", hit=1, miss=10, output=100)
    return Opening(
        request_id=request_id,
        tenant="acme",
        key_id="k",
        model="m",
        price=price,
        prompt_tokens=100,
        hit_tokens=64,
        miss_tokens=36,
        time_ms=0,
    )


def settlement(request_id: str = "r1", **changes: Any) -> Settlement:
    fields: dict[str, Any] = {
        "hit_tokens": 64,
        "miss_tokens": 36,
        "output_tokens": 5,
        "finish": "stop",
        "time_ms": 1,
    }
    return Settlement(**{**fields, "request_id": request_id, **changes})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/ledger.db"


@pytest.fixture
def run(
    url: str, clock: Clock
) -> Callable[[Callable[[PrefixCacheController], Coroutine[Any, Any, None]]], None]:
    """Runs a test body against a controller that has gathered its workers."""

    def runner(body: Callable[[PrefixCacheController], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            controller = PrefixCacheController(url, "s3cret", clock=clock, wall_clock=lambda: 1.5)
            clock.now += GATHER_S
            try:
                await body(controller)
            finally:
                await controller.close()

        asyncio.run(main())

    return runner


Run = Callable[[Callable[[PrefixCacheController], Coroutine[Any, Any, None]]], None]


async def is_waiting(task: "asyncio.Task[Any]") -> bool:
    for _ in range(20):
        await asyncio.sleep(0)
    return not task.done()


def test_workers_come_report_and_go(run: Run) -> None:
    async def body(controller: PrefixCacheController) -> None:
        gateway = Follower(controller)
        await controller.register(info("p1"))
        await controller.register(info("d1", role="decode", ship_host="h", ship_port=5))
        assert await controller.report("p1", 1, 0, PAGES[:2], [], True) == "ok"
        assert await controller.report("d1", 1, 1, PAGES[:1], [], False) == "ok"
        await gateway.catch_up()
        assert gateway.members == ["d1", "p1"]
        assert gateway.directory.lookup(PAGES) == {"p1": 2, "d1": 1}
        assert await controller.report("p1", 1, 1, PAGES[2:3], [], False) == "ok"
        update = await gateway.catch_up()
        assert [change.worker for change in update.changes] == ["p1"]
        assert gateway.directory.lookup(PAGES) == {"p1": 3, "d1": 1}
        await controller.deregister("p1", 2)
        await controller.deregister("unknown", 1)
        assert (await gateway.catch_up()).members == [
            info("d1", role="decode", ship_host="h", ship_port=5),
            info("p1"),
        ]
        await controller.deregister("p1", 1)
        await gateway.catch_up()
        assert gateway.members == ["d1"]
        assert gateway.directory.lookup(PAGES) == {"d1": 1}
        assert await controller.secret() == "s3cret"

    run(body)


def test_who_is_unknown_or_has_left_a_gap_is_told_to_send_everything(run: Run) -> None:
    async def body(controller: PrefixCacheController) -> None:
        assert await controller.report("p1", 1, 1, PAGES[:1], [], False) == "resync"
        await controller.register(info("p1"))
        assert await controller.report("p1", 2, 1, PAGES[:1], [], False) == "resync"
        assert await controller.report("p1", 1, 1, PAGES[:1], [], False) == "ok"
        assert await controller.report("p1", 1, 3, PAGES[2:3], [], False) == "resync"
        await controller.register(info("p1"))
        assert await controller.report("p1", 1, 0, PAGES[:3], [], True) == "ok"
        assert await controller.report("p1", 1, 1, [], PAGES[1:2], False) == "ok"
        gateway = Follower(controller)
        await gateway.catch_up()
        assert gateway.directory.lookup(PAGES) == {"p1": 1}

    run(body)


def test_a_report_that_comes_twice_counts_once(run: Run) -> None:
    async def body(controller: PrefixCacheController) -> None:
        await controller.register(info("p1"))
        await controller.report("p1", 1, 1, PAGES[:2], [], False)
        await controller.report("p1", 1, 2, [], PAGES[1:2], False)
        assert await controller.report("p1", 1, 1, PAGES[:2], [], False) == "ok"
        gateway = Follower(controller)
        await gateway.catch_up()
        assert gateway.directory.lookup(PAGES) == {"p1": 1}

    run(body)


def test_a_silent_worker_is_dropped(run: Run, clock: Clock) -> None:
    async def body(controller: PrefixCacheController) -> None:
        gateway = Follower(controller)
        await controller.register(info("p1"))
        await controller.register(info("p2"))
        await controller.report("p1", 1, 1, PAGES[:1], [], False)
        for seq in range(1, int(WORKER_SILENCE_S) + 1):
            clock.now += 1
            await controller.report("p2", 1, seq, [], [], False)
        await gateway.catch_up()
        assert gateway.members == ["p1", "p2"]
        clock.now += 0.1
        await gateway.catch_up()
        assert gateway.members == ["p2"]
        assert gateway.directory.lookup(PAGES) == {}
        assert await controller.report("p1", 1, 2, [], [], False) == "resync"

    run(body)


def test_a_controller_that_was_frozen_itself_drops_nobody(run: Run, clock: Clock) -> None:
    async def body(controller: PrefixCacheController) -> None:
        gateway = Follower(controller)
        await controller.register(info("p1"))
        clock.now += 60
        await gateway.catch_up()
        assert gateway.members == ["p1"]

    run(body)


def test_a_new_incarnation_begins_without_pages(run: Run) -> None:
    async def body(controller: PrefixCacheController) -> None:
        gateway = Follower(controller)
        await controller.register(info("p1"))
        await controller.report("p1", 1, 1, PAGES[:2], [], False)
        await gateway.catch_up()
        await controller.register(info("p1", epoch=2))
        update = await gateway.catch_up()
        assert [member.epoch for member in update.members] == [2]
        assert gateway.directory.lookup(PAGES) == {}
        assert await controller.report("p1", 1, 2, PAGES[:2], [], False) == "resync"
        await controller.report("p1", 2, 1, PAGES[:1], [], False)
        await gateway.catch_up()
        assert gateway.directory.lookup(PAGES) == {"p1": 1}

    run(body)


def test_watch_wakes_for_what_it_asked_for(run: Run) -> None:
    async def body(controller: PrefixCacheController) -> None:
        await controller.register(info("p1"))
        version = (await controller.watch(-1, 0)).version
        everything = asyncio.create_task(controller.watch(version, 60))
        members_only = asyncio.create_task(controller.watch(version, 60, pages=False))
        assert await is_waiting(everything)
        await controller.report("p1", 1, 1, [], [], False)  # a sign of life is no news
        assert await is_waiting(everything)
        await controller.report("p1", 1, 2, PAGES[:1], [], False)
        update = await everything
        assert update.version > version
        assert await is_waiting(members_only)
        await controller.register(info("p2"))
        update = await members_only
        assert [member.worker for member in update.members] == ["p1", "p2"]
        assert update.changes == []

    run(body)


def test_watch_that_nothing_happens_to_ends_with_nothing_new(run: Run) -> None:
    async def body(controller: PrefixCacheController) -> None:
        await controller.register(info("p1"))
        first = await controller.watch(-1, 0)
        again = await controller.watch(first.version, 0.01)
        assert (again.version, again.changes) == (first.version, [])
        assert again.members == [info("p1")]

    run(body)


def test_a_restarted_controller_says_who_is_there_only_when_they_have_had_time_to_come_back(
    url: str, clock: Clock
) -> None:
    async def body() -> None:
        first, second = (PrefixCacheController(url, "s", clock=clock) for _ in range(2))
        clock.now += GATHER_S
        gateway = Follower(first)
        await first.register(info("p1"))
        await first.report("p1", 1, 1, PAGES[:2], [], False)
        await gateway.catch_up()
        gateway.controller = second = PrefixCacheController(url, "s", clock=clock)
        watching = asyncio.create_task(gateway.catch_up())
        assert await is_waiting(watching)
        clock.now += GATHER_S / 2
        assert await second.report("p1", 1, 2, [], [], False) == "resync"
        await second.register(info("p1"))
        assert await is_waiting(watching)
        clock.now += GATHER_S / 2
        await second.report("p1", 1, 0, PAGES[:1], [], True)
        await watching
        assert gateway.members == ["p1"]
        assert gateway.directory.lookup(PAGES) == {"p1": 1}
        await first.close()
        await second.close()

    asyncio.run(body())


def test_a_follower_too_far_behind_gets_everything(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LOGGED_PAGES", 6)

    async def body(controller: PrefixCacheController) -> None:
        await controller.register(info("p1"))
        near, far = Follower(controller), Follower(controller)
        await far.catch_up()
        for seq, page in enumerate(PAGES, start=1):
            await controller.report("p1", 1, seq, [page], [], False)
            if seq <= 6:
                await near.catch_up()
        assert [change.reset for change in (await near.catch_up()).changes] == [False, False]
        assert [change.reset for change in (await far.catch_up()).changes] == [True]
        assert near.directory.lookup(PAGES) == far.directory.lookup(PAGES) == {"p1": 8}

    run(body)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("register"), st.sampled_from("ab"), st.integers(1, 2)),
        st.tuples(st.just("leave"), st.sampled_from("ab"), st.integers(1, 2)),
        st.tuples(st.just("store"), st.sampled_from("ab"), st.integers(0, 7)),
        st.tuples(st.just("remove"), st.sampled_from("ab"), st.integers(0, 7)),
        st.tuples(st.just("follow"), st.just(""), st.just(0)),
    ),
    max_size=40,
)


@given(steps)
def test_a_follower_that_looks_now_and_then_ends_where_one_that_looks_once_does(
    todo: list[tuple[str, str, int]],
) -> None:
    async def body() -> None:
        clock = Clock()
        controller = PrefixCacheController("sqlite://", "s", clock=clock)
        clock.now += GATHER_S
        epochs: dict[str, int] = {}
        seqs: dict[str, int] = {}
        often = Follower(controller)
        for what, worker, number in todo:
            if what == "register" and epochs.get(worker) != number:
                await controller.register(info(worker, number))
                epochs[worker], seqs[worker] = number, 0
            elif what == "leave" and epochs.get(worker) == number:
                await controller.deregister(worker, number)
                del epochs[worker]
            elif what in ("store", "remove") and worker in epochs:
                seqs[worker] += 1
                change = ([PAGES[number]], []) if what == "store" else ([], [PAGES[number]])
                assert await controller.report(worker, epochs[worker], seqs[worker], *change, False) == "ok"
            elif what == "follow":
                await often.catch_up()
        once = Follower(controller)
        await often.catch_up()
        await once.catch_up()
        assert often.members == once.members == sorted(epochs)
        assert often.directory.snapshot() == once.directory.snapshot()
        await controller.close()

    asyncio.run(body())


def test_records_are_on_disk_when_the_call_returns(run: Run, url: str) -> None:
    async def body(controller: PrefixCacheController) -> None:
        assert await controller.open(opening()) == opening()
        assert (verify(url).records, verify(url).unsettled) == (1, 1)
        settled = await controller.settle(settlement())
        assert settled.amount_nanodollars == 64 * 1 + 36 * 10 + 5 * 100
        assert await controller.settle(settlement(output_tokens=99)) == settled
        assert (verify(url).records, verify(url).unsettled) == (2, 0)
        (totals,) = await controller.totals()
        assert (totals.tenant, totals.requests, totals.amount_nanodollars) == ("acme", 1, 924)

    run(body)


def test_what_comes_at_once_shares_a_transaction_and_fails_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    append = Ledger.append
    monkeypatch.setattr(
        Ledger, "append", lambda ledger, batch: sizes.append(len(batch)) or append(ledger, batch)
    )

    async def body(controller: PrefixCacheController) -> None:
        calls = [controller.open(opening(f"r{i}")) for i in range(40)]
        calls.append(controller.settle(settlement("never")))  # type: ignore[arg-type]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert answers[:40] == [opening(f"r{i}") for i in range(40)]
        assert isinstance(answers[40], RecordRefused)
        assert sizes == [41]

    run(body)


def test_a_ledger_that_is_away_refuses_and_may_come_back(run: Run, tmp_path: Path) -> None:
    (tmp_path / "ledger.db").mkdir()

    async def body(controller: PrefixCacheController) -> None:
        await controller.register(info("p1"))  # the rest of the controller goes on
        with pytest.raises(LedgerUnavailable, match=r"ledger\.db cannot be used"):
            await controller.open(opening())
        with pytest.raises(LedgerUnavailable):
            await controller.totals()
        (tmp_path / "ledger.db").rmdir()
        assert await controller.open(opening()) == opening()

    run(body)


def test_a_caller_that_gave_up_harms_nobody(run: Run) -> None:
    async def body(controller: PrefixCacheController) -> None:
        gone = asyncio.create_task(controller.open(opening("r1")))
        stays = asyncio.create_task(controller.open(opening("r2")))
        await asyncio.sleep(0)
        gone.cancel()
        assert await stays == opening("r2")
        assert await controller.open(opening("r1")) == opening("r1")

    run(body)


def test_whatever_breaks_in_the_ledger_reaches_the_caller(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(ledger: Ledger, batch: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(Ledger, "append", broken)

    async def body(controller: PrefixCacheController) -> None:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await controller.open(opening())

    run(body)


class TestOrphans:
    async def tick(self, controller: PrefixCacheController, clock: Clock, seconds: float) -> None:
        clock.now += seconds
        await controller.watch(-1, 0)
        await asyncio.gather(*controller._settling)

    def test_settled_with_what_was_emitted_after_the_grace_period(
        self, run: Run, clock: Clock, url: str
    ) -> None:
        async def body(controller: PrefixCacheController) -> None:
            await controller.open(opening())
            await controller.orphaned("r1", 7)  # by the decode worker
            await controller.orphaned("r1", 1)  # by the prefill worker
            await self.tick(controller, clock, ORPHAN_GRACE_S - 0.1)
            assert verify(url).unsettled == 1
            await self.tick(controller, clock, 0.2)
            assert verify(url).unsettled == 0
            (totals,) = await controller.totals()
            assert totals.output_tokens == 7
            assert (await controller.settle(settlement())).finish == "orphaned"

        run(body)

    def test_a_gateway_that_settles_in_time_is_believed(self, run: Run, clock: Clock) -> None:
        async def body(controller: PrefixCacheController) -> None:
            await controller.open(opening())
            await controller.orphaned("r1", 1)
            first = await controller.settle(settlement())
            await self.tick(controller, clock, ORPHAN_GRACE_S + 1)
            assert await controller.settle(settlement(output_tokens=0)) == first

        run(body)

    def test_one_that_was_never_opened_is_forgotten(self, run: Run, clock: Clock, url: str) -> None:
        async def body(controller: PrefixCacheController) -> None:
            await controller.orphaned("never", 1)
            await self.tick(controller, clock, ORPHAN_GRACE_S + 1)
            assert verify(url).records == 0

        run(body)

    def test_waits_for_a_ledger_that_is_away(
        self, run: Run, clock: Clock, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def away(ledger: Ledger, request_id: str) -> Any:
            raise LedgerUnavailable("away")

        async def body(controller: PrefixCacheController) -> None:
            await controller.open(opening())
            await controller.orphaned("r1", 3)
            monkeypatch.setattr(Ledger, "find", away)
            await self.tick(controller, clock, ORPHAN_GRACE_S + 1)
            monkeypatch.undo()
            assert verify(url).unsettled == 1
            await self.tick(controller, clock, ORPHAN_GRACE_S + 1)
            assert verify(url).unsettled == 0

        run(body)

    def test_settled_at_once_when_the_controller_is_closed(self, url: str, clock: Clock) -> None:
        async def body() -> None:
            controller = PrefixCacheController(url, "s", clock=clock)
            await controller.open(opening())
            await controller.orphaned("r1", 3)
            await controller.close()

        asyncio.run(body())
        assert verify(url).unsettled == 0
