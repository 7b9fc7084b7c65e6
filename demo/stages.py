"""What each stage of training learns from one batch: which parameters, which batches, which loss. Knows nothing of time or files.

Source: DeepSeek-V3.2, section 2.1.1 (dense, then indexer warm-up, then sparse); DeepSeek-V3, section 2.2 (MTP).
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from demo.attend import Dense, Sparse, WarmUp
from demo.documents import Chats, Writer
from demo.network import Gate, Network

BATCH_TOKENS = 65_536
SENTENCE_TOKENS, TURN_TOKENS = 14.5, 28  # about; measured
LADDER = (
    4,
    6,
    8,
    12,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    1536,
    2048,
    3072,
    4096,
    6144,
    8900,
)
LEARNED = 0.1  # nats a value token, at the top of the ladder
FACT_SHARES = (0.4, 0.7, 1.0)
MAX_QUESTIONS = 512
WARM_UP_ROWS = 1024  # of a batch
BALANCE_SPEED = 2e-4


@dataclass(frozen=True)
class Outcome:
    """loss: to descend. figures: for the curve, in nats a token."""

    loss: torch.Tensor
    figures: dict[str, torch.Tensor]


class Stage:
    """Made of the network and of the longest documents, in sentences, that it has learned to read so far."""

    lr: float
    lr_end: float  # as a share of lr
    ramp: int  # steps until the full learning rate
    hold: float  # share of the time at full learning rate; then it falls in a straight line
    lengths: tuple[int, ...]  # sentences of the documents of a batch; of these as many as are not too long

    def __init__(self, network: Network, longest: int) -> None:
        self.network, self.longest = network, longest

    def start(self) -> None:
        """Called once, before the first step."""

    def parameters(self) -> list[nn.Parameter]:
        """What learns. Unless a stage says otherwise: everything but the MTP layer."""
        return self._named(lambda name: not _of_mtp(self.network, name))

    def sentences(self, chooser: random.Random) -> int:
        """How long the documents of the next batch are."""
        return chooser.choice([length for length in self.lengths if length <= self.longest])

    def learn(self, chats: Chats) -> Outcome:
        raise NotImplementedError

    def balance(self) -> None:
        """Called after each step: moves the bias of the gates."""
        balance(self.network)

    def look(self, sentences: int, figures: dict[str, float]) -> None:
        """Called with what was seen at every step, in order."""

    def _named(self, wanted: Callable[[str], bool]) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.network.named_parameters() if wanted(name)]


def batch(writer: Writer, sentences: int, chooser: random.Random, generator: torch.Generator) -> Chats:
    """About BATCH_TOKENS tokens of chats about documents of this length, but at least one chat."""
    facts = max(2, int(sentences * chooser.choice(FACT_SHARES)))
    questions = min(MAX_QUESTIONS, facts)
    num = max(1, int(BATCH_TOKENS / (SENTENCE_TOKENS * sentences + TURN_TOKENS * questions)))
    documents = writer.write(
        num, sentences=sentences, facts=facts, questions=questions, generator=generator, bare=sentences <= 64
    )
    return writer.chats(documents, generator)


class DenseStage(Stage):
    """Everything but the indexer and the MTP layer, with full attention.

    The curriculum is over the number of sentences: one rung up when the values asked for at the top are learned. From the start
    with long documents, or with long jumps, nothing is ever learned.
    """

    lr, lr_end, ramp, hold = 6e-4, 0.03, 300, 0.5

    def __init__(self, network: Network, longest: int) -> None:
        super().__init__(network, longest)
        self._recent: list[float] = []

    def parameters(self) -> list[nn.Parameter]:
        return self._named(lambda name: not _of_mtp(self.network, name) and "indexer" not in name)

    def sentences(self, chooser: random.Random) -> int:
        top_share = 0.6 if self.longest < LADDER[-1] else 0.25  # the longest cost many times what others do
        return self.longest if chooser.random() < top_share else LADDER[chooser.randint(0, self._rung)]

    def learn(self, chats: Chats) -> Outcome:
        return language_loss(self.network, chats, Dense())

    def look(self, sentences: int, figures: dict[str, float]) -> None:
        if sentences != self.longest or self._rung == len(LADDER) - 1:
            return
        self._recent.append(figures["value_loss"])
        enough = 8 if self.longest <= 512 else 4
        if len(self._recent) >= enough and sum(self._recent[-enough:]) / enough < LEARNED:
            self.longest = LADDER[self._rung + 1]
            self._recent = []

    @property
    def _rung(self) -> int:
        return LADDER.index(self.longest)


class WarmUpStage(Stage):
    """The indexer alone, towards what dense attention attends to."""

    lr, lr_end, ramp, hold = 1e-3, 0.1, 20, 0.5
    lengths = (128, 512, 2048, 4096, 8900)

    def parameters(self) -> list[nn.Parameter]:
        return self._named(lambda name: not _of_mtp(self.network, name) and "indexer" in name)

    def learn(self, chats: Chats) -> Outcome:
        attend = WarmUp(teaching_rows(chats, max(1, WARM_UP_ROWS // len(chats.tokens))))
        self.network.hidden(chats.tokens, attend)
        return Outcome(attend.loss, {"index_loss": attend.loss})

    def balance(self) -> None:
        """The gates are frozen like everything else."""


class SparseStage(Stage):
    """Everything but the MTP layer, over the indexer's selection; two losses whose gradients never meet."""

    lr, lr_end, ramp, hold = 4e-4, 0.03, 20, 0.3
    lengths = (32, 128, 256, 512, 512, 1024, 1024, 2048, 2048, 4096, 8900)

    def learn(self, chats: Chats) -> Outcome:
        attend = Sparse(self.network.config.index_topk, chats.tokens.device)
        outcome = language_loss(self.network, chats, attend)
        return Outcome(outcome.loss + attend.loss, outcome.figures | {"index_loss": attend.loss})


class MTPStage(Stage):
    """The MTP layer alone, which starts as a copy of the last layer."""

    lr, lr_end, ramp, hold = 1e-3, 0.03, 20, 0.5
    lengths = (32, 128, 512, 2048, 8900)

    def start(self) -> None:
        last = self.network.model.layers[self.network.config.num_hidden_layers - 1]
        self.network.mtp.load_state_dict(last.state_dict(), strict=False)
        self.network.mtp.shared_head.norm.load_state_dict(self.network.model.norm.state_dict())

    def parameters(self) -> list[nn.Parameter]:
        return list(self.network.mtp.parameters())

    def learn(self, chats: Chats) -> Outcome:
        network, tokens = self.network, chats.tokens
        with torch.no_grad():
            hidden = network.hidden(tokens, Sparse(network.config.index_topk, tokens.device))
        attend = Sparse(network.config.index_topk, tokens.device)
        embedded = network.model.embed_tokens(tokens[:, 1:])
        read = network.mtp.predict(hidden[:, :-1], embedded, network.rope(tokens.shape[1] - 1), attend)
        wanted = chats.answers[:, 1:-1] & chats.answers[:, 2:]
        logits = network.lm_head(read[:, :-1][wanted]).float()
        target = tokens[:, 2:][wanted]
        loss = F.cross_entropy(logits, target)
        accuracy = (logits.argmax(-1) == target).float().mean()
        figures = {"loss": loss, "accuracy": accuracy, "index_loss": attend.loss}
        return Outcome(loss + attend.loss, figures)

    def balance(self) -> None:
        balance(self.network.mtp)


STAGES: dict[str, type[Stage]] = {
    "dense": DenseStage,
    "warmup": WarmUpStage,
    "sparse": SparseStage,
    "mtp": MTPStage,
}


def language_loss(network: Network, chats: Chats, attend: Dense | Sparse) -> Outcome:
    """Cross entropy of what the assistant says."""
    wanted = chats.answers[:, 1:]
    logits = network(chats.tokens[:, :-1], wanted, attend).float()
    losses = F.cross_entropy(logits, chats.tokens[:, 1:][wanted], reduction="none")
    told = chats.values[:, 1:][wanted]
    value_loss = (losses.detach() * told).sum() / told.sum().clamp(min=1)
    return Outcome(losses.mean(), {"loss": losses.mean(), "value_loss": value_loss})


def teaching_rows(chats: Chats, count: int) -> torch.Tensor:
    """int64 [B, count]: half of them rows that predict an answer, half any."""
    predicting = F.pad(chats.answers[:, 1:], (0, 1)).float()
    ends = chats.answers.long().cumsum(1).argmax(1, keepdim=True)  # of the last answer
    anywhere = torch.arange(chats.tokens.shape[1], device=ends.device) <= ends
    half = max(1, count // 2)
    return torch.cat(
        [weights.multinomial(half, replacement=True) for weights in (predicting, anywhere.float())], 1
    )


def balance(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, Gate) and len(part.load):
            part.balance(BALANCE_SPEED)


def _of_mtp(network: Network, name: str) -> bool:
    return name.startswith(f"model.layers.{network.config.num_hidden_layers}.")
