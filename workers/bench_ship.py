"""Measures shipping alone: the caches of one prompt, from the memory of one process to that of another, each page packed, sent,
verified and written by the code that serves.

    python -m workers.bench_ship                             two GPUs and NCCL
    python -m workers.bench_ship --tokens 4096 --layers 2    small enough for a CPU and Gloo

NCCL cannot join a GPU with itself: with one GPU the two processes share it and ship through host memory, over Gloo, and with none
they ship between CPUs. The first line says which. A table, then one line of JSON. Rates are of page bytes, 788 a token and layer at the sizes of
V3.2, in GB (1e9) a second.
"""

import argparse
import json
import multiprocessing
import os
import queue
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from kernels.dispatch import select
from kernels.layout import PAGE_SIZE, CacheLayout
from workers.messages import Ticket
from workers.paged_cache import PagedCache
from workers.shipping.outbox import Part, split
from workers.shipping.pair import (
    DECODE_RANK,
    LARGEST_MESSAGE,
    PREFILL_RANK,
    Pair,
    backend_for,
    gpu_of,
    open_store,
)
from workers.shipping.protocol import Backend, Fingerprint, LinkConfig
from workers.shipping.receiver import Landing, Shipment, write
from workers.shipping.sender import Shipper

LAYOUT = CacheLayout(latent_dim=512, rope_dim=64, index_dim=128)
HOST, SECRET, EPOCH = "127.0.0.1", "of the benchmark", 1
WAIT_S = 60.0  # reached only if something hangs
MIB = 2**20


def make_cache(device: str, num_layers: int, num_pages: int) -> PagedCache:
    ops = select("triton" if device.startswith("cuda") else "reference")
    return PagedCache(LAYOUT, num_layers=num_layers, num_pages=num_pages, device=device, ops=ops)


class DecodeSide:
    """A decode worker without a model: one thread, that of `serve`, has written what comes and answers it, as an engine would."""

    def __init__(self, device: str, num_layers: int, num_pages: int) -> None:
        self.cache = make_cache(device, num_layers, num_pages)
        self._arrivals: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._seconds: list[float] = []
        self._store = open_store(HOST)
        self.landing = Landing(worker_id="d", epoch=EPOCH, host=HOST, secret=SECRET, cache=self.cache)
        self.landing.on_shipment = lambda shipment: self._arrivals.put(partial(self._write, shipment))
        self.landing.on_verified = lambda shipment: self._arrivals.put(shipment.accept)
        self.landing.on_commit = lambda commit: self._arrivals.put(None)
        self.landing.start()

    def where(self) -> tuple[str, int, int]:
        return HOST, self.landing.port, EPOCH

    def gpu(self) -> str | None:
        return gpu_of(self.cache.latent.device)

    def store_port(self) -> int:
        return int(self._store.port)

    def serve(self) -> list[float]:
        """Takes everything up to the commit. Returns for how long each shipment held the engine thread up, seconds."""
        self._seconds = []
        while (command := self._arrivals.get(timeout=WAIT_S)) is not None:
            command()
        return self._seconds

    def fingerprint(self, page_ids: list[int]) -> list[int]:
        return fingerprint(self.cache, page_ids)

    def time_unpacking(self, parts: list[Part]) -> float:
        """Seconds to verify and write these parts, each alone."""
        total = 0.0
        for part in parts:
            pages = pages_of(self.cache, part)
            payload = self.cache.ops.pack_pages(pages, part.layers, part.page_ids)
            total += seconds(partial(self.cache.ops.unpack_pages, payload, pages, part.layers, part.page_ids))
        return total

    def receive(self, key: str, backend: Backend, sizes: list[int]) -> None:
        pair = make_pair(self.cache, DECODE_RANK, self.store_port(), key, backend)
        for tag, size in enumerate(sizes, 1):
            _, work = pair.receive(size, tag)
            pair.wait(work, WAIT_S)
        pair.abort()

    def _write(self, shipment: Shipment) -> None:
        started = time.perf_counter()
        write(shipment, self.cache)
        self._seconds.append(time.perf_counter() - started)


def decode_process(pipe: Connection, *sizes: Any) -> None:
    torch.set_num_threads(1)
    side = DecodeSide(*sizes)
    while (call := pipe.recv()) is not None:
        pipe.send(getattr(side, call[0])(*call[1:]))
    side.landing.close()


class Child:
    """The decode side's process. `begin` a call, and `end` it with its result."""

    def __init__(self, *sizes: Any) -> None:
        processes = multiprocessing.get_context("spawn")
        self._pipe, theirs = processes.Pipe()
        self.process = processes.Process(target=decode_process, args=(theirs, *sizes), daemon=True)
        self.process.start()

    def begin(self, *call: Any) -> None:
        self._pipe.send(call)

    def end(self) -> Any:
        if not self._pipe.poll(WAIT_S):
            raise TimeoutError("the decode process hangs")
        return self._pipe.recv()

    def call(self, *call: Any) -> Any:
        self.begin(*call)
        return self.end()

    def stop(self) -> None:
        self._pipe.send(None)
        self.process.join()


class PrefillSide:
    """Ships pages of its cache, as one prompt's."""

    def __init__(self, device: str, num_layers: int, num_pages: int, child: Child) -> None:
        self.cache = make_cache(device, num_layers, num_pages)
        self.cache.latent.random_()
        self.cache.index.random_()
        synchronize()
        generator = torch.Generator().manual_seed(0)
        self.sources, self.targets = (
            torch.randperm(num_pages, generator=generator).tolist() for _ in range(2)
        )
        self.child = child
        self.backend = backend_for(gpu_of(self.cache.latent.device), child.call("gpu"))
        self._ends: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._num_requests = 0

    def ticket(self) -> Ticket:
        self._num_requests += 1
        name, pages = f"prompt-{self._num_requests}", self.targets
        return Ticket("d", EPOCH, name, pages, [0] * len(pages), 0)

    def parts(self, buffer_bytes: int, page_indices: Sequence[int]) -> list[Part]:
        ids = [self.sources[index] for index in page_indices]
        most = min(buffer_bytes, LARGEST_MESSAGE[self.backend])
        return list(split(self.ticket(), page_indices, ids, fingerprint=self.fingerprint(), max_bytes=most))

    def fingerprint(self) -> Fingerprint:
        return Fingerprint.of(LAYOUT, self.cache.latent.shape[0])

    def shipper(self, buffer_bytes: int, in_flight: int) -> Shipper:
        shipper = Shipper(
            worker_id="p",
            epoch=time.monotonic_ns(),  # each shipper takes the place of the one before
            secret=SECRET,
            cache=self.cache,
            on_done=lambda request_id: self._ends.put(None),
            on_failed=lambda request_id, reason: self._ends.put(reason),
            config=LinkConfig(max_shipment_bytes=buffer_bytes, max_in_flight=in_flight),
        )
        shipper.set_peers({"d": self.child.call("where")})
        deadline = time.monotonic() + WAIT_S
        while not shipper.peers():
            if time.monotonic() > deadline:
                raise TimeoutError("the two sides do not pair")
            time.sleep(0.01)
        return shipper

    def ship(self, shipper: Shipper, page_indices: Sequence[int]) -> tuple[float, list[float]]:
        """Seconds from `ship` to the decode side's word that it has everything, and what its engine spent on each shipment."""
        self.child.begin("serve")
        ticket, ids = self.ticket(), [self.sources[index] for index in page_indices]
        started = time.perf_counter()
        shipper.ship(ticket, page_indices, ids)
        shipper.commit(ticket, 1, None)
        reason = self._ends.get(timeout=WAIT_S)
        took = time.perf_counter() - started
        if reason is not None:
            raise RuntimeError(reason)
        return took, self.child.end()

    def time_packing(self, parts: list[Part]) -> float:
        pack = self.cache.ops.pack_pages
        return sum(
            seconds(partial(pack, pages_of(self.cache, part), part.layers, part.page_ids)) for part in parts
        )

    def time_sending(self, parts: list[Part], key: str) -> float:
        """Seconds to send messages of these sizes one after the other, without pages or answers."""
        of_cache = self.fingerprint()
        sizes = [part.header(1, prefill_epoch=1, fingerprint=of_cache).payload_bytes for part in parts]
        store_port = self.child.call("store_port")
        self.child.begin("receive", key, self.backend, sizes)
        pair = make_pair(self.cache, PREFILL_RANK, store_port, key, self.backend)
        of_size = {size: torch.zeros(size, dtype=torch.uint8, device=pair.payload_device) for size in sizes}
        synchronize()
        started = time.perf_counter()
        for work in [pair.send(of_size[size], tag) for tag, size in enumerate(sizes, 1)]:
            pair.wait(work, WAIT_S)
        took = time.perf_counter() - started
        self.child.end()
        pair.abort()
        return took


def fingerprint(cache: PagedCache, page_ids: list[int]) -> list[int]:
    """The checksum of the checksums of these pages, of each cache."""
    found = []
    for pages in (cache.latent, cache.index):
        rows = pages[:, page_ids].flatten(2).flatten(0, 1)
        sums = cache.ops.checksums(rows).view(torch.uint8)
        found.append(int(cache.ops.checksums(sums.view(1, -1))))
    return found


def pages_of(cache: PagedCache, part: Part) -> torch.Tensor:
    return cache.latent if part.kind == "latent" else cache.index


def seconds(action: Callable[[], Any], repeats: int = 3) -> float:
    """The shortest of some runs, each until the device is done."""
    found = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        action()
        synchronize()
        found.append(time.perf_counter() - started)
    return min(found)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_pair(cache: PagedCache, rank: int, store_port: int, key: str, backend: Backend) -> Pair:
    return Pair(
        backend=backend,
        rank=rank,
        store=(HOST, store_port),
        key=key,
        address=HOST,
        device=cache.latent.device,
        timeout_s=WAIT_S,
    )


def measure(
    side: PrefillSide, tokens: int, buffer_bytes: int, in_flight: int, repeats: int
) -> dict[str, Any]:
    """One prompt shipped as a whole, and what of that its parts would take alone."""
    num_layers, pages = side.cache.latent.shape[0], range(-(-tokens // PAGE_SIZE))
    shipper = side.shipper(buffer_bytes, in_flight)
    runs = [side.ship(shipper, pages) for _ in range(repeats + 1)][1:]
    shipper.close()
    if side.child.call("fingerprint", side.targets[: len(pages)]) != fingerprint(
        side.cache, side.sources[: len(pages)]
    ):
        raise RuntimeError("what has landed is not what was shipped")
    parts = side.parts(buffer_bytes, pages)
    total = len(pages) * num_layers * LAYOUT.page_bytes
    took = statistics.median(seconds for seconds, _ in runs)
    return {
        "tokens": tokens,
        "mb": total / 1e6,
        "buffer_mib": buffer_bytes / MIB,
        "shipments": len(parts),
        "ms": 1e3 * took,
        "gb_per_s": total / took / 1e9,
        "pack_ms": 1e3 * side.time_packing(parts),
        "send_ms": 1e3 * side.time_sending(parts, f"alone-{tokens}-{buffer_bytes}"),
        "unpack_ms": 1e3 * side.child.call("time_unpacking", parts),
        "engine_us": 1e6 * statistics.median(each for _, shipments in runs for each in shipments),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{'tokens':>8} {'MB':>8} {'buffer MiB':>11} {'shipments':>10} {'ms':>9} {'GB/s':>7}   alone, ms: "
        f"{'pack':>8} {'send':>8} {'unpack':>8}   {'engine us a shipment':>20}"
    ]
    for row in rows:
        alone = " ".join(f"{row[name]:8.2f}" for name in ("pack_ms", "send_ms", "unpack_ms"))
        lines.append(
            f"{row['tokens']:>8} {row['mb']:8.1f} {row['buffer_mib']:11.1f} {row['shipments']:>10} {row['ms']:9.2f} "
            f"{row['gb_per_s']:7.2f}              {alone}   {row['engine_us']:20.0f}"
        )
    return "\n".join(lines)


def title(devices: list[str], backend: Backend, layers: int, in_flight: int) -> str:
    way = "NCCL" if backend == "nccl" else "Gloo"
    if backend == "gloo" and devices[0] != "cpu":
        way = "Gloo and host memory, because NCCL cannot join a GPU with itself: for NCCL it takes two"
    return f"{devices[0]} -> {devices[1]} over {way}; {layers} layers, {in_flight} buffers in flight"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m workers.bench_ship", description="Measures shipping alone, between two processes."
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768, 131072], help="of the prompt")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--buffers", type=float, nargs="+", default=[32.0], help="MiB of pages in a buffer")
    parser.add_argument("--in-flight", type=int, default=LinkConfig().max_in_flight)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")  # inherited by the other process
    gpus = torch.cuda.device_count()
    devices = [f"cuda:{number % gpus}" if gpus else "cpu" for number in range(2)]
    if not gpus:
        torch.set_num_threads(1)
    num_pages = -(-max(asked.tokens) // PAGE_SIZE)
    child = Child(devices[1], asked.layers, num_pages)
    side = PrefillSide(devices[0], asked.layers, num_pages, child)
    print(title(devices, side.backend, asked.layers, asked.in_flight), flush=True)
    rows = [
        measure(side, tokens, int(size * MIB), asked.in_flight, asked.repeats)
        for tokens in asked.tokens
        for size in asked.buffers
    ]
    child.stop()
    print(table(rows))
    print(json.dumps({"layers": asked.layers, "devices": devices, "backend": side.backend, "results": rows}))


if __name__ == "__main__":
    main()
