"""Two workers of each role in this process, over real sockets and process groups, without Ray and HTTP."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from cluster.controller import WorkerInfo
from cluster.fleet import Fleet
from cluster.flight import Flight, Pilot
from cluster.prefix_directory import PrefixDirectory
from cluster.router import Costs
from workers.config import EngineConfig
from workers.page_hash import page_hashes
from workers.ranks.shippers import Peer
from workers.request import Request, SamplingParams
from workers.start import RunningWorker, make_engine, start_worker

SECRET = "secret"
CONFIG = EngineConfig(max_batched_tokens=192, cache_bytes=12 * 2**20, max_context=3000, threads=1)
T = TypeVar("T")


def start(role: str, model: Path, number: int, config: EngineConfig = CONFIG) -> RunningWorker:
    return start_worker(
        role=role,  # type: ignore[arg-type]
        model=model,
        engine_config=config,
        worker_id=f"{role}-{number}",
        epoch=random.getrandbits(40),
        host="127.0.0.1",
        secret=SECRET,
    )


def info(running: RunningWorker) -> WorkerInfo:
    worker = running.worker
    return WorkerInfo(
        worker=worker.id,
        epoch=worker.epoch,
        role=worker.id.split("-")[0],
        host="127.0.0.1",
        port=running.server.port,
        ship_host=running.ship_host,
        ship_port=running.ship_port,
        rank_ports=list(running.rank_ports),
        pid=0,
        node="here",
    )


class Cluster:
    """Two workers of each role and a gateway's view of them."""

    def __init__(
        self,
        model: Path,
        config: EngineConfig = CONFIG,
        each: int = 2,
        ranks: Sequence[int] = (),
    ) -> None:
        """ranks: instead of `each`, how many ranks the workers of a role have."""
        configs = [msgspec.structs.replace(config, ranks=count) for count in ranks] or [config] * each
        self.prefills = [start("prefill", model, n, config) for n, config in enumerate(configs)]
        self.decodes = [start("decode", model, n, config) for n, config in enumerate(configs)]
        self.directory = PrefixDirectory()
        self.link()

    def link(self) -> None:
        """Tells prefill workers of the decode workers there are."""
        peers = {
            d.worker.id: Peer(d.ship_host, d.ship_port, d.worker.epoch, d.rank_ports) for d in self.decodes
        }
        for prefill in self.prefills:
            prefill.set_peers(peers)

    @property
    def all(self) -> list[RunningWorker]:
        return self.prefills + self.decodes

    def run(self, work: Callable[[Pilot, Fleet], Awaitable[T]]) -> T:
        """Runs a coroutine with a fleet that is connected to every worker and trusts every pair."""

        async def body() -> T:
            fleet = Fleet(gateway="gateway-0", secret=SECRET, timeout_s=3)
            fleet.set_members([info(running) for running in self.all])
            pairs = len(self.prefills) * len(self.decodes)
            async with asyncio.timeout(20):
                while len(fleet.linked_pairs()) < pairs:
                    await asyncio.sleep(0.02)
            fleet.proven = fleet.linked_pairs()
            try:
                return await work(Pilot(fleet, Costs(bytes_per_token=788 * 4), self.directory), fleet)
            finally:
                await fleet.close()

        return asyncio.run(body())

    def idle(self) -> bool:
        loads = [running.worker.latest_load for running in self.all]
        return not any(load.held_pages or load.running or load.waiting for load in loads)

    def stop(self) -> None:
        for running in self.all:
            running.stop()


def sampled_flight(
    number: int,
    num_tokens: int,
    *,
    max_tokens: int,
    temperature: float = 0.9,
    pair: tuple[str, str] | None = None,
) -> Flight:
    """A prompt and a sampling that follow from `number`."""
    generator = random.Random(number)
    prompt = [generator.randrange(10, 260) for _ in range(num_tokens)]
    return Flight(
        id=f"flight-{number}",
        prompt=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=number, ignore_eos=True),
        namespace=b"test",
        page_hashes=page_hashes(b"test", prompt),
        pair=pair,
    )


async def collect(flights: AsyncIterator[object]) -> None:
    async for _ in flights:
        pass


def alone(model: Path, flights: list[Flight]) -> list[list[int]]:
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
