"""The DeepSeek-V3.2 model in a form that can be trained. Parameter names are those of the checkpoint.

The math is that of `workers.model`; what differs is that gradients flow, that whole sequences run at once, without pages, and that
the way to attend can be chosen (`demo.attend`). Hadamard is left out: it cancels in every score.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from kernels.reference.rope import rotate_halves, rotate_neighbours
from workers.layers import LayerNorm
from workers.model_config import ModelConfig
from workers.rope import Rope, RopeTable

INIT_STD = 0.02


class AttentionInputs:
    """What one layer's attention is made of. B sequences of L tokens, H heads.

    query_nope [B, L, H, nope], query_pe [B, L, H, rope]; latent [B, L, latent] and key_pe [B, L, rope], as they are cached;
    latent_up [H, nope + v, latent]; index_query [B, L, H', dim], index_key [B, L, dim] and index_weights fp32 [B, L, H'] of the
    indexer, whose inputs are detached: it learns from its own loss only.
    """

    def __init__(self, attention: "Attention", x: torch.Tensor, rope: Rope) -> None:
        config = self.config = attention.config
        heads, latent = config.num_attention_heads, config.kv_lora_rank
        query_latent = attention.q_a_layernorm(attention.q_a_proj(x))
        query = attention.q_b_proj(query_latent).unflatten(-1, (heads, -1))
        self.query_nope, query_pe = query.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        self.query_pe = rotate_neighbours(query_pe, *rope)
        cached, key_pe = attention.kv_a_proj_with_mqa(x).split((latent, config.qk_rope_head_dim), dim=-1)
        self.latent = attention.kv_a_layernorm(cached)
        self.key_pe = rotate_neighbours(key_pe.unsqueeze(2), *rope).squeeze(2)
        self.latent_up = attention.kv_b_proj.weight.unflatten(0, (heads, -1))
        self._indexer, self._rope = attention.indexer, rope
        self._x, self._query_latent = x.detach(), query_latent.detach()

    def index(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """index_query, index_key, index_weights."""
        query, key, weights = self._indexer(self._x, self._query_latent, self._rope)
        return query, key, weights


class Attend(Protocol):
    def __call__(self, inputs: AttentionInputs) -> torch.Tensor:
        """-> [B, L, H, v]."""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self._eps)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Indexer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._rope_dim = config.qk_rope_head_dim
        self._heads, self._dim = config.index_n_heads, config.index_head_dim
        self.wq_b = _linear(config.q_lora_rank, self._heads * self._dim)
        self.wk = _linear(config.hidden_size, self._dim)
        self.k_norm = nn.LayerNorm(self._dim, eps=LayerNorm.eps)
        self.weights_proj = _linear(config.hidden_size, self._heads)

    def forward(
        self, x: torch.Tensor, query_latent: torch.Tensor, rope: Rope
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query = self.wq_b(query_latent).unflatten(-1, (self._heads, self._dim))
        key = self.k_norm(self.wk(x)).unsqueeze(2)
        weights = self.weights_proj(x).float() / math.sqrt(self._heads * self._dim)
        return self._roped(query, rope), self._roped(key, rope).squeeze(2), weights

    def _roped(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        roped = rotate_halves(x[..., : self._rope_dim], *rope)
        return torch.cat((roped, x[..., self._rope_dim :]), dim=-1)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, hidden, latent = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
        self.q_a_proj = _linear(hidden, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = _linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = _linear(hidden, latent + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(latent, config.rms_norm_eps)
        self.kv_b_proj = _linear(latent, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = _linear(heads * config.v_head_dim, hidden)
        self.indexer = Indexer(config)

    def forward(self, x: torch.Tensor, rope: Rope, attend: Attend) -> torch.Tensor:
        return self.o_proj(attend(AttentionInputs(self, x, rope)).flatten(2))


class MLP(nn.Module):
    def __init__(self, hidden: int, size: int) -> None:
        super().__init__()
        self.gate_proj = _linear(hidden, size)
        self.up_proj = _linear(hidden, size)
        self.down_proj = _linear(size, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """The bias keeps the experts equally busy: it moves against their load and has no gradient (DeepSeek-V3, section 2.1.2)."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.load = torch.zeros(0)  # picks of each expert in the last call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> fp32 [T, E], zero for experts that are not chosen."""
        config = self._config
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(x.float(), self.weight))
        choice = (scores.detach() + self.e_score_correction_bias).unflatten(1, (config.n_group, -1))
        kept = choice.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
        dropped = torch.ones_like(choice[..., 0], dtype=torch.bool).scatter_(1, kept, False)
        chosen = choice.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(1)
        picked = torch.zeros_like(scores).scatter_(1, chosen.topk(config.num_experts_per_tok).indices, 1.0)
        self.load = picked.sum(0)
        weights = scores * picked
        return weights / weights.sum(-1, keepdim=True) * config.routed_scaling_factor

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        self.e_score_correction_bias += speed * (self.load.mean() - self.load).sign()


class MoE(nn.Module):
    """All experts run on all tokens, as one wide MLP: at this size that is faster than sorting tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.moe_intermediate_size
        self.gate = Gate(config)
        self.experts = nn.ModuleList([MLP(hidden, size) for _ in range(config.n_routed_experts)])
        self.shared_experts = MLP(hidden, size * config.n_shared_experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        gate, up = (
            torch.cat([expert.get_parameter(f"{name}.weight") for expert in self.experts])
            for name in ("gate_proj", "up_proj")
        )
        down = torch.cat([expert.get_parameter("down_proj.weight") for expert in self.experts], dim=1)
        inner = F.silu(F.linear(x, gate)) * F.linear(x, up)
        weighted = (inner.unflatten(-1, (len(self.experts), -1)) * weights.unsqueeze(-1)).flatten(-2)
        return F.linear(weighted, down) + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, *, moe: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if moe else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: torch.Tensor, rope: Rope, attend: Attend) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class SharedHead(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPLayer(Layer):
    """Predicts one token further (DeepSeek-V3, section 2.2). Embedding and head are the main model's; checkpoints hold copies."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, moe=True)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = _linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config)

    def predict(
        self, hidden: torch.Tensor, next_embedding: torch.Tensor, rope: Rope, attend: Attend
    ) -> torch.Tensor:
        """The main model's normed output at t and the embedding of token t + 1 -> what the head reads to predict t + 2."""
        both = torch.cat((self.enorm(next_embedding), self.hnorm(hidden)), dim=-1)
        return self.shared_head.norm(self(self.eh_proj(both), rope, attend))


class Body(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers: list[Layer] = [
            Layer(config, moe=config.is_moe(number)) for number in range(config.num_hidden_layers)
        ]
        self.layers = nn.ModuleList(
            [*layers, *(MTPLayer(config) for _ in range(config.num_nextn_predict_layers))]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Network(nn.Module):
    """Embedding, layers and head; the last of `model.layers` is the MTP layer."""

    def __init__(self, config: ModelConfig, device: str) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = _linear(config.hidden_size, config.vocab_size)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=INIT_STD)
        self.to(device)
        self._rope_table = RopeTable(
            config.qk_rope_head_dim,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
            max_positions=config.max_position_embeddings,
            device=device,
        )

    def rope(self, length: int) -> Rope:
        cos, sin = self._rope_table.cos[:length], self._rope_table.sin[:length]
        return cos.unsqueeze(1), sin.unsqueeze(1)

    @property
    def mtp(self) -> MTPLayer:
        layer = self.model.layers[self.config.num_hidden_layers]
        assert isinstance(layer, MTPLayer)
        return layer

    def hidden(self, tokens: torch.Tensor, attend: Attend) -> torch.Tensor:
        """tokens int64 [B, L] -> fp32 [B, L, D], normed."""
        x, rope = self.model.embed_tokens(tokens), self.rope(tokens.shape[1])
        for layer in self.model.layers[: self.config.num_hidden_layers]:
            x = layer(x, rope, attend)
        return self.model.norm(x)

    def forward(self, tokens: torch.Tensor, wanted: torch.Tensor, attend: Attend) -> torch.Tensor:
        """The logits [S, V] at the wanted places, bool [B, L] with S of them set."""
        return self.lm_head(self.hidden(tokens, attend)[wanted])
