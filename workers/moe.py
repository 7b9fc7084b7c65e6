"""Mixture of experts: the gate, the routed experts and the shared one. Knows nothing of attention or of checkpoint files."""

from dataclasses import dataclass

import torch

from kernels.dispatch import Ops
from workers.group import Group
from workers.layers import sigmoid
from workers.model_config import ModelConfig
from workers.shares import expert_blocks, experts_of
from workers.weights import Weights


@dataclass(frozen=True)
class Gate:
    """Chooses experts by sigmoid score plus bias, and weighs them by score alone. fp32; on ties the lowest index wins.

    weight: fp32 [E, D]
    bias:   fp32 [E]
    """

    weight: torch.Tensor
    bias: torch.Tensor
    config: ModelConfig
    ops: Ops

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, D] -> experts int64 [T, k] and their weights fp32 [T, k]."""
        scores = sigmoid(self.ops.linear(x.float(), self.weight))
        experts = _best(self._within_best_groups(scores + self.bias), self.config.num_experts_per_tok)
        weights = scores.gather(1, experts)
        return experts, weights / weights.sum(-1, keepdim=True) * self.config.routed_scaling_factor

    def _within_best_groups(self, choice: torch.Tensor) -> torch.Tensor:
        """[T, E] with -inf outside the topk_group best groups. A group is as good as its two best experts together."""
        grouped: torch.Tensor = choice.unflatten(1, (self.config.n_group, -1))
        kept = _best(grouped.topk(2, dim=-1).values.sum(-1), self.config.topk_group)
        dropped = torch.ones(grouped.shape[:2], dtype=torch.bool, device=choice.device).scatter_(
            1, kept, False
        )
        return grouped.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(1)


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the highest scores of each row. topk would leave ties to chance."""
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :count]


class MoE:
    """x [T, D] -> [T, D]: the shared expert plus a token's routed experts, added up in fp32 in the order of `expert_blocks`.

    The experts are spread over the ranks of the group. Every rank runs its own on the tokens of all, and what it has added
    up goes back to the rank that owns the token. Both ways overlap with what needs no other rank.
    """

    def __init__(self, config: ModelConfig, weights: Weights, group: Group) -> None:
        size, experts = config.moe_intermediate_size, config.n_routed_experts
        self._group = group
        self._own = experts_of(group.rank, group.size, experts)
        self._num_blocks = expert_blocks(experts) // group.size
        self.gate = Gate(
            weight=weights.table("gate", experts, config.hidden_size, torch.float32),
            bias=weights.vector("gate.e_score_correction_bias", experts),
            config=config,
            ops=weights.ops,
        )
        self.experts = [weights.at(f"experts.{expert}").mlp(config.hidden_size, size) for expert in self._own]
        weights.at("experts").leave({str(expert) for expert in range(experts) if expert not in self._own})
        self.shared = weights.at("shared_experts").mlp(config.hidden_size, size * config.n_shared_experts)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = self._group.all_gather(x)
        experts, weights = self.gate(x)
        all_experts, all_weights = self._group.all_gather(experts), self._group.all_gather(weights)
        routed = self._routed(rows.wait(), all_experts.wait(), all_weights.wait())
        parts = self._group.all_to_all(routed)
        shared = self.shared(x).float()
        total = add_in_pairs(parts.wait().unflatten(0, (self._group.size, -1)))
        return (shared + total).to(x.dtype)

    def _routed(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """fp32 [T, D]: what this rank's experts add to each token."""
        picks, mine = experts.shape[1], experts.flatten() - self._own.start
        mine = mine.masked_fill((mine < 0) | (mine >= len(self._own)), len(self._own))
        order = mine.argsort(
            stable=True
        )  # picks of all tokens, expert after expert, those of other ranks last
        counts = mine.bincount(minlength=len(self._own) + 1).tolist()[:-1]
        order = order[: sum(counts)]
        sums = x.new_zeros(self._num_blocks, *x.shape, dtype=torch.float32)
        parts = zip(self.experts, x[order // picks].split(counts), strict=True)
        outputs = [expert(part) for expert, part in parts if len(part)]
        if not outputs:
            return add_in_pairs(sums)
        by_pick = x.new_zeros(experts.numel(), x.shape[1]).index_copy_(0, order, torch.cat(outputs))
        by_pick = by_pick.unflatten(0, (-1, picks))
        block = mine.view(-1, picks) // (len(self._own) // self._num_blocks)
        token = torch.arange(len(x), device=x.device)
        for pick in range(picks):
            here = block[:, pick] < self._num_blocks
            where = (block[here, pick], token[here])
            sums[where] += by_pick[here, pick].float() * weights[here, pick, None]
        return add_in_pairs(sums)


def add_in_pairs(x: torch.Tensor) -> torch.Tensor:
    """[2^n, ...] -> [...]: neighbours first, so that the sum of a half is the sum it would be alone."""
    while len(x) > 1:
        x = x[0::2] + x[1::2]
    return x[0]
