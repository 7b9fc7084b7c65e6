"""The gateway: one Serve replica that takes HTTP requests and runs them over the fleet of workers.

It keeps its own copy of membership and of the prefix directory, fed by the controller, so that no call to another process
lies between a request and its route. Undecorated: `cluster.app` makes the deployment.
"""

import asyncio
import logging
import secrets
from pathlib import Path
from typing import Any

import ray
from starlette.types import ASGIApp

from cluster.access_log import open_access_log
from cluster.api import Api
from cluster.billing import Books
from cluster.chat_codec import ChatCodec
from cluster.config import ClusterConfig
from cluster.controller import ACTOR_NAME, NAMESPACE, WatchUpdate
from cluster.fleet import Fleet
from cluster.flight import Pilot
from cluster.metrics import Metrics
from cluster.prefix_directory import PrefixDirectory
from cluster.prices import PriceBook
from cluster.proving import prove_pairs
from cluster.router import Costs
from cluster.schemas import Limits
from cluster.structured import StructuredOutput
from cluster.tenants import Tenants
from cluster.tokenizer import Tokenizer
from cluster.tracing import Tracing
from kernels.layout import PAGE_SIZE, num_pages_for
from workers.config import EngineConfig
from workers.model_config import ModelConfig

log = logging.getLogger(__name__)

WATCH_S = 10.0
QUEUE_S = 1.0  # between two words on what waits here


class Gateway:
    """Everything the route handlers of `cluster.api` need, and the tasks that keep it fresh."""

    def __init__(self, config: ClusterConfig, secret: str, *_: Any) -> None:
        # The worker deployments come as further arguments only so that Serve knows them as parts of this application.
        assert config.model is not None
        open_access_log(config.gateway.access_log)
        self._controller = ray.get_actor(ACTOR_NAME, namespace=NAMESPACE)
        model = ModelConfig.load(Path(config.model))
        self._tokenizer = Tokenizer(Path(config.model))
        self._codec = ChatCodec.load(Path(config.model), self._tokenizer, config.chat_encoding)
        self._structured = StructuredOutput.load(Path(config.model), self._tokenizer, self._codec.name)
        self._metrics = Metrics()
        self._directory = PrefixDirectory()
        self._books = Books(self._controller, PriceBook.load(), config.price_entry)
        self._tenants = Tenants(config)
        self._fleet = Fleet(
            gateway=f"gateway-{secrets.token_hex(4)}",
            secret=secret,
            timeout_s=config.gateway.worker_timeout_s,
        )
        self._fleet.on_load = self._metrics.observe_load
        self._fleet.on_gone = self._metrics.forget
        layout = model.cache_layout(config.decode.engine.precision == "fp8")
        costs = Costs(bytes_per_token=layout.token_bytes * model.num_hidden_layers)
        self._pilot = Pilot(self._fleet, costs, self._directory)
        self._limits = Limits(
            max_context=min(_context(model, role.engine) for role in (config.prefill, config.decode)),
            vocab_size=model.vocab_size,
        )
        self._config = config
        traces = config.gateway.traces
        self._tracing = Tracing(traces, gateway=self._fleet.gateway) if traces is not None else None
        self._tasks: list[asyncio.Task[None]] = []

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve on the replica's own event loop once the constructor is done."""
        duties = (
            self._watch(),
            prove_pairs(self._fleet, self._pilot),
            self._books.settle_forever(),
            self._tenants.follow(self._controller),
            self._tell_queue(),
        )
        self._tasks = [asyncio.create_task(duty) for duty in duties]
        api = Api(
            self._config,
            limits=self._limits,
            tokenizer=self._tokenizer,
            codec=self._codec,
            structured=self._structured,
            pilot=self._pilot,
            books=self._books,
            metrics=self._metrics,
            fleet=self._fleet,
            tenants=self._tenants,
        )
        # Serve's proxy puts x-request-id on every answer.
        return api.app(echoes_id=False, tracing=self._tracing)

    def check_health(self) -> None:
        """Serve's health check: a background task that has ended took the gateway's eyes with it."""
        for task in self._tasks:
            if task.done():
                raise RuntimeError(f"a task of the gateway has ended: {task!r}")

    async def _watch(self) -> None:
        """Follows the controller. While it is away, routing goes on with the last state."""
        version = -1
        while True:
            try:
                update: WatchUpdate = await self._controller.watch.remote(version, WATCH_S)
            except ray.exceptions.RayError as error:
                log.warning("controller unreachable: %s", error)
                await asyncio.sleep(0.5)
                version = -1
                continue
            version = update.version
            self._directory.follow(update.changes, [info.worker for info in update.members])
            self._fleet.set_members(update.members)

    async def _tell_queue(self) -> None:
        """Tells the controller what waits here: prefill workers are wanted for it."""
        while True:
            try:
                await self._controller.queue.remote(self._fleet.gateway, self._pilot.uncomputed_tokens)
            except ray.exceptions.RayError as error:
                log.warning("controller unreachable: %s", error)
            await asyncio.sleep(QUEUE_S)


def _context(model: ModelConfig, engine: EngineConfig) -> int:
    """Tokens of one request, prompt and answer, that a worker of this setting takes."""
    context = engine.max_context or model.max_position_embeddings
    if (
        engine.cache_bytes is None
    ):  # known when the worker has loaded its weights: it refuses what does not fit
        return context
    layout = model.cache_layout(engine.precision == "fp8")
    return min(context, num_pages_for(engine.cache_bytes, layout, model.num_hidden_layers) * PAGE_SIZE)
