"""Requests over real workers in this process: prefill -> ship -> decode over real sockets and process groups, no Ray, no HTTP."""

import asyncio
import contextlib
import itertools
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from in_process_cluster import CONFIG, Cluster, alone, collect
from oracle import Oracle

from cluster.explanation import explain
from cluster.fleet import Fleet, Mailbox, WorkerLost
from cluster.flight import Flight, Pilot, Reading, Step
from kernels.rows import Rows
from workers.attention import Indexer
from workers.messages import Progress, Tokens, Update
from workers.page_hash import page_hashes
from workers.request import SamplingParams
from workers.tiny import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, num_hidden_layers=2)
    return folder


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


def test_shipped_requests_equal_one_plain_engine(cluster: Cluster, model: Path) -> None:
    flights = [
        _flight(seed, length, temperature=0.0 if seed % 2 else 0.9, seed=seed)
        for seed, length in enumerate([1, 20, 63, 64, 65, 200, 500, 777])
    ]

    async def work(pilot: Pilot, _: Fleet) -> None:
        await asyncio.gather(*(collect(pilot.fly(flight)) for flight in flights))

    cluster.run(work)
    assert [flight.emitted for flight in flights] == alone(model, flights)
    assert all(flight.finish == "length" and not flight.restarts for flight in flights)


@pytest.mark.parametrize("budget", [2048, 96], ids=["whole", "chunked"])
def test_greedy_tokens_equal_transformers(model: Path, tmp_path: Path, budget: int) -> None:
    """Unquantised, through prefill, shipping and decode; prompts shorter and several times longer than top-k, side by side."""
    config = msgspec.structs.replace(
        CONFIG, precision="fp32", max_batched_tokens=budget, cache_bytes=30 * 2**20
    )
    cluster, oracle = Cluster(model, config, each=1), Oracle(model, tmp_path)
    flights = [_flight(number, length, max_tokens=12) for number, length in ((21, 40), (22, 300), (23, 500))]

    async def work(pilot: Pilot, _: Fleet) -> None:
        await asyncio.gather(*(collect(pilot.fly(flight)) for flight in flights))

    try:
        cluster.run(work)
        assert [len(flight.emitted) for flight in flights] == [12, 12, 12]
        for flight in flights:
            assert oracle.continues(flight.prompt, flight.emitted)
    finally:
        cluster.stop()


def _seen(flight: Flight, events: list[object]) -> list[Reading]:
    """The readings among what a flight has yielded, which all come before its first token."""
    readings = list(itertools.takewhile(lambda event: isinstance(event, Reading), events))
    assert all(isinstance(event, Step) for event in events[len(readings) :])
    assert all(reading.total == len(flight.prompt) for reading in readings)
    return readings  # type: ignore[return-value]


def test_a_stream_goes_on_when_its_decode_worker_is_lost(model: Path) -> None:
    cluster = Cluster(model)
    flights = [
        _flight(100 + seed, 150 + 30 * seed, max_tokens=30, temperature=0.7, seed=seed) for seed in range(4)
    ]
    events: dict[Flight, list[object]] = {flight: [] for flight in flights}
    for flight in flights:
        flight.wants_progress = flight.wants_selected_pages = True

    async def work(pilot: Pilot, fleet: Fleet) -> None:
        async def fly(flight: Flight) -> None:
            async for event in pilot.fly(flight):
                events[flight].append(event)
                if flight is flights[0] and len(flight.emitted) == 10:
                    threading.Thread(target=cluster.decodes[0].stop).start()
                if flight is flights[1] and len(flight.emitted) == 20:
                    threading.Thread(target=cluster.prefills[0].stop).start()

        await asyncio.gather(*(fly(flight) for flight in flights))
        assert len(fleet.routable_pairs()) == 1

    try:
        cluster.run(work)
        assert [flight.emitted for flight in flights] == alone(model, flights)
        assert any(flight.restarts for flight in flights)
        for flight in flights:
            processed = [reading.processed for reading in _seen(flight, events[flight])]
            assert processed == sorted(set(processed))
            assert processed[-1] == len(flight.prompt)
            counted = {sum(counts) for counts in flight.selected_pages}
            assert counted == {29 * 64} if not flight.restarts else max(counted, default=0) <= 29 * 64
            assert len({attempt.id for attempt in flight.attempts}) == 1 + flight.restarts
            explained = explain(0, flight)
            *failed, last = explained.attempts
            assert last.failure is None
            assert len(failed) == flight.restarts
            for attempt in explained.attempts:
                assert (attempt.prefill, attempt.decode) == (
                    attempt.alternatives[0].prefill,
                    attempt.alternatives[0].decode,
                )
            for attempt in failed:
                assert attempt.failure
            assert 0 < explained.phases.first_token < explained.phases.total
    finally:
        cluster.stop()


def test_a_flight_tells_how_far_its_prompt_has_been_read(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Update] = []
    for running in cluster.all:

        def emit(updates: Any, emit: Any = running.worker._emit) -> None:
            sent.extend(update for _, update in updates)
            emit(updates)

        monkeypatch.setattr(running.worker, "_emit", emit)
    cold, again, silent = _flight(150, 500), _flight(150, 500), _flight(151, 500)
    cold.wants_progress = again.wants_progress = True

    async def work(pilot: Pilot, _: Fleet) -> list[list[object]]:
        return [[event async for event in pilot.fly(flight)] for flight in (silent, cold, again)]

    nothing, first, second = cluster.run(work)
    assert [reading.processed for reading in _seen(cold, first)] == [0, 192, 384, 500]  # max_batched_tokens
    assert {reading.cache for reading in _seen(cold, first)} == {0}
    last = _seen(again, second)[-1]
    assert (last.cache, last.processed) == (again.num_hit, 500)
    assert len(_seen(again, second)) <= 4
    assert not _seen(silent, nothing)
    progress = {update.request_id.split("#")[0] for update in sent if isinstance(update, Progress)}
    assert progress == {cold.id, again.id}


def _watch_indexers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Rows, torch.Tensor]]:
    """What every indexer in this process selects, with the number of the one that did."""
    seen: list[tuple[int, Rows, torch.Tensor]] = []
    select = Indexer.select

    def watched(self: Indexer, *inputs: Any) -> torch.Tensor:
        selected = select(self, *inputs)
        seen.append((id(self), inputs[2], selected.clone()))
        return selected

    monkeypatch.setattr(Indexer, "select", watched)
    return seen


def _recount(
    seen: list[tuple[int, Rows, torch.Tensor]], first: int, num_pages: int
) -> dict[int, list[list[int]]]:
    """Row by row and slot by slot, for the rows at `first` and later: indexer -> pages."""
    counts: dict[int, list[int]] = {}
    for indexer, rows, selected in seen:
        for request, (start, end) in enumerate(itertools.pairwise(rows.query_starts)):
            pages = rows.page_table[request].tolist()
            for row in range(start, end):
                if rows.positions[row] < first:
                    continue
                of_indexer = counts.setdefault(indexer, [0] * num_pages)
                for slot in selected[row].tolist():
                    if slot >= 0:
                        of_indexer[pages.index(slot // 64)] += 1
    return counts


def test_what_was_read_is_counted_for_those_who_ask(
    cluster: Cluster, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _watch_indexers(monkeypatch)
    asking = _flight(160, 300, max_tokens=24)  # several times top-k; its answer crosses into another page
    others = [_flight(161 + number, 40 + 60 * number, max_tokens=25) for number in range(2)]
    short = _flight(170, 20, max_tokens=1)
    asking.wants_selected_pages = short.wants_selected_pages = True

    async def work(pilot: Pilot, _: Fleet) -> None:
        await asyncio.gather(*(collect(pilot.fly(flight)) for flight in (*others, asking, short)))

    cluster.run(work)
    recount = _recount(seen, 300, num_pages=6)  # no other request is as long
    assert len(asking.selected_pages) == 2  # layers
    assert asking.selected_pages == list(recount.values())
    assert all(sum(counts) == 23 * 64 for counts in asking.selected_pages)  # the last token is never computed
    assert short.selected_pages == []  # its only token came from prefill
    assert not any(flight.selected_pages for flight in others)
    monkeypatch.undo()
    assert [flight.emitted for flight in (asking, *others)] == alone(model, [asking, *others])


def test_a_third_request_ships_only_what_the_decode_worker_lacks(model: Path) -> None:
    cluster = Cluster(model, each=1)
    first = _flight(300, 64 * 5 + 9)
    longer = _flight(300, 64 * 7 + 1)
    longer.prompt[: len(first.prompt)] = first.prompt

    async def work(pilot: Pilot, _: Fleet) -> list[float]:
        shipped = []
        for flight in (first, longer):
            await collect(pilot.fly(flight))
            shipped.append(cluster.prefills[0].links.counters()["shipped_bytes"])
        return shipped

    try:
        page_bytes = 64 * 788 * 2  # 788 bytes a token and layer
        once, twice = cluster.run(work)
        assert once == 6 * page_bytes
        assert twice - once == 3 * page_bytes  # the last partial page of the first request is no prefix
        assert longer.num_hit == 5 * 64
    finally:
        cluster.stop()


def test_a_flipped_byte_of_an_index_page_is_repaired(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTSHIP_TEST_CORRUPT_SHIPMENT", "index:2")
    cluster = Cluster(model, each=1)
    flight = _flight(400, 500)

    async def work(pilot: Pilot, _: Fleet) -> None:
        await collect(pilot.fly(flight))

    try:
        cluster.run(work)
        assert [flight.emitted] == alone(model, [flight])
        assert cluster.decodes[0].links.counters()["refused_pages"] > 0
        assert cluster.prefills[0].links.counters()["resent_shipments"] == 1
    finally:
        cluster.stop()


def test_aborts_at_any_moment_return_every_page(cluster: Cluster) -> None:
    generator = random.Random(9)

    async def work(pilot: Pilot, _: Fleet) -> None:
        async def one(number: int) -> None:
            flight = _flight(500 + number, generator.randrange(1, 700), max_tokens=30)
            limit = generator.choice([0, 1, 2, 10])
            patience = generator.choice([0.0, 0.01, 0.1, 0.5, 30.0])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience), contextlib.aclosing(pilot.fly(flight)) as steps:
                    async for _ in steps:
                        if len(flight.emitted) > limit:
                            break

        await asyncio.gather(*(one(number) for number in range(40)))
        assert pilot.in_progress == 0
        async with asyncio.timeout(20):
            while not cluster.idle():
                await asyncio.sleep(0.05)

    cluster.run(work)
    for running in cluster.all:
        assert not running.worker.jobs
        running.worker.ask(running.worker.engine.pools.check).result(timeout=5)


def test_the_second_token_takes_what_shipping_and_the_first_decode_step_took(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    put = Mailbox.put

    def look(mailbox: Mailbox, update: Any) -> None:
        if isinstance(update, Tokens) and update.start > 0:
            told.append(update.decode_s)
        put(mailbox, update)

    monkeypatch.setattr(Mailbox, "put", look)
    flight = _flight(31, 300, max_tokens=6)
    cluster.run(lambda pilot, fleet: collect(pilot.fly(flight)))
    timing = flight.timing
    assert timing.ship is not None
    assert timing.first_decode is not None
    assert timing.second_token is not None
    assert told[0] > 0 == sum(told[1:]), "the worker tells once how long its first step took"
    assert timing.ship + timing.first_decode == pytest.approx(timing.second_token - timing.first_token)
    # Landing is told with the step that follows it: what the gateway sees of it is no measure of that step.
    assert timing.first_decode >= min(told[0], timing.second_token - timing.first_token)


def test_tokens_that_are_joined_keep_how_long_the_first_step_took() -> None:
    mailbox = Mailbox()
    mailbox.put(Tokens(request_id="r", start=0, tokens=[1], queued_s=0.5, prefill_s=0.25))
    mailbox.put(Tokens(request_id="r", start=1, tokens=[2], decode_s=0.125))
    mailbox.put(Tokens(request_id="r", start=2, tokens=[3]))
    update = asyncio.run(mailbox.get())
    assert not isinstance(update, WorkerLost)
    assert isinstance(update, Tokens)
    assert (update.tokens, update.queued_s, update.prefill_s, update.decode_s) == (
        [1, 2, 3],
        0.5,
        0.25,
        0.125,
    )
