"""A worker of two ranks against one of one: the same tokens, and the same bytes in every cache that holds them."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.layout import PAGE_SIZE
from workers.config import EngineConfig
from workers.engine import Engine
from workers.paged_cache import PagedCache
from workers.ranks import leader
from workers.ranks.leader import RankLost
from workers.ranks.messages import Failed, Hello, ToFollower, Wire
from workers.request import Request, SamplingParams
from workers.start import Role, make_engine
from workers.tiny import write_tiny

SOON = 10.0  # seconds
ONE = EngineConfig(max_batched_tokens=100, cache_bytes=5 * 2**20, max_context=1024, threads=1)
TWO = EngineConfig(max_batched_tokens=100, cache_bytes=5 * 2**20, max_context=1024, threads=1, ranks=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, num_hidden_layers=2)
    return folder


def tokens(seed: int, count: int) -> list[int]:
    return torch.randint(15, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def request(name: str, prompt: list[int], **fields: object) -> Request:
    sampling = SamplingParams(max_tokens=6, temperature=1.0, seed=len(name), ignore_eos=True, logprobs=2)
    return Request(name, list(prompt), len(prompt), sampling, b"tenant", **fields)  # type: ignore[arg-type]


def run(engine: Engine) -> list[object]:
    """Everything that was sampled, with log-probabilities, by request."""
    results = []
    while engine.has_work():
        results += [(r.request.id, r.token, r.logprobs) for r in engine.step().results]
    return sorted(results, key=lambda result: result[0])


def cached(cache: PagedCache, request: Request) -> list[torch.Tensor]:
    """The bytes of a request's tokens, latents and whole index pages."""
    pages = torch.tensor(request.pages)
    latent = cache.latent[:, pages].flatten(1, 2)[:, : request.num_computed_tokens]
    return [latent, cache.index[:, pages[: request.num_computed_tokens // PAGE_SIZE]]]


PROMPTS = {"long": tokens(1, 330), "middle one": tokens(2, 171), "x": tokens(3, 1), "two": tokens(4, 66)}


def serve(model: Path, config: EngineConfig, role: Role) -> tuple[list[object], list[torch.Tensor]]:
    engine, cache = make_engine(model, config, role=role)
    try:
        for name, prompt in PROMPTS.items():
            engine.add(request(name, prompt))
        held = request("held", PROMPTS["long"][:300] + tokens(5, 20), hold_pages=True, one_token=True)
        engine.add(held)
        results = run(engine)
        return results, cached(cache, held) if held.rank == 0 else []
    finally:
        engine.close()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_two_ranks_give_the_bits_of_one(model: Path, role: Role) -> None:
    results, pages = serve(model, ONE, role)
    ranked_results, ranked_pages = serve(model, TWO, role)
    assert ranked_results == results
    for ours, theirs in zip(ranked_pages, pages, strict=False):
        assert torch.equal(ours, theirs)


def die_before_joining(host: str, port: int, secret: str, rank: int) -> None:
    """A follower whose GPU, say, is not there."""
    wire = Wire(socket.create_connection((host, port)), ToFollower)
    wire.send(Hello(rank, secret))
    wire.receive()
    wire.send(Failed("there is no such device"))


def test_a_follower_that_never_joins_is_an_error_soon(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "run_follower", die_before_joining)
    with pytest.raises(RankLost, match="rank 1 is gone: there is no such device"):
        make_engine(model, TWO)


@pytest.fixture
def pair(model: Path) -> Iterator[Engine]:
    engine, _ = make_engine(model, TWO, role="decode")
    yield engine
    engine.close()


def lose_follower(engine: Engine, number: signal.Signals) -> None:
    engine.add(request("a", PROMPTS["long"]))
    engine.step()
    (process,) = engine._runner._followers._processes  # type: ignore[attr-defined]
    os.kill(process.pid, number)
    lost_at = time.monotonic()
    with pytest.raises(RankLost, match="rank 1 is gone"):
        run(engine)
    assert time.monotonic() - lost_at < SOON


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_follower_is_an_error_soon(pair: Engine, number: signal.Signals) -> None:
    lose_follower(pair, number)
