"""Mixture of experts: the gate, the routed experts and the shared one. Knows nothing of attention or of checkpoint files."""

from dataclasses import dataclass

import torch

from kernels.dispatch import Ops
from workers.layers import sigmoid
from workers.model_config import ModelConfig
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
    """x [T, D] -> [T, D]. A token's routed experts are added up in fp32, best choice first, on top of the shared expert."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        size, experts = config.moe_intermediate_size, config.n_routed_experts
        self.gate = Gate(
            weight=weights.table("gate", experts, config.hidden_size, torch.float32),
            bias=weights.vector("gate.e_score_correction_bias", experts),
            config=config,
            ops=weights.ops,
        )
        self.experts = [
            weights.at(f"experts.{expert}").mlp(config.hidden_size, size) for expert in range(experts)
        ]
        self.shared = weights.at("shared_experts").mlp(config.hidden_size, size * config.n_shared_experts)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        experts, weights = self.gate(x)
        picks = experts.shape[1]
        order = experts.flatten().argsort()  # picks of all tokens, expert after expert
        counts = experts.flatten().bincount(minlength=len(self.experts)).tolist()
        parts = zip(self.experts, x[order // picks].split(counts), strict=True)
        routed = torch.cat([expert(part) for expert, part in parts if len(part)])
        by_token = torch.empty_like(routed).index_copy_(0, order, routed).unflatten(0, (-1, picks))
        total = self.shared(x).float()
        for pick in range(picks):
            total += by_token[:, pick].float() * weights[:, pick, None]
        return total.to(x.dtype)
