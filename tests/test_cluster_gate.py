"""What passes the gate, when, and that whoever leaves takes nothing along."""

import asyncio
from typing import Any

import pytest

from cluster.gate import FIRST_WINDOW, SOON_S, WINDOW_S, Gate, have_room
from cluster.router import WorkerView

RATE = 1e-3


def _prefill(**figures: Any) -> WorkerView:
    return WorkerView(worker="p", **{"seconds_per_token": RATE, **figures})


def _decode(**figures: Any) -> WorkerView:
    return WorkerView(worker="d", max_running=4, **{"available_pages": 100, **figures})


def _room(prefills: list[WorkerView], decodes: list[WorkerView], num_tokens: int = 640) -> bool:
    return have_room(num_tokens, prefills=prefills, decodes=decodes)


WINDOW = int(WINDOW_S / RATE)


@pytest.mark.parametrize(
    ("prefill", "decode", "passes"),
    [
        ({}, {}, True),
        ({"queued_tokens": WINDOW - 1}, {}, True),
        ({"queued_tokens": WINDOW}, {}, False),
        ({"queued_tokens": WINDOW // 2, "assigned_tokens": WINDOW // 2}, {}, False),
        ({"queued_tokens": WINDOW}, {"running": 1, "step_seconds": 0.1}, True),  # its ticket takes a step
        ({"seconds_per_token": 0.0, "queued_tokens": FIRST_WINDOW - 1}, {}, True),
        ({"seconds_per_token": 0.0, "queued_tokens": FIRST_WINDOW}, {}, False),
        ({}, {"running": 3}, True),
        ({}, {"running": 4}, False),
        ({}, {"running": 2, "assigned_requests": 2}, False),
        ({}, {"running": 3, "available_pages": 13}, True),  # 10 of its own, and one for each other to grow
        ({}, {"running": 3, "available_pages": 12}, False),
        ({}, {"running": 3, "available_pages": 13, "assigned_tokens": 64}, False),
        ({}, {"available_pages": 0}, True),  # nothing runs: whether it ever fits is the worker's to say
    ],
)
def test_workers_get_what_keeps_them_busy(
    prefill: dict[str, Any], decode: dict[str, Any], passes: bool
) -> None:
    assert _room([_prefill(**prefill)], [_decode(**decode)]) is passes


def test_one_idle_worker_of_each_role_is_enough() -> None:
    busy, full = _prefill(queued_tokens=10**6), _decode(running=4)
    assert _room([busy, _prefill()], [full, _decode()])
    assert not _room([busy], [_decode()])
    assert not _room([_prefill()], [full])
    assert not _room([], [])


class _Workers:
    """Takes so many at once."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.order: list[str] = []
        self.gate: Gate[str, str] = Gate(self._admit, lambda item: self._leave())

    def _admit(self, item: str) -> str | None:
        if not self.places:
            return None
        self.places -= 1
        self.order.append(item)
        return item

    def _leave(self) -> None:
        self.places += 1

    async def run(self, item: str, cost: int = 100) -> None:
        await self.gate.wait(item[0], cost, item, give_up=lambda waited_s: None)
        await asyncio.sleep(0)
        self._leave()
        self.gate.look()


def test_tenants_take_turns_whatever_the_order_of_arrival() -> None:
    async def body() -> list[str]:
        workers = _Workers(1)
        flood = [f"a{number}" for number in range(6)] + [f"b{number}" for number in range(6)]
        async with asyncio.TaskGroup() as group:
            for item in flood:
                group.create_task(workers.run(item))
            await asyncio.sleep(0)
            group.create_task(workers.run("c0"))
        assert workers.places == 1
        assert len(workers.gate) == 0
        return workers.order

    order = asyncio.run(body())
    assert order.index("c0") <= 3, "one of each other, and the one that was under way"
    assert [item for item in order if item[0] != "c"] == [f"{t}{n}" for n in range(6) for t in "ab"]


def test_whoever_leaves_takes_nothing_along() -> None:
    async def body() -> None:
        workers = _Workers(0)
        waits = asyncio.create_task(workers.run("a0"))
        follows = asyncio.create_task(workers.run("b0"))
        await asyncio.sleep(0)
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
        assert len(workers.gate) == 1
        workers.places = 1
        workers.gate.look()
        follows.cancel()  # let through in this moment, and gone before it knows
        await asyncio.gather(follows, return_exceptions=True)
        assert (workers.places, len(workers.gate)) == (1, 0)
        await workers.run("c0")
        assert workers.order == ["b0", "c0"]

    asyncio.run(body())


def test_what_happens_often_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        workers = _Workers(0)
        waits = asyncio.create_task(workers.run("a0"))
        await asyncio.sleep(0)
        asked: list[str] = []
        monkeypatch.setattr(workers.gate, "_admit", asked.append)  # answers None: no room
        for _ in range(100):
            workers.gate.look_soon()
        await asyncio.sleep(2 * SOON_S)
        assert asked == ["a0"]
        monkeypatch.undo()
        workers.places = 1
        workers.gate.look_soon()
        await waits

    asyncio.run(body())


def test_waiting_in_vain_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.gate.LOOK_S", 0.001)

    def give_up(waited_s: float) -> None:
        raise ConnectionError("nobody is there")

    async def body() -> None:
        workers = _Workers(0)
        with pytest.raises(ConnectionError):
            await workers.gate.wait("a", 1, "a0", give_up=give_up)
        assert len(workers.gate) == 0

    asyncio.run(body())
