"""Ways to attend while training: dense, dense while the indexer learns to imitate it, and over the indexer's selection.

Each is called once for every layer and returns [B, L, H, v]; those that teach the indexer add up its loss. Source of the losses:
DeepSeek-V3.2, section 2.1.1.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from demo.network import AttentionInputs

LOGITS_AT_ONCE = 2**29  # score elements of all heads that are in memory at a time
LONG = 4096
SHORT = 1024  # up to here a mask over all tokens is cheaper than copies of the selected ones
NOTHING = -1  # in a selection: no token


class Dense:
    """Every token sees all before it."""

    def __call__(self, inputs: AttentionInputs) -> torch.Tensor:
        query, key, value = (part.transpose(1, 2) for part in expanded(inputs))
        width = value.shape[-1]
        value = F.pad(value, (0, query.shape[-1] - width))  # the fast kernels want one width
        # cuDNN is twice as fast on a Hopper GPU, but plans anew for every shape: not worth it for short sequences.
        long = query.is_cuda and query.shape[2] >= LONG
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if long else nullcontext():
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=inputs.config.softmax_scale
            )
        return out[..., :width].transpose(1, 2)


class WarmUp:
    """Dense; the indexer's scores of some rows are pulled to what all heads together attend to in these rows.

    rows: int64 [B, R], the rows that teach
    loss: mean Kullback-Leibler divergence over those rows, added up over layers
    """

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows
        self.loss = torch.zeros((), device=rows.device)

    def __call__(self, inputs: AttentionInputs) -> torch.Tensor:
        with torch.no_grad():
            query, key, _ = expanded(inputs)
        index_query, index_key, index_weights = inputs.index()
        batch, num_rows = self._rows.shape
        heads, length = query.shape[2], query.shape[1]
        step = max(1, LOGITS_AT_ONCE // (batch * heads * length))
        for rows in self._rows.split(step, dim=1):
            hidden = torch.arange(length, device=rows.device) > rows.unsqueeze(-1)
            with torch.no_grad():
                logits = torch.einsum("brhd,blhd->brhl", _take(query, rows), key).float()
                logits = (logits * inputs.config.softmax_scale).masked_fill_(hidden.unsqueeze(2), -torch.inf)
                target = logits.softmax(-1).mean(2)
            guess = torch.einsum("brhd,bld->brhl", _take(index_query, rows), index_key).relu()
            scores = torch.einsum("brhl,brh->brl", guess.float(), _take(index_weights, rows))
            guess = scores.masked_fill(hidden, -torch.inf).log_softmax(-1)
            self.loss = self.loss + divergence(target, guess) * (rows.shape[1] / num_rows)
        return Dense()(inputs)


class Sparse:
    """Each row sees the top-k tokens by index score; the indexer learns from the attention within them.

    loss: mean Kullback-Leibler divergence of all rows, added up over layers
    """

    def __init__(self, topk: int, device: str | torch.device) -> None:
        self._topk = topk
        self.loss = torch.zeros((), device=device)

    def __call__(self, inputs: AttentionInputs) -> torch.Tensor:
        index_query, index_key, index_weights = inputs.index()
        with torch.no_grad():
            picks = select(index_query, index_key, index_weights, self._topk)
        attend = _attend_masked if picks.shape[1] <= SHORT else _attend_gathered
        out, loss = attend(inputs, picks, index_query, index_key, index_weights)
        self.loss = self.loss + loss
        return out


def expanded(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ordinary queries and keys [B, L, H, nope + rope] and values [B, L, H, v]."""
    config = inputs.config
    per_head = torch.einsum("blc,hdc->blhd", inputs.latent, inputs.latent_up)
    key_nope, value = per_head.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
    key_pe = inputs.key_pe.unsqueeze(2).expand(-1, -1, config.num_attention_heads, -1).to(key_nope.dtype)
    query = torch.cat((inputs.query_nope, inputs.query_pe), dim=-1)
    return query, torch.cat((key_nope, key_pe), dim=-1), value


def _attend_masked(
    inputs: AttentionInputs,
    picks: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    index_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ordinary attention with all but the picks int64 [B, L, k] masked -> [B, L, H, v] and the indexer's loss."""
    batch, length, _ = picks.shape
    seen = torch.zeros(batch, length, length + 1, dtype=torch.bool, device=picks.device)
    hidden = ~seen.scatter_(2, picks.masked_fill(picks == NOTHING, length), True)[..., :length]
    query, key, value = expanded(inputs)
    logits = torch.einsum("brhd,blhd->bhrl", query, key).float() * inputs.config.softmax_scale
    weights = logits.masked_fill(hidden.unsqueeze(1), -torch.inf).softmax(-1)
    out = torch.einsum("bhrl,blhd->brhd", weights.to(value.dtype), value)
    guess = torch.einsum("brhd,bld->brhl", index_query, index_key).relu().float()
    scores = torch.einsum("brhl,brh->brl", guess, index_weights).masked_fill(hidden, -torch.inf)
    return out, divergence(weights.detach().mean(1), scores.log_softmax(-1))


def _attend_gathered(
    inputs: AttentionInputs,
    picks: torch.Tensor,
    index_query: torch.Tensor,
    index_key: torch.Tensor,
    index_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As _attend_masked, but absorbed, over copies of what was picked: for long sequences."""
    config = inputs.config
    batch, length, _ = picks.shape
    offsets = torch.arange(batch, device=picks.device).view(-1, 1, 1) * length
    places = (picks.clamp(min=0) + offsets).flatten(0, 1)
    hidden = (picks == NOTHING).flatten(0, 1)
    key_up, value_up = inputs.latent_up.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
    absorbed = torch.einsum("blhd,hdc->blhc", inputs.query_nope, key_up)
    query = torch.cat((absorbed, inputs.query_pe.to(absorbed.dtype)), dim=-1).flatten(0, 1)
    cached = torch.cat((inputs.latent, inputs.key_pe.to(inputs.latent.dtype)), dim=-1).flatten(0, 1)
    rows = F.embedding(places, cached.to(query.dtype))  # [B x L, k, latent + rope]
    logits = torch.einsum("thc,tkc->thk", query, rows).float() * config.softmax_scale
    weights = logits.masked_fill(hidden.unsqueeze(1), -torch.inf).softmax(-1)
    latent = torch.einsum("thk,tkc->thc", weights.to(rows.dtype), rows[..., : config.kv_lora_rank])
    out = torch.einsum("thc,hdc->thd", latent, value_up).unflatten(0, (batch, length))
    keys = F.embedding(places, index_key.flatten(0, 1))
    guess = torch.einsum("thd,tkd->thk", index_query.flatten(0, 1), keys).relu().float()
    scores = torch.einsum("thk,th->tk", guess, index_weights.flatten(0, 1)).masked_fill(hidden, -torch.inf)
    return out, divergence(weights.detach().mean(1), scores.log_softmax(-1))


def select(query: torch.Tensor, key: torch.Tensor, weights: torch.Tensor, topk: int) -> torch.Tensor:
    """int64 [B, L, topk]: the visible tokens of highest index score, NOTHING where there are no more."""
    batch, length, heads, _ = query.shape
    step = max(1, LOGITS_AT_ONCE // (batch * heads * length))
    positions = torch.arange(length, device=query.device)
    picks = positions.new_full((batch, length, topk), NOTHING)
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        seen = rows.stop
        logits = torch.einsum("brhd,bld->brhl", query[:, rows].float(), key[:, :seen].float()).relu_()
        scores = torch.einsum("brhl,brh->brl", logits, weights[:, rows])
        scores.masked_fill_(positions[:seen] > positions[rows].unsqueeze(-1), -torch.inf)
        found = best(scores, min(topk, seen))
        picks[:, rows, : found.shape[-1]] = found
    return picks


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """[B, R, L], -inf where hidden -> [B, R, count]. Ties go by chance: serving takes the lowest position."""
    top = scores.topk(count, dim=-1, sorted=False)
    return top.indices.masked_fill(top.values == -torch.inf, NOTHING)


def divergence(target: torch.Tensor, log_guess: torch.Tensor) -> torch.Tensor:
    """Mean over rows of KL(target || guess), [..., N]; what is hidden has target 0 and log guess -inf."""
    terms = torch.where(target > 0, target * (target.clamp(min=1e-20).log() - log_guess), 0.0)
    return terms.sum(-1).mean()


def _take(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[B, L, ...] at rows [B, R] -> [B, R, ...]."""
    index = rows.view(*rows.shape, *(1,) * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
    return values.gather(1, index)
