"""Requests over real workers in this process: prefill -> ship -> decode over real sockets and process groups, no Ray, no HTTP."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from cluster.controller import WorkerInfo
from cluster.fleet import Fleet
from cluster.flight import Flight, Pilot
from cluster.prefix_directory import PrefixDirectory
from cluster.router import Costs
from workers.config import EngineConfig
from workers.page_hash import page_hashes
from workers.request import Request, SamplingParams
from workers.start import RunningWorker, make_engine, start_worker
from workers.tiny import write_tiny

SECRET = "secret"
CONFIG = EngineConfig(max_batched_tokens=192, cache_bytes=12 * 2**20, max_context=3000, threads=1)
T = TypeVar("T")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    return folder


def _start(role: str, model: Path, number: int, config: EngineConfig = CONFIG) -> RunningWorker:
    return start_worker(
        role=role,  # type: ignore[arg-type]
        model=model,
        engine_config=config,
        worker_id=f"{role}-{number}",
        epoch=random.getrandbits(40),
        host="127.0.0.1",
        secret=SECRET,
    )


def _info(running: RunningWorker) -> WorkerInfo:
    worker = running.worker
    return WorkerInfo(
        worker=worker.id,
        epoch=worker.epoch,
        role=worker.id.split("-")[0],
        host="127.0.0.1",
        port=running.server.port,
        ship_host=running.ship_host,
        ship_port=running.ship_port,
        pid=0,
        node="here",
    )


class Cluster:
    """Two workers of each role and a gateway's view of them."""

    def __init__(self, model: Path, config: EngineConfig = CONFIG, each: int = 2) -> None:
        self.prefills = [_start("prefill", model, n, config) for n in range(each)]
        self.decodes = [_start("decode", model, n, config) for n in range(each)]
        peers = {d.worker.id: (d.ship_host, d.ship_port, d.worker.epoch) for d in self.decodes}
        for prefill in self.prefills:
            prefill.set_peers(peers)

    @property
    def all(self) -> list[RunningWorker]:
        return self.prefills + self.decodes

    def run(self, work: Callable[[Pilot, Fleet], Awaitable[T]]) -> T:
        """Runs a coroutine with a fleet that is connected to every worker and trusts every pair."""

        async def body() -> T:
            fleet = Fleet(gateway="test", secret=SECRET, timeout_s=3)
            fleet.set_members([_info(running) for running in self.all])
            pairs = len(self.prefills) * len(self.decodes)
            async with asyncio.timeout(20):
                while len(fleet.linked_pairs()) < pairs:
                    await asyncio.sleep(0.02)
            fleet.proven = fleet.linked_pairs()
            try:
                return await work(Pilot(fleet, Costs(bytes_per_token=788 * 4), PrefixDirectory()), fleet)
            finally:
                await fleet.close()

        return asyncio.run(body())

    def idle(self) -> bool:
        loads = [running.worker.latest_load for running in self.all]
        return not any(load.held_pages or load.running or load.waiting for load in loads)

    def stop(self) -> None:
        for running in self.all:
            running.stop()


@pytest.fixture(scope="module")
def cluster(model: Path) -> Iterator[Cluster]:
    running = Cluster(model)
    yield running
    running.stop()


def _flight(number: int, num_tokens: int, **sampling: object) -> Flight:
    generator = random.Random(number)
    prompt = [generator.randrange(10, 260) for _ in range(num_tokens)]
    params = SamplingParams(**{"max_tokens": 20, "temperature": 0.0, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
    return Flight(
        id=f"flight-{number}-{num_tokens}-{random.getrandbits(30)}",
        prompt=prompt,
        sampling=params,
        namespace=b"test",
        page_hashes=page_hashes(b"test", prompt),
    )


async def _collect(flights: AsyncIterator[object]) -> None:
    async for _ in flights:
        pass


def _alone(model: Path, flights: list[Flight]) -> list[list[int]]:
    """The same requests in one plain engine, one after another."""
    engine, _ = make_engine(model, CONFIG)
    outputs = []
    for flight in flights:
        request = Request(flight.id, list(flight.prompt), len(flight.prompt), flight.sampling, b"alone")
        engine.add(request)
        while engine.has_work():
            engine.step()
        outputs.append(request.tokens[len(flight.prompt) :])
    return outputs


def test_shipped_requests_equal_one_plain_engine(cluster: Cluster, model: Path) -> None:
    flights = [
        _flight(seed, length, temperature=0.0 if seed % 2 else 0.9, seed=seed)
        for seed, length in enumerate([1, 20, 63, 64, 65, 200, 500, 777])
    ]

    async def work(pilot: Pilot, _: Fleet) -> None:
        await asyncio.gather(*(_collect(pilot.fly(flight)) for flight in flights))

    cluster.run(work)
    assert [flight.emitted for flight in flights] == _alone(model, flights)
    assert all(flight.finish == "length" and not flight.restarts for flight in flights)


def test_a_stream_goes_on_when_its_decode_worker_is_lost(model: Path) -> None:
    cluster = Cluster(model)
    flights = [
        _flight(100 + seed, 150 + 30 * seed, max_tokens=60, temperature=0.7, seed=seed) for seed in range(6)
    ]

    async def work(pilot: Pilot, fleet: Fleet) -> None:
        async def fly(flight: Flight) -> None:
            async for _ in pilot.fly(flight):
                if flight is flights[0] and len(flight.emitted) == 10:
                    threading.Thread(target=cluster.decodes[0].stop).start()
                if flight is flights[1] and len(flight.emitted) == 20:
                    threading.Thread(target=cluster.prefills[0].stop).start()

        await asyncio.gather(*(fly(flight) for flight in flights))
        assert len(fleet.routable_pairs()) == 1

    try:
        cluster.run(work)
        assert [flight.emitted for flight in flights] == _alone(model, flights)
        assert any(flight.restarts for flight in flights)
    finally:
        cluster.stop()
