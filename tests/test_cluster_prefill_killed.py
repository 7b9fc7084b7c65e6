"""A prefill worker's process is killed with a shipment half sent: over Gloo, and over NCCL where there is a GPU."""

import asyncio
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from in_process_cluster import CONFIG, SECRET, alone, collect, info, sampled_flight, start
from shipping_sides import START, be_host, processes

from cluster.controller import WorkerInfo
from cluster.fleet import Fleet
from cluster.flight import Flight, Pilot
from cluster.prefix_directory import PrefixDirectory
from cluster.router import Costs
from workers.ranks.shippers import Peer
from workers.shipping.pair import Pair
from workers.start import RunningWorker
from workers.tiny import write_tiny

PAGES_FREE_S = 5.0  # within which the pages of the request that was caught must be free again
PLACES = [
    pytest.param("cpu", "cpu", id="gloo"),
    pytest.param(
        "cuda:0",
        f"cuda:{max(torch.cuda.device_count() - 1, 0)}",
        id="nccl",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() == 0, reason="there is no CUDA device"),
        ],
    ),
]


def prefill_process(pipe: Connection, model: Path, device: str) -> None:
    """A prefill worker that is told its peers, and perhaps to stop short of a payload whose header has left."""
    be_host("of prefill")  # NCCL joins it with a decode worker on the same GPU, too
    torch.set_num_threads(1)
    running = start("prefill", model, 0, msgspec.structs.replace(CONFIG, device=device))
    pipe.send(info(running))
    send = Pair.send

    def stuck(self: Pair, payload: torch.Tensor, tag: int) -> Any:
        if payload.numel() > 1 and next(sends):
            pipe.send("stuck")
            time.sleep(START)
        return send(self, payload, tag)

    while (command := pipe.recv()) is not None:
        if command == "stick":
            sends = iter([False, True])
            Pair.send = stuck  # type: ignore[method-assign]
        else:
            running.set_peers(command)
    running.stop()


class PrefillProcess:
    def __init__(self, model: Path, device: str) -> None:
        self.pipe, theirs = processes.Pipe()
        self.process = processes.Process(target=prefill_process, args=(theirs, model, device), daemon=True)
        self.process.start()

    def info(self) -> WorkerInfo:
        assert self.pipe.poll(START)
        return self.pipe.recv()

    def kill(self) -> None:
        """With SIGKILL."""
        self.process.kill()
        self.process.join()


async def until(condition: Any, within: float = START) -> float:
    """Seconds it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + within, "it did not come about"
        await asyncio.sleep(0.01)
    return time.monotonic() - started


async def story(decode: RunningWorker, victim: PrefillProcess, successor: PrefillProcess) -> Flight:
    """-> the flight that was caught, at its end."""
    decode_worker = decode.worker
    peers = {decode_worker.id: Peer(decode.ship_host, decode.ship_port, decode_worker.epoch)}
    fleet = Fleet(gateway="gateway-0", secret=SECRET, timeout_s=3)

    async def join(prefill: PrefillProcess) -> None:
        member = await asyncio.to_thread(prefill.info)
        prefill.pipe.send(peers)
        fleet.set_members([info(decode), member])
        key = (member.worker, member.epoch)
        await until(lambda: key in {pair[0] for pair in fleet.linked_pairs()})
        fleet.proven = fleet.linked_pairs()

    try:
        await join(victim)
        pilot = Pilot(fleet, Costs(bytes_per_token=788 * 4), PrefixDirectory())
        other, caught = sampled_flight(1, 150, max_tokens=2000), sampled_flight(2, 700, max_tokens=12)
        others = asyncio.create_task(collect(pilot.fly(other)))
        await until(lambda: len(other.emitted) > 5)
        held = decode_worker.latest_load.held_pages

        victim.pipe.send("stick")
        rest = asyncio.create_task(collect(pilot.fly(caught)))
        assert await asyncio.to_thread(victim.pipe.poll, START)
        assert victim.pipe.recv() == "stuck"
        (attempt,) = caught.attempts
        assert attempt.id in decode_worker.jobs
        assert decode_worker.latest_load.held_pages >= held + len(caught.prompt) // 64
        seen = len(other.emitted)
        await until(lambda: len(other.emitted) > seen + 3)

        victim.kill()
        assert await until(lambda: attempt.id not in decode_worker.jobs, PAGES_FREE_S) < PAGES_FREE_S
        seen = len(other.emitted)
        await until(lambda: len(other.emitted) > seen + 3)
        assert decode_worker.latest_load.held_pages <= held + 2000 // 64

        await join(successor)
        await rest
        assert not other.restarts
        assert not others.done()
        others.cancel()
        await asyncio.wait([others])
        await until(lambda: not decode_worker.latest_load.held_pages)
        return caught
    finally:
        await fleet.close()


@pytest.mark.parametrize(("from_device", "to_device"), PLACES)
def test_killed_in_mid_shipment(tmp_path: Path, from_device: str, to_device: str) -> None:
    """The decode worker goes on with the others, frees the pages in time, and pairs with the successor, which ships them."""
    write_tiny(tmp_path)
    victim, successor = (PrefillProcess(tmp_path, from_device) for _ in range(2))
    decode = start("decode", tmp_path, 0, msgspec.structs.replace(CONFIG, device=to_device))
    try:
        caught = asyncio.run(story(decode, victim, successor))
        assert caught.restarts >= 1
        if to_device == "cpu":
            assert [caught.emitted] == alone(tmp_path, [caught])
        assert len(caught.emitted) == 12
        successor.pipe.send(None)
        successor.process.join(START)
    finally:
        for prefill in (victim, successor):
            prefill.kill()
        decode.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "payloads"]
