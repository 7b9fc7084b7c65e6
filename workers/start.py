"""Puts a worker together: model, caches, engine, links, server. One function, the same for every process that runs one."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kernels.dispatch import Ops
from kernels.layout import PAGE_SIZE
from workers.attention import EXPANDING_ROWS
from workers.config import EngineConfig
from workers.cpu_threads import use_threads
from workers.decode import DecodeWorker
from workers.engine import Engine, Runs
from workers.grammar import Grammars, load_compiler
from workers.messages import HEARTBEAT_S
from workers.paged_cache import PagedCache
from workers.prefill import PrefillWorker
from workers.ranks.landings import Landings
from workers.ranks.leader import Followers
from workers.ranks.messages import Ship
from workers.ranks.runner import RankedRunner
from workers.ranks.shippers import Peer, Shippers
from workers.request import Request, SamplingParams
from workers.server import WorkerServer
from workers.shard import Shard, config_of, doublings, load_shard, max_context
from workers.shipping.receiver import Landing
from workers.worker import Worker

Role = Literal["prefill", "decode"]
FAREWELL_S = 5 * HEARTBEAT_S


@dataclass
class RunningWorker:
    """A started worker. `ship_host` and `ship_port` are where a decode worker's landing listens, and those of its further ranks
    at `rank_ports`."""

    worker: Worker
    server: WorkerServer
    links: Shippers | Landings
    ship_host: str = ""
    ship_port: int = 0
    rank_ports: Sequence[int] = ()
    stopped: bool = False

    def set_peers(self, peers: dict[str, Peer]) -> None:
        """Tells a prefill worker of the decode workers."""
        if isinstance(self.links, Shippers):
            self.links.set_peers(peers)

    def drain(self, timeout: float) -> bool:
        """Takes no more requests, and returns once those that it has have ended and gateways have had the time to hear of
        it; False where `timeout` seconds were too few. What then still runs, `stop` hands over."""
        drained = self.worker.drain(timeout)
        if drained:
            time.sleep(FAREWELL_S)
        return drained

    def stop(self) -> None:
        """Ends every thread and connection of the worker. Safe to call twice.

        The engine ends first: a gateway that is cut off must not look like one that went, whose requests are settled.
        """
        if self.stopped:
            return
        self.stopped = True
        self.worker.stop()
        self.server.stop()
        self.links.close()
        self.worker.engine.close()


def make_engine(
    model: Path, config: EngineConfig, *, ops: Ops | None = None, role: Role = "prefill"
) -> tuple[Engine, PagedCache]:
    """An engine with its caches allocated and its operators warm. Raises CheckpointError, RankLost or ValueError.

    ops:  other operators than those of the back end, for experiments with one rank
    role: what several ranks share, the rows of prompts or requests
    """
    engine, shard, _ = _make_engine(model, config, role, ops=ops)
    return engine, shard.cache


def _make_engine(
    model: Path, config: EngineConfig, role: Role, *, ship: Ship | None = None, ops: Ops | None = None
) -> tuple[Engine, Shard, Followers | None]:
    if config.threads is not None:
        use_threads(config.threads)
    followers = None
    runner: Runs
    if config.ranks > 1:
        followers = Followers(model, config, shares_rows=role == "prefill", ship=ship)
        shard = _load_beside(followers, model, config_of(config, 0))
        runner = RankedRunner(shard, followers)
    else:
        shard = load_shard(model, config, ops=ops)
        runner = shard.runner
    loaded = shard.model.config
    compiler = load_compiler(model, vocab_size=loaded.vocab_size, eos_token_ids=loaded.eos_token_ids)
    engine = Engine(
        runner,
        num_pages=shard.num_pages,
        num_pools=config.ranks if role == "decode" else 1,
        config=config,
        eos_token_ids=loaded.eos_token_ids,
        max_context=max_context(loaded, config, shard.num_pages),
        grammars=Grammars(compiler),
    )
    on_gpu = config.device.startswith("cuda")
    _warm(engine, loaded.index_topk if on_gpu else 0)
    runner.record()
    if on_gpu:
        _warm(engine, 0)
    return engine, shard, followers


def _load_beside(followers: Followers, model: Path, config: EngineConfig) -> Shard:
    try:
        with followers.watched():
            shard = load_shard(model, config, followers.group)
        followers.wait_until_loaded()
    except BaseException:
        followers.close()
        raise
    return shard


def _warm(engine: Engine, sparse_from: int) -> None:
    """Real prompts and decode steps, so that the first request finds everything loaded, compiled and tried.

    sparse_from: also of every order of magnitude up to what a step takes, for which there are kernels of their own, and of one
    token and of many more than this: those beyond are not attended to as those before
    """
    lengths = {PAGE_SIZE + 1}
    if sparse_from:
        lengths |= {sparse_from + 1, sparse_from + EXPANDING_ROWS}
        lengths |= set(doublings(engine.config.max_batched_tokens))
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
    ship = Ship(worker_id=worker_id, epoch=epoch, host=host, secret=secret)
    with ThreadPoolExecutor(1) as loader:  # its OpenMP helpers end with it: see use_threads
        made = loader.submit(_make_engine, model, engine_config, role, ship=ship)
        engine, shard, followers = made.result()
    server = WorkerServer(host=host, secret=secret)
    if role == "prefill":
        return _start_prefill(engine, shard.cache, followers, server, ship)
    return _start_decode(engine, shard.cache, followers, server, ship)


def _start_prefill(
    engine: Engine, cache: PagedCache, followers: Followers | None, server: WorkerServer, ship: Ship
) -> RunningWorker:
    prefill = PrefillWorker(
        worker_id=ship.worker_id,
        epoch=ship.epoch,
        engine=engine,
        emit=server.emit,
        make_shipper=lambda on_done, on_failed: Shippers(
            worker_id=ship.worker_id,
            epoch=ship.epoch,
            secret=ship.secret,
            cache=cache,
            followers=followers,
            on_done=on_done,
            on_failed=on_failed,
        ),
    )
    prefill.start()
    server.start(prefill)
    return RunningWorker(prefill, server, prefill.shipper)


def _start_decode(
    engine: Engine, cache: PagedCache, followers: Followers | None, server: WorkerServer, ship: Ship
) -> RunningWorker:
    own = Landing(worker_id=ship.worker_id, epoch=ship.epoch, host=ship.host, secret=ship.secret, cache=cache)
    landing = Landings(own, followers)
    decode = DecodeWorker(
        worker_id=ship.worker_id,
        epoch=ship.epoch,
        engine=engine,
        emit=server.emit,
        cache=cache,
        landing=landing,
    )
    own.start()
    decode.start()
    server.start(decode)
    return RunningWorker(
        decode,
        server,
        landing,
        ship_host=ship.host,
        ship_port=own.port,
        rank_ports=followers.ship_ports if followers else (),
    )
