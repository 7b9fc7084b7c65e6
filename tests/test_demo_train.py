"""The stages of training on very little: who learns, that it goes on where it was stopped, and what is stored in the end.

A clock that counts its readings stands in for time, so that a stage has as many steps everywhere.
"""

import functools
import itertools
from pathlib import Path

import pytest
import torch

from demo import stages, train
from demo.attend import Dense
from demo.documents import Writer
from demo.export import tensors
from demo.network import Network
from demo.shape import CONFIG
from demo.tokenizer import make_tokenizer
from kernels.reference import dequantize_weight
from workers.checkpoint import QUANTIZATION_CONFIG, write_checkpoint
from workers.config import EngineConfig
from workers.model import load_model
from workers.model_config import ModelConfig

SMALL = CONFIG | {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "kv_lora_rank": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MTP = "model.layers.2"
LEARNERS = {"dense": "main", "warmup": "indexer", "sparse": "main indexer", "mtp": "mtp"}


class Clock:
    """Every reading is a second after the last: two readings a step, whatever a step takes."""

    def __init__(self) -> None:
        self._readings = itertools.count()

    def monotonic(self) -> float:
        return float(next(self._readings))


@functools.cache
def the_writer() -> Writer:
    """It takes a second to make and remembers nothing."""
    return Writer(make_tokenizer(), "cpu")


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "CONFIG", SMALL)
    monkeypatch.setattr(stages, "BATCH_TOKENS", 300)
    monkeypatch.setattr(stages, "WARM_UP_ROWS", 16)
    for stage in stages.STAGES.values():
        monkeypatch.setattr(stage, "lengths", (4,), raising=False)
        monkeypatch.setattr(stage, "ramp", 1)
    monkeypatch.setattr(train, "CHECKED", ())
    monkeypatch.setattr(train, "time", Clock())
    monkeypatch.setattr(train, "Writer", lambda tokenizer, device: the_writer())


def part_of(name: str) -> str:
    if name.startswith(f"{MTP}."):
        return "mtp"
    return "indexer" if "indexer" in name else "main"


def stored(run: train.Run, stage: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(run.weights(stage), weights_only=True)["network"]
    return state


def test_every_stage_trains_its_own_part_and_begins_with_the_one_before(tmp_path: Path) -> None:
    run = train.Run(tmp_path)
    torch.manual_seed(0)
    before = Network(ModelConfig.from_json(SMALL), "cpu").state_dict()
    for name, learners in LEARNERS.items():
        if name != "dense":
            before = stored(run, list(LEARNERS)[list(LEARNERS).index(name) - 1])
        train.train(name, run, 4.0, device="cpu")
        after = stored(run, name)
        changed = {part_of(key) for key in after if not torch.equal(after[key], before[key])}
        assert changed == set(learners.split()), name


def test_a_stage_needs_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        train.train("warmup", train.Run(tmp_path), 1.0, device="cpu")


def test_a_stopped_stage_goes_on_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learning rate falls with time, so it is held: the two runs differ in nothing else."""
    monkeypatch.setattr(stages.DenseStage, "hold", 2.0)
    whole, parts = train.Run(tmp_path / "whole"), train.Run(tmp_path / "parts")
    train.train("dense", whole, 5.0, device="cpu")
    steps = _steps(whole)
    seconds = 0.0
    while not parts.progress("dense").exists() or _steps(parts) < steps:
        seconds += 2.0
        monkeypatch.setattr(train, "time", Clock())
        train.train("dense", parts, seconds, device="cpu")
    assert _steps(parts) == steps
    one, other = stored(whole, "dense"), stored(parts, "dense")
    assert all(torch.equal(one[name], other[name]) for name in one)


def _steps(run: train.Run) -> int:
    return int(torch.load(run.progress("dense"), weights_only=False)["step"])


def test_the_loss_falls() -> None:
    torch.manual_seed(0)
    network = Network(ModelConfig.from_json(SMALL), "cpu")
    writer, generator = the_writer(), torch.Generator().manual_seed(0)
    chats = writer.chats(writer.write(2, sentences=4, facts=2, questions=2, generator=generator), generator)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(16):
        outcome = stages.language_loss(network, chats, Dense())
        optimizer.zero_grad()
        outcome.loss.backward()
        optimizer.step()
        losses.append(float(outcome.loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_the_exported_checkpoint_is_the_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Network(ModelConfig.from_json(SMALL), "cpu")
    exported = dict(tensors(network, "fp8"))
    for name, tensor in network.state_dict().items():
        if f"{name}_scale_inv" not in exported:
            torch.testing.assert_close(exported[name].float(), tensor, atol=0, rtol=2**-8)
            continue
        back = dequantize_weight(exported[name], exported[f"{name}_scale_inv"])
        assert (back - tensor).norm() < 0.04 * tensor.norm(), name  # e4m3 has three bits after the point
    write_checkpoint(
        tmp_path, SMALL | {"quantization_config": QUANTIZATION_CONFIG}, make_tokenizer(), exported.items()
    )
    for precision in ("fp8", "fp32"):
        load_model(tmp_path, EngineConfig(precision=precision))  # strict: no tensor too many or too few
    assert torch.equal(exported["lm_head.weight"], exported[f"{MTP}.shared_head.head.weight"])
