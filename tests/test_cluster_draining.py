"""Workers that are told to go, and such that come later: no request fails and no token is lost or doubled."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process_cluster import Cluster, alone, collect, info, sampled_flight, start

from cluster.fleet import Fleet
from cluster.flight import Flight, Pilot
from cluster.proving import prove_pairs
from workers.start import RunningWorker
from workers.tiny import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, num_hidden_layers=2)
    return folder


@pytest.fixture
def cluster(model: Path) -> Iterator[Cluster]:
    running = Cluster(model)
    yield running
    running.stop()


def _flight(number: int, num_tokens: int) -> Flight:
    return sampled_flight(number, num_tokens, max_tokens=16, temperature=0.7)


class _Departure:
    """One worker that goes as its Serve replica would: it drains, then it stops."""

    def __init__(self, running: RunningWorker, drain_s: float) -> None:
        self.drained: bool | None = None
        self._running = running
        self._drain_s = drain_s
        self._thread = threading.Thread(target=self._go)

    def begin(self) -> None:
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()

    def _go(self) -> None:
        self.drained = self._running.drain(self._drain_s)
        self._running.stop()


async def _until_known(fleet: Fleet, worker: str) -> None:
    """Until the gateway has heard that a worker drains, or has lost it: one without time may go before it could say so."""
    connection = fleet.connections[worker]
    while connection.alive and not connection.load.draining:
        await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> list[list[int]]:
    return alone(model, [*_early(), *_late()])


def _early() -> list[Flight]:
    return [_flight(seed, 90 + 30 * seed) for seed in range(5)]


def _late() -> list[Flight]:
    return [_flight(seed, 70) for seed in (20, 21)]


@pytest.mark.parametrize(
    ("role", "drain_s"),
    [("decode", 60.0), ("decode", 0.0), ("prefill", 60.0)],
    ids=["decode", "decode, handed over", "prefill"],
)
def test_a_worker_goes_under_load(
    cluster: Cluster, undisturbed: list[list[int]], role: str, drain_s: float
) -> None:
    flights, late = _early(), _late()
    leaving = (cluster.decodes if role == "decode" else cluster.prefills)[0]
    departure = _Departure(leaving, drain_s)
    orphans: list[str] = []
    for running in cluster.all:
        running.worker.on_orphan = lambda attempt, _: orphans.append(attempt)

    async def work(pilot: Pilot, fleet: Fleet) -> None:
        async def fly(flight: Flight) -> None:
            async for _ in pilot.fly(flight):
                if flight.attempts[-1].route.decode == leaving.worker.id and len(flight.emitted) > 2:
                    begin.set()
                if role == "prefill":
                    begin.set()

        async def leave() -> None:
            await begin.wait()
            departure.begin()
            await _until_known(fleet, leaving.worker.id)
            assert all(leaving.worker.id not in (p[0], d[0]) for p, d in fleet.linked_pairs())
            assert fleet.state().ready or not drain_s
            await asyncio.gather(*(collect(pilot.fly(flight)) for flight in late))

        begin = asyncio.Event()
        await asyncio.gather(leave(), *(fly(flight) for flight in flights))
        await asyncio.to_thread(departure.wait)

    cluster.run(work)
    assert departure.drained == (drain_s > 0)
    assert not any(flight.restarts for flight in late)
    for flight in late:
        route = flight.attempts[0].route
        assert leaving.worker.id not in (route.prefill, route.decode)
    reasons = {attempt.failure for flight in flights for attempt in flight.attempts if attempt.failure}
    if not drain_s:
        assert f"worker {leaving.worker.id} was lost" in reasons
    assert not orphans  # a request that goes on elsewhere must not be settled
    assert [flight.emitted for flight in flights + late] == undisturbed


def test_workers_that_come_later_pair_before_they_get_requests(model: Path) -> None:
    cluster = Cluster(model, each=1)
    expected = alone(model, [_flight(30, 70)])

    async def work(pilot: Pilot, fleet: Fleet) -> None:
        proving = asyncio.create_task(prove_pairs(fleet, pilot))

        async def fly() -> tuple[str, str]:
            """A request, whose pair must have been proven when it was chosen."""
            flight = _flight(30, 70)
            async for _ in pilot.fly(flight):
                pass
            assert [flight.emitted] == expected
            route = flight.attempts[0].route
            pairs = {(p[0], d[0]) for p, d in fleet.proven}
            assert (route.prefill, route.decode) in pairs
            assert not flight.restarts
            return route.prefill, route.decode

        for role, running in (("decode", cluster.decodes), ("prefill", cluster.prefills)):
            running.append(await asyncio.to_thread(start, role, model, 1))
            fleet.set_members([info(each) for each in cluster.all])
            while not fleet.connections[f"{role}-1"].alive:
                await asyncio.sleep(0.01)
            before = fleet.routable_pairs()
            assert (
                f"{role}-1" not in await fly()
            )  # nobody has told prefill workers yet: the new one is linked to none
            assert fleet.routable_pairs() == before
            assert not fleet.state().ready
            cluster.link()
            while len(fleet.routable_pairs()) < 2 * len(before):
                await asyncio.sleep(0.01)
            assert fleet.state().ready
        busy = await asyncio.gather(*(fly() for _ in range(4)))
        assert len(set(busy)) > 1  # the later ones are used
        proving.cancel()

    try:
        cluster.run(work)
    finally:
        cluster.stop()
