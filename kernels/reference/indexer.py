"""The lightning indexer: scores every visible token for each query row and selects the best. Knows nothing of MLA.

The score of a row and a key comes from matrix products of one fixed shape, so on a CPU its bits depend neither on the batch, nor
on how rows are chunked, nor on the length of the context.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.layout import PAGE_SIZE, CacheLayout
from kernels.reference.cache import read_index_pages, write_index_keys
from kernels.reference.linear import blocked_bmm
from kernels.reference.norm import layer_norm
from kernels.reference.quant import dequantize_blocks, quantize_blocks
from kernels.reference.rope import rotate_halves
from kernels.reference.topk import BLOCK, top_k_in_blocks
from kernels.rows import Rows

QUERY_TILES = (64, 16)  # (row, head) pairs multiplied at once; the heads of one row if they are more
KEY_TILE = 128
KEYS_IN_GROUP = (
    BLOCK * KEY_TILE
)  # tile b of a group has its keys b, b + BLOCK, ...: neighbours end up in one column
PAGES_IN_GROUP = KEYS_IN_GROUP // PAGE_SIZE
CHUNK_BYTES = 16 * 2**20  # what a chunk of rows may take; one row of a request always passes
_SCORE_BYTES = 4
_KEY_BYTES = 512  # one key, dequantised


class _Piece(NamedTuple):
    """Rows start .. end - 1, all of one request; `length` is how many tokens those of them see that see most."""

    request: int
    start: int
    end: int
    length: int


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """x [..., D], D a power of two -> same shape and dtype: Sylvester's matrix times D^-0.5, in fp32 inside."""
    dim = x.shape[-1]
    if dim & (dim - 1):
        raise ValueError(f"the last dimension of x is {dim}, but a Hadamard transform needs a power of two")
    out, half = x.float(), 1
    while half < dim:
        first, second = out.unflatten(-1, (-1, 2, half)).unbind(-2)
        out = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        half *= 2
    return (out * dim**-0.5).to(x.dtype)


def rotate_index_keys(
    keys: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
    layout: CacheLayout,
) -> None:
    """Everything between the projection of the indexer's keys and its scores: norm, RoPE, Hadamard transform, and their cache.

    keys:                  [T, index_dim] as projected, a strided view too
    norm_weight, norm_bias: fp32 [index_dim] of the LayerNorm, which is computed in fp32 and cast last
    cos, sin:              fp32 [T, 1, rope_dim / 2], of each row's position; the first rope_dim channels are turned, by halves
    slots:                 int64 [T], valid and distinct: where each row's key goes
    """
    normed = layer_norm(keys, norm_weight, norm_bias, eps)
    write_index_keys(pages, slots, rotate_index_queries(normed.unsqueeze(1), cos, sin).squeeze(1), layout)


def rotate_index_queries(queries: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """queries [T, H, index_dim] as projected, a strided view too -> the same turned as keys are, and Hadamard-transformed."""
    rope_dim = 2 * cos.shape[-1]
    roped = rotate_halves(queries[..., :rope_dim], cos, sin)
    return hadamard(torch.cat((roped, queries[..., rope_dim:]), dim=-1))


def select_tokens(
    q: torch.Tensor,
    weights: torch.Tensor,
    index_pages: torch.Tensor,
    rows: Rows,
    topk: int,
    layout: CacheLayout,
) -> torch.Tensor:
    """Each row's topk best visible tokens, by the score of `index_scores`; the lower position wins a tie.

    q:           [T, H, index_dim], roped and Hadamard-transformed; quantised here if the layout is
    weights:     fp32 [T, H], with the factors H^-0.5 and index_dim^-0.5 in them
    index_pages: uint8 [P, index_page_bytes]
    Returns physical slots int32 [T, topk] by ascending token position, -1 after the last: a row that sees at most topk
    tokens takes all of them.
    """
    lengths = rows.positions + 1
    visible = lengths.tolist()

    @functools.lru_cache(maxsize=1)  # a long request is scored in pieces, one right after the other
    def kept_keys(request: int) -> list[torch.Tensor]:
        first, end = rows.query_starts[request : request + 2]
        return list(_key_groups(index_pages, rows.page_table[request], max(visible[first:end]), layout))

    def keys_of(piece: _Piece) -> Iterable[torch.Tensor]:
        if (piece.start, piece.end) == rows.query_starts[piece.request : piece.request + 2]:
            return _key_groups(index_pages, rows.page_table[piece.request], piece.length, layout)
        return kept_keys(piece.request)

    selected = torch.empty(len(q), topk, dtype=torch.int32, device=q.device)
    for pieces in _chunks(rows, visible):
        chunk = slice(pieces[0].start, pieces[-1].end)
        chunk_q, chunk_weights = _as_cached(q[chunk], layout), weights[chunk]
        num_groups = max(_num_groups(piece.length) for piece in pieces)
        scores = chunk_q.new_zeros(BLOCK, len(chunk_q), num_groups, KEY_TILE)
        for piece in pieces:
            if piece.length <= topk:  # all of its tokens are taken, whatever their scores
                continue
            own = slice(piece.start - chunk.start, piece.end - chunk.start)
            target = scores[:, own, : _num_groups(piece.length)]
            _score(chunk_q[own], chunk_weights[own], keys_of(piece), out=target)
        picks = top_k_in_blocks(scores.flatten(2), lengths[chunk], topk)
        selected[chunk] = _slots(picks, rows.page_table, rows.owners[chunk])
    return selected


def index_scores(
    q: torch.Tensor, weights: torch.Tensor, index_pages: torch.Tensor, rows: Rows, layout: CacheLayout
) -> torch.Tensor:
    """The scores of one request's rows: sum over heads of weights * relu(q . key), fp32 [T, L], -inf where not visible.

    Arguments as for select_tokens; L is what the row that sees most sees. ValueError unless `rows` is one request.
    """
    if len(rows.query_starts) != 2:
        raise ValueError(f"rows holds {len(rows.query_starts) - 1} requests, but index_scores takes one")
    length = int(rows.positions.max()) + 1
    scores = q.new_empty(BLOCK, len(q), _num_groups(length), KEY_TILE, dtype=torch.float32)
    keys = _key_groups(index_pages, rows.page_table[0], length, layout)
    _score(_as_cached(q, layout), weights, keys, out=scores)
    hidden = torch.arange(length, device=q.device) > rows.positions.unsqueeze(1)
    return scores.permute(1, 2, 3, 0).flatten(1)[:, :length].masked_fill(hidden, -torch.inf)


def _chunks(rows: Rows, visible: list[int]) -> Iterator[list[_Piece]]:
    """All rows in order, as many at a time as CHUNK_BYTES allow. `visible`: how many tokens each row sees."""
    chunk: list[_Piece] = []
    for piece in _pieces(rows, visible):
        if chunk and _num_bytes([*chunk, piece]) > CHUNK_BYTES:
            yield chunk
            chunk = []
        chunk.append(piece)
    if chunk:
        yield chunk


def _num_bytes(pieces: list[_Piece]) -> int:
    lengths = [piece.length for piece in pieces]
    num_rows = pieces[-1].end - pieces[0].start
    return num_rows * max(lengths) * _SCORE_BYTES + sum(lengths) * _KEY_BYTES


def _pieces(rows: Rows, visible: list[int]) -> Iterator[_Piece]:
    for request, (start, end) in enumerate(itertools.pairwise(rows.query_starts)):
        while start < end:
            step = max(1, CHUNK_BYTES // _SCORE_BYTES // max(1, *visible[start:end]))
            stop = min(start + step, end)
            yield _Piece(request, start, stop, max(visible[start:stop]))
            start = stop


def _as_cached(q: torch.Tensor, layout: CacheLayout) -> torch.Tensor:
    return dequantize_blocks(*quantize_blocks(q)) if layout.quantized else q.float()


def _key_groups(
    index_pages: torch.Tensor, page_ids: torch.Tensor, length: int, layout: CacheLayout
) -> Iterator[torch.Tensor]:
    """The keys of a request's first `length` tokens, fp32 [KEYS_IN_GROUP, index_dim] at a time. page_ids: int32 [n], its pages.

    Zeros where it has no page; after the last of its tokens the last page may hold anything.
    """
    padded = F.pad(page_ids, (0, -len(page_ids) % PAGES_IN_GROUP), value=-1)
    for ids in padded.split(PAGES_IN_GROUP)[: _num_groups(length)]:
        yield read_index_pages(index_pages, ids, layout).flatten(0, 1)


def _num_groups(length: int) -> int:
    return -(-length // KEYS_IN_GROUP)


def _score(
    q: torch.Tensor, weights: torch.Tensor, keys: Iterable[torch.Tensor], *, out: torch.Tensor
) -> None:
    """q fp32 [t, H, D], weights fp32 [t, H], keys at least n groups fp32 [KEYS_IN_GROUP, D].

    Fills out fp32 [BLOCK, t, n, KEY_TILE], unmasked: key number column * BLOCK + b of a group at [b, :, group, column].
    """
    num_rows, heads, _ = q.shape
    tile = _query_tile(num_rows, heads)
    pad = -num_rows % tile
    queries = F.pad(q, (0, 0, 0, 0, 0, pad)).unflatten(0, (-1, tile)).transpose(1, 2).flatten(1, 2)
    factors = F.pad(weights, (0, 0, 0, pad)).unflatten(0, (-1, tile)).transpose(1, 2).unsqueeze(-1)
    # One group's keys stay in the CPU's cache for all rows.
    for columns, group in zip(out.unbind(2), keys, strict=False):
        key_tiles = group.unflatten(0, (KEY_TILE, BLOCK)).permute(1, 2, 0)
        for query, factor, target in zip(queries, factors, columns.split(tile, dim=1), strict=True):
            _score_tile(query, factor, key_tiles, out=target)


def _query_tile(num_rows: int, heads: int) -> int:
    """Rows multiplied at once. Measured: the products of both tiles have the same bits, and few rows need few."""
    large, small = QUERY_TILES
    return max(1, (large if num_rows * heads > small else small) // heads)


def _score_tile(query: torch.Tensor, factor: torch.Tensor, keys: torch.Tensor, *, out: torch.Tensor) -> None:
    """query [H x rows, D], factor [H, rows, 1], keys [BLOCK, D, KEY_TILE]; fills out [BLOCK, at most rows, KEY_TILE]."""
    logits = blocked_bmm(query.expand(len(keys), -1, -1), keys).unflatten(1, factor.shape[:2])
    num_rows = out.shape[1]
    total, *others = logits[:, :, :num_rows].relu_().mul_(factor[:, :num_rows]).unbind(1)
    for head in others[:-1]:  # not sum(): its order of addition may depend on the shape
        total.add_(head)
    torch.add(total, others[-1], out=out) if others else out.copy_(total)


def _slots(picks: torch.Tensor, page_table: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """Positions int32 [t, topk] -> physical slots of the request that owns each row; -1 stays."""
    pages = page_table[owners.unsqueeze(1), picks.clamp(min=0) // PAGE_SIZE]
    return (pages * PAGE_SIZE + picks % PAGE_SIZE).masked_fill_(picks < 0, -1)
