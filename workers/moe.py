"""Mixture of experts: the gate, the routed experts and the shared one. Knows nothing of attention or of checkpoint files."""

import torch

from workers.group import Group
from workers.model_config import ModelConfig
from workers.shares import expert_blocks, experts_of
from workers.weights import Weights


class MoE:
    """x [T, D] -> [T, D]: the shared expert plus a token's routed experts, added up in fp32 in the order of `expert_blocks`.

    The experts are spread over the ranks of the group. Every rank runs its own on the tokens of all, and what it has added
    up goes back to the rank that owns the token. Both ways overlap with what needs no other rank.
    """

    def __init__(self, config: ModelConfig, weights: Weights, group: Group) -> None:
        size, count = config.moe_intermediate_size, config.n_routed_experts
        self._config = config
        self._ops = weights.ops
        self._group = group
        self._own = experts_of(group.rank, group.size, count)
        self._num_blocks = expert_blocks(count) // group.size
        self._gate = weights.table("gate", count, config.hidden_size, torch.float32)
        self._bias = weights.vector("gate.e_score_correction_bias", count)
        self._experts = weights.experts(self._own, config.hidden_size, size)
        weights.at("experts").leave({str(expert) for expert in range(count) if expert not in self._own})
        self._shared = weights.at("shared_experts").mlp(config.hidden_size, size * config.n_shared_experts)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._group.size > 1:
            return self._exchanged(x)
        experts, weights = self._choose(x)
        return self._routed(x, experts, weights, self._shared(x)).to(x.dtype)

    def _exchanged(self, x: torch.Tensor) -> torch.Tensor:
        arriving = self._group.all_gather(x)
        experts, weights = self._choose(x)
        # Chosen once, by the token's owner: another rank might see a tie the other way.
        arriving_experts, arriving_weights = self._group.all_gather(experts), self._group.all_gather(weights)
        routed = self._routed(
            arriving.wait(), arriving_experts.wait() - self._own.start, arriving_weights.wait()
        )
        parts = self._group.all_to_all(routed)
        shared = self._shared(x).float()
        return (shared + add_in_pairs(parts.wait().unflatten(0, (self._group.size, -1)))).to(x.dtype)

    def _choose(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._ops.choose_experts(
            x,
            self._gate,
            self._bias,
            num_groups=self._config.n_group,
            kept_groups=self._config.topk_group,
            num_chosen=self._config.num_experts_per_tok,
            scale=self._config.routed_scaling_factor,
        )

    def _routed(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        start: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """fp32 [T, D]: what this rank's experts add to each token. experts: counted from its own first."""
        return self._ops.expert_mlp(x, experts, weights, self._experts, start, num_blocks=self._num_blocks)


def add_in_pairs(x: torch.Tensor) -> torch.Tensor:
    """[2^n, ...] -> [...]: neighbours first, so that the sum of a half is the sum it would be alone."""
    while len(x) > 1:
        x = x[0::2] + x[1::2]
    return x[0]
