"""Prefill -> ship -> decode with one or two ranks on either side gives the tokens of one plain engine."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process_cluster import CONFIG, Cluster, alone, collect, sampled_flight

from cluster.fleet import Fleet
from cluster.flight import Pilot
from workers.start import RunningWorker
from workers.tiny import write_tiny

SOON = 10.0  # seconds


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, num_hidden_layers=2)
    return folder


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def test_any_number_of_ranks_ships_to_any(model: Path) -> None:
    cluster = Cluster(model, CONFIG, ranks=(1, 2))
    pairs = [(p.worker.id, d.worker.id) for p in cluster.prefills for d in cluster.decodes]
    flights = [
        sampled_flight(10 * pair + number, length, max_tokens=12, pair=pairs[pair])
        for pair in range(4)
        for number, length in enumerate([65, 300])
    ]
    for number in (1, 3, 5, 7):
        flights[number].wants_selected_pages = True

    async def work(pilot: Pilot, _: Fleet) -> None:
        await asyncio.gather(*(collect(pilot.fly(flight)) for flight in flights))

    def total(workers: list[RunningWorker], counter: str) -> float:
        return sum(running.links.counters()[counter] for running in workers)

    try:
        cluster.run(work)
        assert [flight.emitted for flight in flights] == alone(model, flights)
        assert not any(flight.restarts for flight in flights)
        # Each of the twelve sampled rows but the first, in each of 2 layers, has selected its top-k of 64.
        assert {sum(map(sum, flight.selected_pages)) for flight in flights[1::2]} == {2 * 11 * 64}
        wait_until(cluster.idle)
        num_pages = sum(-(-len(flight.prompt) // 64) for flight in flights)
        wait_until(lambda: total(cluster.prefills, "shipped_pages") == num_pages)
        wait_until(lambda: total(cluster.decodes, "landed_bytes") == total(cluster.prefills, "shipped_bytes"))
        pools = cluster.decodes[1].worker.engine.pools
        assert [bool(pools[rank].cached) for rank in range(2)] == [True, True], "a rank had nothing to do"
    finally:
        cluster.stop()
