"""A worker of two ranks over NCCL: on two GPUs, or on one that they share, where NCCL takes each for a host of its own."""

import signal
from pathlib import Path

import msgspec
import pytest
import torch
from shipping_sides import be_host
from test_workers_ranks import lose_follower, run, tokens

from workers import start
from workers.config import EngineConfig
from workers.ranks import follower, leader
from workers.request import Request, SamplingParams
from workers.start import Role, make_engine
from workers.tiny import write_tiny

NUM_GPUS = torch.cuda.device_count()
CONFIG = EngineConfig(
    device="cuda:0", max_batched_tokens=256, max_running=8, cache_bytes=5 * 2**20, max_context=1024
)
TWO = msgspec.structs.replace(CONFIG, ranks=2)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS == 0, reason="there is no CUDA device"),
]


def run_follower(host: str, port: int, secret: str, rank: int) -> None:
    be_host(f"rank {rank}")
    follower.run_follower(host, port, secret, rank)


@pytest.fixture(autouse=True)
def own_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    if NUM_GPUS == 1:
        monkeypatch.setenv("NCCL_HOSTID", "rank 0")
        monkeypatch.setattr(leader, "run_follower", run_follower)
        for module in (leader, start):
            monkeypatch.setattr(module, "config_of", lambda config, rank: config)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, num_hidden_layers=2)
    return folder


def greedy(seed: int, length: int) -> Request:
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    return Request(str(seed), tokens(seed, length), length, sampling, b"tenant")


def serve(model: Path, config: EngineConfig, role: Role) -> list[list[int]]:
    """Greedy: on a GPU the last bits depend on how many rows are computed together."""
    engine, _ = make_engine(model, config, role=role)
    requests = [greedy(seed, length) for seed, length in enumerate([700, 171, 1, 66])]
    try:
        for request in requests:
            engine.add(request)
        run(engine)
        return [request.tokens for request in requests]
    finally:
        engine.close()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_two_ranks_give_the_tokens_of_one(model: Path, role: Role) -> None:
    assert serve(model, TWO, role) == serve(model, CONFIG, role)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_follower_is_an_error_soon_and_the_gpu_stays(model: Path, number: signal.Signals) -> None:
    engine, _ = make_engine(model, TWO, role="decode")
    try:
        lose_follower(engine, number)
    finally:
        engine.close()
    assert float(torch.ones(8, device="cuda:0").sum()) == 8
