"""Multi-head latent attention over the tokens that the lightning indexer selects. Knows nothing of requests or batching.

Both caches are written before they are read, so that a row sees itself and the earlier rows of its own chunk, and always in
the precision of the cache: prefill and decode see the same bytes.
"""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels.layout import PAGE_SIZE, CacheLayout
from kernels.rows import Rows
from workers.cache_rows import CacheRows
from workers.group import Group
from workers.memory import EXPANDED_TOKENS
from workers.model_config import ModelConfig
from workers.rope import Rope
from workers.weights import Weights

QUERY_TILE = 64
KEY_TILE = 512
# Where keys and values of each head are faster on an H200 (docs/kernels.md).
EXPANDED_CONTEXT = 5000  # tokens that rows see in the mean, at most
EXPANDING_ROWS = 512  # of a step, at least


class Indexer:
    """Writes the index keys of its rows and selects for each row the top-k visible tokens."""

    def __init__(self, config: ModelConfig, weights: Weights, layout: CacheLayout) -> None:
        self._config = config
        self._layout = layout
        self._ops = weights.ops
        self._key_norm = weights.layer_norm("k_norm", config.index_head_dim)
        self._weights = weights.table("weights_proj", config.index_n_heads, config.hidden_size, torch.float32)
        self._weight_scale = 1 / math.sqrt(config.index_n_heads * config.index_head_dim)

    def write(self, key: torch.Tensor, rope: Rope, slots: torch.Tensor, pages: torch.Tensor) -> None:
        """key [T, dim] as projected."""
        norm = self._key_norm
        self._ops.rotate_index_keys(key, norm.weight, norm.bias, norm.eps, *rope, pages, slots, self._layout)

    def queries(self, x: torch.Tensor, query: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, D], query [T, heads x dim] as projected -> what `select` takes; reads no page."""
        rotated = self._ops.rotate_index_queries(
            query.unflatten(-1, (-1, self._config.index_head_dim)), *rope
        )
        return rotated, self._ops.linear(x, self._weights, torch.float32) * self._weight_scale

    def select(
        self, query: torch.Tensor, weights: torch.Tensor, rows: Rows, pages: torch.Tensor
    ) -> torch.Tensor:
        """Slots int32 [T, topk] by position, -1 padded."""
        return self._ops.select_tokens(query, weights, pages, rows, self._config.index_topk, self._layout)


class Attention:
    """The attention of one layer. `absorbed` attends in the latent space; otherwise keys and values are expanded per head.

    `dense_if_short`: where no row can see more than top-k tokens, all of them are attended to without a selection. That changes
    bits with the company that a row has, so it is not for CPUs.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        layout: CacheLayout,
        absorbed: bool,
        group: Group,
        dense_if_short: bool,
    ) -> None:
        heads, hidden, latent = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
        self._config = config
        self._layout = layout
        self._ops = weights.ops
        self._down = weights.fused(
            {
                "q_a_proj": config.q_lora_rank,
                "indexer.wk": config.index_head_dim,
                "kv_a_proj_with_mqa": latent + config.qk_rope_head_dim,
            },
            hidden,
        )
        self._up = weights.fused(
            {
                "q_b_proj": heads * config.qk_head_dim,
                "indexer.wq_b": config.index_n_heads * config.index_head_dim,
            },
            config.q_lora_rank,
        )
        self._query_norm = weights.rms_norm("q_a_layernorm", config.q_lora_rank, config.rms_norm_eps)
        self._latent_norm = weights.rms_norm("kv_a_layernorm", latent, config.rms_norm_eps)
        self._dense_if_short = dense_if_short
        self._attend: Absorbed | Unabsorbed = (
            Absorbed(config, weights, layout, group, expand_if_short=dense_if_short)
            if absorbed
            else Unabsorbed(config, weights, layout)
        )
        self._out = weights.linear("o_proj", hidden, heads * config.v_head_dim)
        self._indexer = Indexer(config, weights.at("indexer"), layout)
        self._cache_rows = CacheRows(layout, group)

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
        """x [T, D], slots int64 [T] (where each row's caches go) -> [T, D]. `on_selected` is shown the indexer's slots."""
        config = self._config
        query_latent, index_key, cached = self._down(x)
        query, index_query = self._up(self._query_norm(query_latent))
        query_nope, query_pe = query.unflatten(-1, (-1, config.qk_head_dim)).split(
            (config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1
        )
        latent, key_pe = cached.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        norm = self._latent_norm
        query_pe = self._ops.rotate_latents(
            query_pe, latent, key_pe, norm.weight, norm.eps, *rope, latent_pages, slots, self._layout
        )
        self._indexer.write(index_key, rope, slots, index_pages)
        # The rows of other ranks arrive while the indexer's queries are made.
        sharing = self._cache_rows.share(latent_pages, index_pages, slots)
        choice = on_selected is not None or self._is_choice(rows)
        queries = self._indexer.queries(x, index_query, rope) if choice else None
        self._cache_rows.finish(sharing, latent_pages, index_pages)
        selected = self._indexer.select(*queries, rows, index_pages) if queries else None
        if on_selected is not None and selected is not None:
            on_selected(selected)
        out = self._attend(query_nope, query_pe, rows, latent_pages, selected)
        return self._out(out.flatten(1))

    def _is_choice(self, rows: Rows) -> bool:
        return not self._dense_if_short or rows.page_table.shape[1] * PAGE_SIZE > self._config.index_topk


class Absorbed:
    """One key head, 576 wide, for all query heads; its first 512 channels are also the value.

    `expand_if_short`: many rows of short contexts are cheaper with keys and values of each head (`expands`).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        layout: CacheLayout,
        group: Group,
        *,
        expand_if_short: bool,
    ) -> None:
        self._expand_if_short = expand_if_short
        self._num_sharing = group.size if group.shares_rows else 1  # of a step's rows
        self._softmax_scale = config.softmax_scale
        self._layout = layout
        self._ops = weights.ops
        per_head = _latent_up(config, weights).unflatten(0, (config.num_attention_heads, -1))
        self._key_up = per_head[:, : config.qk_nope_head_dim].contiguous()  # [H, nope, latent]
        self._value_up = per_head[:, config.qk_nope_head_dim :].transpose(1, 2).contiguous()  # [H, latent, v]

    def __call__(
        self,
        query_nope: torch.Tensor,
        query_pe: torch.Tensor,
        rows: Rows,
        pages: torch.Tensor,
        selected: torch.Tensor | None,
    ) -> torch.Tensor:
        """query_nope [T, H, nope], query_pe [T, H, rope], selected int32 [T, topk], None for all -> [T, H, v]."""
        num_rows = len(query_nope) * self._num_sharing
        if self._expand_if_short and expands(num_rows, *rows.page_table.shape):
            return self._ops.expanded_mla(
                query_nope,
                query_pe,
                pages,
                rows,
                selected,
                self._key_up,
                self._value_up,
                self._softmax_scale,
                self._layout,
            )
        query = torch.cat((self._ops.head_linear(query_nope, self._key_up), query_pe), dim=-1)
        if selected is None:
            out, _ = self._ops.dense_mla(query, pages, rows, self._softmax_scale, self._layout)
        else:
            out, _ = self._ops.sparse_mla(query, pages, selected, self._softmax_scale, self._layout)
        return self._ops.head_linear(out, self._value_up)


def expands(num_rows: int, num_requests: int, num_pages: int) -> bool:
    """Whether keys and values of each head pay: of all tokens they take memory and products once, and of what a row sees products
    that were not selected. num_pages: of the longest request."""
    window = num_pages * PAGE_SIZE
    mean_context = window - num_rows / num_requests / 2
    return (
        num_requests * window <= EXPANDED_TOKENS
        and num_rows >= EXPANDING_ROWS
        and mean_context <= EXPANDED_CONTEXT
    )


class Unabsorbed:
    """Ordinary multi-head attention, request by request, with all but the selected tokens masked."""

    def __init__(self, config: ModelConfig, weights: Weights, layout: CacheLayout) -> None:
        self._config = config
        self._layout = layout
        self._ops = weights.ops
        self._latent_up = _latent_up(config, weights)

    def __call__(
        self,
        query_nope: torch.Tensor,
        query_pe: torch.Tensor,
        rows: Rows,
        pages: torch.Tensor,
        selected: torch.Tensor | None,
    ) -> torch.Tensor:
        """query_nope [T, H, nope], query_pe [T, H, rope], selected int32 [T, topk] -> [T, H, v]."""
        assert selected is not None
        query = torch.cat((query_nope, query_pe), dim=-1)
        outs = []
        for request, (start, end) in enumerate(itertools.pairwise(rows.query_starts)):
            visible = _visible_slots(rows, request, end)
            key, value = self._expand(self._ops.read_latents(pages, visible, self._layout).to(query.dtype))
            mask = _selection_mask(selected[start:end], visible)
            outs.append(masked_attention(query[start:end], key, value, mask, self._config.softmax_scale))
        return torch.cat(outs)

    def _expand(self, cached: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[L, latent + rope] -> keys [L, H, nope + rope] and values [L, H, v]."""
        config = self._config
        latent, key_pe = cached.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        per_head = self._ops.linear(latent, self._latent_up).unflatten(-1, (config.num_attention_heads, -1))
        key_nope, value = per_head.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        key_pe = key_pe.unsqueeze(1).expand(-1, config.num_attention_heads, -1)
        return torch.cat((key_nope, key_pe), dim=-1), value


def _latent_up(config: ModelConfig, weights: Weights) -> torch.Tensor:
    rows = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
    return weights.matrix("kv_b_proj", rows, config.kv_lora_rank)


def _visible_slots(rows: Rows, request: int, end: int) -> torch.Tensor:
    """int64 [L]: the slots of the tokens that the last row of a request sees, by position."""
    num_visible = int(rows.positions[end - 1]) + 1
    pages = rows.page_table[request, : -(-num_visible // PAGE_SIZE)].long()
    offsets = torch.arange(PAGE_SIZE, device=pages.device)
    return (pages.unsqueeze(1) * PAGE_SIZE + offsets).flatten()[:num_visible]


def _selection_mask(selected: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Slots int32 [t, topk], -1 padded, and the slots of L tokens -> bool [t, L], True where a row selected a token."""
    order = visible.argsort()
    found = torch.searchsorted(visible[order], selected.clamp(min=0).long()).clamp(max=len(visible) - 1)
    positions = order[found].masked_fill(selected < 0, len(visible))
    mask = torch.zeros(len(selected), len(visible) + 1, dtype=torch.bool, device=selected.device)
    return mask.scatter_(1, positions, True)[:, :-1]


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, softmax_scale: float
) -> torch.Tensor:
    """query [T, H, d], key [L, H, d], value [L, H, v], mask bool [T, L] with a True in each row -> [T, H, v], in fp32 inside.

    Tiles have one fixed shape and the softmax runs along them, so a row's bits depend neither on the other rows nor on how
    many masked tokens follow.
    """
    num_rows, num_keys = mask.shape
    key_pad, row_pad = -num_keys % KEY_TILE, -num_rows % QUERY_TILE
    queries = F.pad(query.float(), (0, 0, 0, 0, 0, row_pad)).transpose(0, 1).split(QUERY_TILE, dim=1)
    keys = F.pad(key.float(), (0, 0, 0, 0, 0, key_pad)).permute(1, 2, 0).split(KEY_TILE, dim=2)
    values = F.pad(value.float(), (0, 0, 0, 0, 0, key_pad)).transpose(0, 1).split(KEY_TILE, dim=1)
    masks = F.pad(mask, (0, key_pad, 0, row_pad)).split(QUERY_TILE)
    outs = [
        _attend_tile(query_tile, keys, values, tile_mask.split(KEY_TILE, dim=1), softmax_scale)
        for query_tile, tile_mask in zip(queries, masks, strict=True)
    ]
    return torch.cat(outs, dim=1).transpose(0, 1)[:num_rows].to(query.dtype)


def _attend_tile(
    query: torch.Tensor,
    keys: tuple[torch.Tensor, ...],
    values: tuple[torch.Tensor, ...],
    masks: tuple[torch.Tensor, ...],
    softmax_scale: float,
) -> torch.Tensor:
    """query [H, t, d], tiles of keys [H, d, l], of values [H, l, v], of the mask [t, l] -> [H, t, v]. Online softmax."""
    heads, rows, _ = query.shape
    highest = query.new_full((heads, rows, 1), -torch.inf)
    total = query.new_zeros((heads, rows, 1))
    out = query.new_zeros((heads, rows, values[0].shape[-1]))
    for key, value, mask in zip(keys, values, masks, strict=True):
        scores = torch.bmm(query, key).mul_(softmax_scale).masked_fill_(~mask, -torch.inf)
        raised = torch.maximum(highest, scores.amax(-1, keepdim=True))
        # A row that has met no token yet has no maximum; any finite one keeps its weights at zero.
        origin = raised.masked_fill(raised == -torch.inf, 0.0)
        weights, rescale = torch.exp(scores - origin), torch.exp(highest - origin)
        total = total * rescale + weights.sum(-1, keepdim=True)
        out = out * rescale + torch.bmm(weights, value)
        highest = raised
    return out / total
