"""What DSA is measured against: the same layers with dense attention, as DeepSeek-V3.1 has them. For benchmarks only.

The indexer is left out with all its projections. Many rows of a request are attended to with keys and values expanded per head, which
takes a third of the arithmetic of attention over latents; single rows over the latents, which takes a fraction of the bytes.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels.layout import PAGE_SIZE, CacheLayout
from kernels.rows import Rows
from workers.model import Model
from workers.model_config import ModelConfig
from workers.rope import Rope
from workers.weights import Weights

Attended = tuple[torch.Tensor, torch.Tensor]  # output [1, H, T, v] and log-sum-exp fp32 [1, H, T]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, bool], Attended]
EXPANDED_AT_ONCE = 16384  # cached tokens


def dense_model(model: Model, weights: Weights) -> Model:
    """The model with dense attention; all but the attention is shared. weights: those of the model, to be read again."""
    attentions = [
        DenseAttention(model.config, weights.at(f"model.layers.{number}.self_attn"), model.layout)
        for number in range(len(model.layers))
    ]
    return model.with_layers(
        [
            dataclasses.replace(layer, attention=attention)
            for layer, attention in zip(model.layers, attentions, strict=True)
        ]
    )


class DenseAttention:
    """In the place of `workers.attention.Attention`: every visible token, and no index keys."""

    def __init__(self, config: ModelConfig, weights: Weights, layout: CacheLayout) -> None:
        heads, hidden, latent = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
        self._config = config
        self._layout = layout
        self._ops = weights.ops
        self._down = weights.fused(
            {"q_a_proj": config.q_lora_rank, "kv_a_proj_with_mqa": latent + config.qk_rope_head_dim}, hidden
        )
        self._up = weights.linear("q_b_proj", heads * config.qk_head_dim, config.q_lora_rank)
        self._query_norm = weights.rms_norm("q_a_layernorm", config.q_lora_rank, config.rms_norm_eps)
        self._latent_norm = weights.rms_norm("kv_a_layernorm", latent, config.rms_norm_eps)
        rows = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self._latent_up = weights.matrix("kv_b_proj", rows, latent)
        per_head = self._latent_up.unflatten(0, (heads, -1))
        self._key_up = per_head[:, : config.qk_nope_head_dim].contiguous()
        self._value_up = per_head[:, config.qk_nope_head_dim :].transpose(1, 2).contiguous()
        self._out = weights.linear("o_proj", hidden, heads * config.v_head_dim)

    def __call__(
        self,
        x: torch.Tensor,
        rope: Rope,
        rows: Rows,
        slots: torch.Tensor,
        latent_pages: torch.Tensor,
        index_pages: torch.Tensor,
        on_selected: Callable[[torch.Tensor], None] | None,
    ) -> torch.Tensor:
        """x [T, D] -> [T, D]; either one row of each request, or rows of one request."""
        config = self._config
        query_latent, cached = self._down(x)
        query = self._up(self._query_norm(query_latent)).unflatten(-1, (-1, config.qk_head_dim))
        nope, pe = query.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        latent, key_pe = cached.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        norm = self._latent_norm
        pe = self._ops.rotate_latents(
            pe, latent, key_pe, norm.weight, norm.eps, *rope, latent_pages, slots, self._layout
        )
        attend = self._over_latents if len(rows.query_starts) == len(x) + 1 else self._per_head
        return self._out(attend(nope, pe, rows, latent_pages).flatten(1))

    def _over_latents(
        self, nope: torch.Tensor, pe: torch.Tensor, rows: Rows, pages: torch.Tensor
    ) -> torch.Tensor:
        """[T, H, nope] and [T, H, rope] -> [T, H, v]."""
        query = torch.cat((self._ops.head_linear(nope, self._key_up), pe), dim=-1)
        out, _ = self._ops.dense_mla(query, pages, rows, self._config.softmax_scale, self._layout)
        return self._ops.head_linear(out, self._value_up)

    def _per_head(
        self, nope: torch.Tensor, pe: torch.Tensor, rows: Rows, pages: torch.Tensor
    ) -> torch.Tensor:
        """[T, H, nope] and [T, H, rope] -> [T, H, v]. The page table ends with the page that the rows end with, full."""
        keys, values = self._expand(rows.page_table[0], pages)
        query = torch.cat((nope, pe), dim=-1).transpose(0, 1).unsqueeze(0)
        return attend_per_head(query, keys, values, self._config.softmax_scale)[0].transpose(0, 1)

    def _expand(self, page_ids: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 [n] -> keys [1, H, L, nope + rope] and values [1, H, L, v] of the n x 64 tokens."""
        config, length = self._config, len(page_ids) * PAGE_SIZE
        heads, dtype = config.num_attention_heads, self._latent_up.dtype
        keys = torch.empty(length, heads, config.qk_head_dim, dtype=dtype, device=pages.device)
        values = torch.empty(length, heads, config.v_head_dim, dtype=dtype, device=pages.device)
        slots = (
            page_ids.long().unsqueeze(1) * PAGE_SIZE + torch.arange(PAGE_SIZE, device=pages.device)
        ).flatten()
        for some, key, value in zip(
            *(part.split(EXPANDED_AT_ONCE) for part in (slots, keys, values)), strict=True
        ):
            cached = self._ops.read_latents(pages, some, self._layout).to(dtype)
            latent, key_pe = cached.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
            expanded = self._ops.linear(latent.contiguous(), self._latent_up).unflatten(-1, (heads, -1))
            nope, v = expanded.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
            key[..., : config.qk_nope_head_dim] = nope
            key[..., config.qk_nope_head_dim :] = key_pe.unsqueeze(1)
            value.copy_(v)
        return keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)


def attend_per_head(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, softmax_scale: float
) -> torch.Tensor:
    """query [1, H, T, d], keys [1, H, L, d], values [1, H, L, v], the rows being the last T of L tokens -> [1, H, T, v]."""
    attend = _library(query.device, query.dtype, query.shape[-1], values.shape[-1])
    num_rows, num_before = query.shape[2], keys.shape[2] - query.shape[2]
    own, own_lse = attend(query, keys[:, :, num_before:], values[:, :, num_before:], softmax_scale, True)
    if not num_before:
        return own
    before, before_lse = attend(
        query, keys[:, :, :num_before], values[:, :, :num_before], softmax_scale, False
    )
    share = torch.sigmoid(own_lse - before_lse).view(1, -1, num_rows, 1).to(own.dtype)
    return torch.lerp(before, own, share)


@functools.cache
def _library(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> Attend:
    """The fastest there is: cuDNN where it takes keys and values of different widths, else FlashAttention-2."""
    if device.type != "cuda":
        return _plain
    x = torch.zeros(1, 1, 128, key_dim, device=device, dtype=dtype)
    try:
        _cudnn(x, x, x[..., :value_dim].contiguous(), 1.0, True)
    except RuntimeError:
        return _flash
    return _cudnn


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> Attended:
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> Attended:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return out, lse


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> Attended:
    """It knows one width only: the values are widened."""
    value_dim = v.shape[-1]
    wide = F.pad(v, (0, q.shape[-1] - value_dim))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, wide, 0.0, causal, False, scale=scale
    )
    return out[..., :value_dim], lse
