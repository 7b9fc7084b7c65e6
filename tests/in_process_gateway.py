"""The whole HTTP side of a gateway over workers in this process: real sockets, text and ledger. Only Ray is missing."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from in_process_cluster import Cluster

from cluster.api import Api
from cluster.billing import Books
from cluster.chat_codec import ChatCodec
from cluster.config import ClusterConfig
from cluster.controller import PrefixCacheController
from cluster.fleet import Fleet
from cluster.flight import Pilot
from cluster.metrics import Metrics
from cluster.prices import PriceBook
from cluster.schemas import Limits
from cluster.structured import StructuredOutput
from cluster.tenants import Tenants
from cluster.tokenizer import Tokenizer
from cluster.tracing import Tracing
from workers.config import EngineConfig
from workers.model_config import ModelConfig

ENGINE = EngineConfig(max_batched_tokens=192, cache_bytes=48 * 2**20, max_context=3000, threads=1)


@dataclass
class Gateway:
    url: str
    ledger: str
    cluster: Cluster
    paths: list[str]  # that it routes


class _Handle:
    """A controller of this process, called as one calls Ray's actors."""

    def __init__(self, controller: PrefixCacheController) -> None:
        self._controller = controller

    def __getattr__(self, name: str) -> Any:
        return _Method(getattr(self._controller, name))


@dataclass
class _Method:
    remote: Callable[..., Any]


@contextlib.contextmanager
def running_gateway(
    model: Path,
    folder: Path,
    config: ClusterConfig | None = None,
    engine: EngineConfig = ENGINE,
    each: int = 1,
) -> Iterator[Gateway]:
    """Workers, `each` of a role, and a gateway, until the block ends. `folder` gets the ledger."""
    cluster = Cluster(model, engine, each=each)
    ledger = f"sqlite:///{folder}/ledger.db"
    ready, stop = threading.Event(), threading.Event()
    urls: list[str] = []
    paths: list[str] = []
    thread = threading.Thread(
        target=lambda: cluster.run(
            lambda pilot, fleet: _serve(
                cluster,
                model,
                ledger,
                config or ClusterConfig(),
                engine.max_context or 0,
                pilot,
                fleet,
                urls,
                paths,
                ready,
                stop,
            )
        )
    )
    thread.start()
    try:
        assert ready.wait(30)
        yield Gateway(urls[0], ledger, cluster, paths)
    finally:
        stop.set()
        thread.join(30)
        cluster.stop()


async def _report_pages(cluster: Cluster) -> None:
    """What the workers tell the controller, and the controller the gateways."""
    while True:
        for running in cluster.all:
            worker = running.worker
            events = await asyncio.wrap_future(worker.ask(worker.engine.pools.drain_events))
            cluster.directory.apply(worker.id, worker.epoch, *events)
        await asyncio.sleep(0.05)


async def _serve(
    cluster: Cluster,
    model: Path,
    ledger: str,
    config: ClusterConfig,
    max_context: int,
    pilot: Pilot,
    fleet: Fleet,
    urls: list[str],
    paths: list[str],
    ready: threading.Event,
    stop: threading.Event,
) -> None:
    controller = PrefixCacheController(ledger, "secret")
    books = Books(_Handle(controller), PriceBook.load(), config.price_entry)
    tenants = Tenants(config)
    await tenants.read(_Handle(controller))
    duties = (books.settle_forever(), tenants.follow(_Handle(controller)), _report_pages(cluster))
    tasks = [asyncio.create_task(duty) for duty in duties]
    tokenizer = Tokenizer(model)
    codec = ChatCodec.load(model, tokenizer, config.chat_encoding)
    metrics = Metrics()
    fleet.on_load, fleet.on_gone = metrics.observe_load, metrics.forget
    api = Api(
        config,
        limits=Limits(max_context=max_context, vocab_size=ModelConfig.load(model).vocab_size),
        tokenizer=tokenizer,
        codec=codec,
        structured=StructuredOutput.load(model, tokenizer, codec.name),
        pilot=pilot,
        books=books,
        metrics=metrics,
        fleet=fleet,
        tenants=tenants,
    )
    paths.extend(route.path for route in api.routes)
    traces = config.gateway.traces
    tracing = Tracing(traces, gateway=fleet.gateway) if traces is not None else None
    server = uvicorn.Server(uvicorn.Config(api.app(tracing=tracing), port=0, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    urls.append(f"http://127.0.0.1:{port}")
    ready.set()
    await asyncio.to_thread(stop.wait)
    server.should_exit = True
    await serving
    if tracing is not None:
        await asyncio.to_thread(tracing.close)
    for task in tasks:
        task.cancel()
    await controller.close()
