"""Puts a worker together: model, caches, engine, links, server. One function, the same for every process that runs one."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from kernels import dispatch
from kernels.dispatch import Ops
from kernels.layout import PAGE_SIZE
from workers import memory
from workers.config import EngineConfig
from workers.cpu_threads import use_threads
from workers.decode import DecodeWorker
from workers.engine import Engine
from workers.graphs import DecodeGraphs
from workers.model import Model, load_model
from workers.paged_cache import PagedCache, num_pages_for
from workers.prefill import PrefillWorker
from workers.request import Request, SamplingParams
from workers.runner import Runner
from workers.server import WorkerServer
from workers.shipping.receiver import Landing
from workers.shipping.sender import Shipper
from workers.worker import Worker

Role = Literal["prefill", "decode"]


@dataclass
class RunningWorker:
    """A started worker. `ship_host` and `ship_port` are where a decode worker's landing listens."""

    worker: Worker
    server: WorkerServer
    links: Shipper | Landing
    ship_host: str = ""
    ship_port: int = 0
    stopped: bool = False

    def set_peers(self, peers: dict[str, tuple[str, int, int]]) -> None:
        """Tells a prefill worker of the decode workers: worker -> (host, port, epoch)."""
        if isinstance(self.links, Shipper):
            self.links.set_peers(peers)

    def stop(self) -> None:
        """Ends every thread and connection of the worker. Safe to call twice."""
        if self.stopped:
            return
        self.stopped = True
        self.server.stop()
        self.worker.stop()
        self.links.close()


def make_engine(model: Path, config: EngineConfig, *, ops: Ops | None = None) -> tuple[Engine, PagedCache]:
    """An engine with its caches allocated and its operators warm. Raises CheckpointError or ValueError.

    ops: other operators than those of the back end, for experiments
    """
    if config.threads is not None:
        use_threads(config.threads)
    loaded = load_model(model, config, ops=ops)
    on_gpu = config.device.startswith("cuda")
    num_layers = loaded.config.num_hidden_layers
    num_pages = _num_pages(loaded, config)
    max_context = min(config.max_context or loaded.config.max_position_embeddings, num_pages * PAGE_SIZE)
    # The last page of a GPU's cache is nobody's: surplus rows of a graph write there.
    cache = PagedCache(
        loaded.layout, num_layers=num_layers, num_pages=num_pages + on_gpu, device=config.device
    )
    graphs = (
        DecodeGraphs(loaded, cache, max_rows=config.max_running, max_context=max_context)
        if on_gpu and _can_be_recorded(loaded.ops)
        else None
    )
    engine = Engine(
        Runner(loaded, cache, graphs),
        num_pages=num_pages,
        config=config,
        eos_token_ids=loaded.config.eos_token_ids,
        max_context=max_context,
    )
    _warm(engine, loaded.config.index_topk if on_gpu else 0)
    if graphs is not None:
        graphs.capture()
        _warm(engine, 0)
    return engine, cache


def _can_be_recorded(ops: Ops) -> bool:
    """The reference lets the host look at positions before it selects, which no graph can hold."""
    return ops.select_tokens is not dispatch.select("reference").select_tokens


def _num_pages(model: Model, config: EngineConfig) -> int:
    """ValueError if there is no room for them."""
    if config.device.startswith("cuda"):
        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info(config.device)
        weight_bytes = torch.cuda.memory_allocated(config.device)
        return memory.num_pages(free_bytes, model.config, config, model.layout, weight_bytes)
    if config.cache_bytes is None:
        raise ValueError("cache_bytes is null, all the memory that a GPU has left: on a CPU it must be set")
    return num_pages_for(config.cache_bytes, model.layout, model.config.num_hidden_layers)


def _warm(engine: Engine, sparse_from: int) -> None:
    """Real prompts and decode steps, so that the first request finds everything loaded, compiled and tried.

    sparse_from: also prompts of more tokens than that, which are not attended to as shorter ones are; as many as a step takes
    """
    lengths = {PAGE_SIZE + 1}
    if sparse_from:
        lengths |= {sparse_from + 1, engine.config.max_batched_tokens}
    for number, length in enumerate(sorted(lengths)):
        tokens = [2 + (i + number) % 7 for i in range(length)]
        sampling = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
        request = Request(f"warm-up-{number}", tokens, len(tokens), sampling, namespace=b"warm-up")
        try:
            engine.check_fits(request)
        except ValueError:
            continue  # then no request is so long
        engine.add(request)
        while engine.has_work():
            engine.step()


def start_worker(
    *,
    role: Role,
    model: Path,
    engine_config: EngineConfig,
    worker_id: str,
    epoch: int,
    host: str,
    secret: str,
) -> RunningWorker:
    """Loads the model and opens the worker's doors on `host`. Returns when it can serve."""
    with ThreadPoolExecutor(1) as loader:  # its OpenMP helpers end with it: see use_threads
        engine, cache = loader.submit(make_engine, model, engine_config).result()
    server = WorkerServer(host=host, secret=secret)
    if role == "prefill":
        return _start_prefill(engine, cache, server, worker_id, epoch, secret)
    landing = Landing(worker_id=worker_id, epoch=epoch, host=host, secret=secret, cache=cache)
    decode = DecodeWorker(
        worker_id=worker_id, epoch=epoch, engine=engine, emit=server.emit, cache=cache, landing=landing
    )
    landing.start()
    decode.start()
    server.start(decode)
    return RunningWorker(decode, server, landing, ship_host=host, ship_port=landing.port)


def _start_prefill(
    engine: Engine, cache: PagedCache, server: WorkerServer, worker_id: str, epoch: int, secret: str
) -> RunningWorker:
    prefill = PrefillWorker(
        worker_id=worker_id,
        epoch=epoch,
        engine=engine,
        emit=server.emit,
        make_shipper=lambda on_done, on_failed: Shipper(
            worker_id=worker_id, epoch=epoch, secret=secret, cache=cache, on_done=on_done, on_failed=on_failed
        ),
    )
    prefill.start()
    server.start(prefill)
    return RunningWorker(prefill, server, prefill.shipper)
