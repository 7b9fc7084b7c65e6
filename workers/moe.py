"""Mixture of experts: the gate, the routed experts and the shared one. Knows nothing of attention or of checkpoint files."""

import torch

from workers.model_config import ModelConfig
from workers.weights import Weights


class MoE:
    """x [T, D] -> [T, D]. A token's routed experts are added up in fp32, best choice first, on top of the shared expert."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        size, count = config.moe_intermediate_size, config.n_routed_experts
        self._config = config
        self._ops = weights.ops
        self._gate = weights.table("gate", count, config.hidden_size, torch.float32)
        self._bias = weights.vector("gate.e_score_correction_bias", count)
        self._experts = weights.experts(count, config.hidden_size, size)
        self._shared = weights.at("shared_experts").mlp(config.hidden_size, size * config.n_shared_experts)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        experts, weights = self._ops.choose_experts(
            x,
            self._gate,
            self._bias,
            num_groups=self._config.n_group,
            kept_groups=self._config.topk_group,
            num_chosen=self._config.num_experts_per_tok,
            scale=self._config.routed_scaling_factor,
        )
        return self._ops.expert_mlp(x, experts, weights, self._experts, self._shared(x)).to(x.dtype)
