"""Trains the demonstration model, one stage at a time: `python -m demo.train dense --run DIR --seconds 540`.

Stages: dense, warmup, sparse, mtp; each goes on from the one before, and, when it is started again, from where it was stopped (or,
with more seconds, from its end). The clock decides the length of a stage and its learning rate. DIR/curve.jsonl gets one line for
every few steps.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from demo.check import LENGTHS as CHECKED
from demo.check import check
from demo.documents import Chats, Writer
from demo.network import Network
from demo.shape import CONFIG
from demo.stages import LADDER, STAGES, Stage, batch
from demo.tokenizer import make_tokenizer
from workers.model_config import ModelConfig

SAVE_SECONDS = 60.0
REPORT_STEPS = 20


class Run:
    """The folder of one training: the weights after each stage, what the stage in progress needs to go on, the curve."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def weights(self, stage: str) -> Path:
        return self.folder / f"{stage}.pt"

    def progress(self, stage: str) -> Path:
        return self.folder / f"{stage}.progress.pt"

    def start_of(self, stage: str) -> Path | None:
        """The weights of the stage before."""
        names = list(STAGES)
        place = names.index(stage)
        return self.weights(names[place - 1]) if place else None

    def tokenizer(self) -> Tokenizer:
        """Made by the first stage: every later one, wherever it runs, must have the same."""
        path = self.folder / "tokenizer.json"
        if not path.exists():
            make_tokenizer().save(str(path))
        return Tokenizer.from_file(str(path))

    def note(self, figures: dict[str, Any]) -> None:
        with (self.folder / "curve.jsonl").open("a") as curve:
            curve.write(json.dumps(figures) + "\n")


def train(
    name: str, run: Run, seconds: float, *, device: str, start: Path | None = None, seed: int = 0
) -> Network:
    """Runs one stage until it has taken `seconds` in all, and stores the weights.

    start: weights to begin with, instead of those of the stage before
    Raises FileNotFoundError if the stage before was not finished.
    """
    torch.manual_seed(seed)
    network = Network(ModelConfig.from_json(CONFIG), device)
    longest, progress = LADDER[0], run.progress(name)
    resumed = progress.exists()
    if begin := progress if resumed else start or run.start_of(name):
        state = torch.load(begin, map_location=device, weights_only=False)
        network.load_state_dict(state["network"])
        longest = state["longest"]
    stage = STAGES[name](network, longest)
    trainer = _Trainer(name, stage, network, run, seconds, device, seed)
    if resumed:
        trainer.resume(state)
    else:
        stage.start()
    trainer.go_on()
    trainer.check()
    torch.save({"network": network.state_dict(), "longest": stage.longest}, run.weights(name))
    return network


class _Trainer:
    def __init__(
        self, name: str, stage: Stage, network: Network, run: Run, seconds: float, device: str, seed: int
    ) -> None:
        self._name, self._stage, self._network, self._run = name, stage, network, run
        self._seconds, self._device = seconds, device
        self._writer = Writer(run.tokenizer(), device)
        self._chooser = random.Random(seed)
        self._generator = torch.Generator(device).manual_seed(seed)
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        self._parameters = stage.parameters()
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        matrices = [parameter for parameter in self._parameters if parameter.dim() > 1]
        vectors = [parameter for parameter in self._parameters if parameter.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.95), fused=True)
        self._step, self._before = 0, 0.0

    def resume(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        self._step, self._before = state["step"], state["seconds"]
        self._chooser.setstate(state["chooser"])
        self._generator.set_state(state["generator"].cpu())

    def go_on(self) -> None:
        started = saved = time.monotonic()
        launched: tuple[int, dict[str, torch.Tensor]] | None = None
        while (elapsed := self._before + time.monotonic() - started) < self._seconds:
            sentences = self._stage.sentences(self._chooser)
            chats = batch(self._writer, sentences, self._chooser, self._generator)
            figures = self._one_step(chats, elapsed / self._seconds)
            if launched:  # look at a step only when the next one is under way: the device never waits for us
                self._look(elapsed, *launched)
            launched = sentences, figures
            if time.monotonic() - saved > SAVE_SECONDS:
                self._save(elapsed)
                saved = time.monotonic()
        self._save(elapsed)

    def check(self) -> None:
        if self._name not in ("dense", "sparse"):  # the others do not change what is checked
            return
        for line in check(self._network, self._writer, sparse=self._name == "sparse", lengths=CHECKED):
            self._run.note({"stage": self._name, "checked": line})
            print(json.dumps(line), flush=True)

    def _one_step(self, chats: Chats, done: float) -> dict[str, torch.Tensor]:
        rate = self._stage.lr * min(1.0, (self._step + 1) / self._stage.ramp)
        if done > self._stage.hold:
            rate *= max(self._stage.lr_end, (1 - done) / (1 - self._stage.hold))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self._device, torch.bfloat16, enabled=self._device != "cpu"):
            outcome = self._stage.learn(chats)
        self._optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._stage.balance()
        self._step += 1
        return outcome.figures

    def _look(self, elapsed: float, sentences: int, figures: dict[str, torch.Tensor]) -> None:
        longest = self._stage.longest
        known = {name: float(value.detach()) for name, value in figures.items()}
        self._stage.look(sentences, known)
        if self._step % REPORT_STEPS == 0 or self._stage.longest != longest:
            self._report(elapsed, sentences, known)

    def _report(self, elapsed: float, sentences: int, figures: dict[str, float]) -> None:
        line = {"stage": self._name, "seconds": round(elapsed, 1), "step": self._step, "sentences": sentences}
        line["longest"] = self._stage.longest
        line |= {name: round(value, 5) for name, value in figures.items()}
        self._run.note(line)
        print(json.dumps(line), flush=True)

    def _save(self, elapsed: float) -> None:
        state = {
            "network": self._network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self._step,
            "seconds": elapsed,
            "chooser": self._chooser.getstate(),
            "generator": self._generator.get_state(),
            "longest": self._stage.longest,
        }
        path = self._run.progress(self._name)
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--run", type=Path, required=True, help="folder of this training")
    parser.add_argument("--seconds", type=float, default=540.0, help="how long the stage takes in all")
    parser.add_argument(
        "--start", type=Path, help="weights to begin with, instead of those of the stage before"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    train(
        arguments.stage,
        Run(arguments.run),
        arguments.seconds,
        device=arguments.device,
        start=arguments.start,
        seed=arguments.seed,
    )


if __name__ == "__main__":
    main()
