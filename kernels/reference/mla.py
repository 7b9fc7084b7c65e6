"""Absorbed MLA over paged latents: all heads read the same rows, latent and roped key as key, latent as value.

Knows nothing of how tokens were selected. On a CPU the bits of a query row depend neither on the other rows nor on how many there
are: its products have a fixed shape (sparse: one product a row; dense: tiles).
"""

import itertools

import torch
import torch.nn.functional as F

from kernels.layout import PAGE_SIZE, CacheLayout
from kernels.reference.cache import read_latents
from kernels.reference.linear import COLUMN_MULTIPLE, blocked_bmm, head_linear
from kernels.rows import Rows

GATHER_BYTES = (
    4 * 2**20
)  # gathered rows held at a time (at least one query's), so that they stay in the CPU's cache
QUERY_TILE = 64  # dense: (row, head) pairs multiplied at once, or the heads of one row if they are more
KEY_TILE = 512
LOWEST = torch.finfo(
    torch.float32
).min  # stands for the maximum of nothing: finite, so that weights stay zero


def sparse_mla(
    q: torch.Tensor,
    latent_pages: torch.Tensor,
    slots: torch.Tensor,
    softmax_scale: float,
    layout: CacheLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of each query row over the tokens in its slots.

    q:            [T, H, latent_dim + rope_dim]
    latent_pages: uint8 [P, 64, latent_row_bytes]
    slots:        int32 [T, topk]; any outside 0 .. P x 64 - 1 counts as none
    Returns out [T, H, latent_dim] in q's dtype and the log-sum-exp fp32 [T, H], natural log. A row without a valid slot gives
    0 and +inf, as FlashMLA does.
    """
    num_rows, heads, _ = q.shape
    slots = F.pad(slots, (0, -slots.shape[1] % COLUMN_MULTIPLE), value=-1)
    topk = slots.shape[1]
    out = q.new_empty(num_rows, heads, layout.latent_dim)
    lse = q.new_empty(num_rows, heads, dtype=torch.float32)
    hidden = (slots < 0) | (slots >= len(latent_pages) * PAGE_SIZE)
    used, where = slots.unique(return_inverse=True)
    latents = read_latents(latent_pages, used, layout)  # each token once, however many rows selected it
    step = max(1, GATHER_BYTES // (4 * topk * latents.shape[1]))
    for start in range(0, num_rows, step):
        chunk = slice(start, start + step)
        gathered = latents.index_select(0, where[chunk].flatten()).view(-1, topk, latents.shape[1])
        out[chunk], lse[chunk] = _attend(q[chunk], gathered, hidden[chunk], softmax_scale, layout.latent_dim)
    return out, lse


def dense_mla(
    q: torch.Tensor, latent_pages: torch.Tensor, rows: Rows, softmax_scale: float, layout: CacheLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """As sparse_mla, over every token that a row sees: for comparison and for short contexts."""
    num_rows, heads, _ = q.shape
    out = q.new_empty(num_rows, heads, layout.latent_dim)
    lse = q.new_empty(num_rows, heads, dtype=torch.float32)
    step = max(1, QUERY_TILE // heads)
    for request, (first, end) in enumerate(itertools.pairwise(rows.query_starts)):
        if first == end:
            continue
        length = int(rows.positions[first:end].max()) + 1
        slots = _visible_slots(rows.page_table[request], length)
        tiles = read_latents(latent_pages, slots.view(-1, KEY_TILE), layout)
        for start in range(first, end, step):
            tile = slice(start, min(start + step, end))
            pad = step - (tile.stop - tile.start)
            queries = F.pad(q[tile].float(), (0, 0, 0, 0, 0, pad)).flatten(0, 1).unsqueeze(0)
            positions = F.pad(rows.positions[tile], (0, pad), value=-1).repeat_interleave(heads)
            tile_out, tile_lse = _attend_tiles(queries, positions, tiles, softmax_scale, layout.latent_dim)
            out[tile] = tile_out.unflatten(0, (step, heads))[: step - pad]
            lse[tile] = tile_lse.unflatten(0, (step, heads))[: step - pad]
    return out, lse


def expanded_mla(
    query_nope: torch.Tensor,
    query_pe: torch.Tensor,
    latent_pages: torch.Tensor,
    rows: Rows,
    slots: torch.Tensor | None,
    key_up: torch.Tensor,
    value_up: torch.Tensor,
    softmax_scale: float,
    layout: CacheLayout,
) -> torch.Tensor:
    """sparse_mla, or without slots dense_mla, between the products with the heads' own matrices. A back end may multiply the
    latents with those matrices instead: fewer operations for each token, but on tokens that were not selected too.

    query_nope: [T, H, nope]; query_pe: [T, H, rope_dim]
    slots:      as of sparse_mla, but of tokens that the row sees, and of all of them where those are at most topk
    key_up:     [H, nope, latent_dim]; value_up: [H, latent_dim, v]
    Returns [T, H, v] in the queries' dtype.
    """
    query = torch.cat((head_linear(query_nope, key_up), query_pe), dim=-1)
    if slots is None:
        out, _ = dense_mla(query, latent_pages, rows, softmax_scale, layout)
    else:
        out, _ = sparse_mla(query, latent_pages, slots, softmax_scale, layout)
    return head_linear(out, value_up)


def _attend(
    q: torch.Tensor, latents: torch.Tensor, hidden: torch.Tensor, softmax_scale: float, latent_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [t, H, D], latents fp32 [t, topk, D], hidden bool [t, topk] -> [t, H, latent_dim] and [t, H]."""
    scores = blocked_bmm(q.float(), latents.transpose(1, 2)).mul_(softmax_scale)
    scores.masked_fill_(hidden.unsqueeze(1), -torch.inf)
    highest = scores.amax(-1, keepdim=True).clamp_(min=LOWEST)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    return _normalized(blocked_bmm(weights, latents[..., :latent_dim]), total, highest)


def _attend_tiles(
    queries: torch.Tensor,
    positions: torch.Tensor,
    tiles: torch.Tensor,
    softmax_scale: float,
    latent_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """queries fp32 [1, m, D], positions int64 [m], tiles fp32 [n, KEY_TILE, D] -> [m, latent_dim] and [m]. Online softmax.

    A tile of which a row sees nothing changes no bit of it.
    """
    highest = queries.new_full((1, queries.shape[1], 1), LOWEST)
    total = torch.zeros_like(highest)
    out = queries.new_zeros(1, queries.shape[1], latent_dim)
    numbers = torch.arange(KEY_TILE, device=queries.device)
    for number, latents in enumerate(tiles.unsqueeze(1)):
        hidden = numbers + number * KEY_TILE > positions.unsqueeze(1)
        scores = blocked_bmm(queries, latents.transpose(1, 2)).mul_(softmax_scale)
        scores.masked_fill_(hidden, -torch.inf)
        raised = torch.maximum(highest, scores.amax(-1, keepdim=True))
        rescale = torch.exp(highest - raised)
        weights = scores.sub_(raised).exp_()
        total = total * rescale + weights.sum(-1, keepdim=True)
        out = out * rescale + blocked_bmm(weights, latents[..., :latent_dim])
        highest = raised
    out, lse = _normalized(out, total, highest)
    return out[0], lse[0]


def _normalized(
    out: torch.Tensor, total: torch.Tensor, highest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum [..., latent_dim], sum of weights and maximum [..., 1] -> output and log-sum-exp [...]."""
    empty = total == 0
    lse = (highest + total.log()).masked_fill(empty, torch.inf)
    return out.div_(total.masked_fill_(empty, 1.0)), lse.squeeze(-1)


def _visible_slots(page_ids: torch.Tensor, length: int) -> torch.Tensor:
    """page_ids int32 [n] of one request -> the slots of its tokens 0 .. length - 1, -1 up to a multiple of KEY_TILE."""
    pages = page_ids[: -(-length // PAGE_SIZE)].long()
    slots = (pages.unsqueeze(1) * PAGE_SIZE + torch.arange(PAGE_SIZE, device=pages.device)).flatten()[:length]
    return F.pad(slots, (0, -length % KEY_TILE), value=-1)
