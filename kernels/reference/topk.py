"""Deterministic top-k: highest score first, lowest position on ties. Knows nothing of where scores come from."""

import torch

BLOCK = 16  # neighbours of which top_k_in_blocks first looks at the best
_LOW_WORD = 0xFFFFFFFF
_NAN = 0x7FFFFFFF  # its place in the order: above infinity


def top_k(scores: torch.Tensor, lengths: torch.Tensor, topk: int) -> torch.Tensor:
    """The positions of each row's best scores, in ascending order.

    scores:  fp32 [T, L]; -0.0 equals 0.0, and NaN beats infinity
    lengths: int64 [T]: the row has the positions 0 .. length - 1; what lies beyond is never looked at
    Returns int32 [T, topk], -1 after the last: a row of at most topk positions takes all of them.
    """
    positions = torch.arange(scores.shape[1], device=scores.device)
    visible = scores.masked_fill(positions >= lengths.unsqueeze(1), -torch.inf)
    return _ascending(_best(visible, positions, topk), lengths, topk)


def top_k_in_blocks(scores: torch.Tensor, lengths: torch.Tensor, topk: int) -> torch.Tensor:
    """top_k of scores that lie so that neighbours are compared fast: fp32 [BLOCK, T, N], position n * BLOCK + b at [b, :, n].

    Overwrites what is not visible. Looks closely at the topk best blocks only. That is enough: where a block is left out, each
    of topk blocks has a better one, or as good a one in a lower position, than the best of it.
    """
    _hide(scores, lengths)
    block_numbers = torch.arange(scores.shape[2], device=scores.device)
    blocks = _best(scores.amax(0), block_numbers, topk)
    candidates = scores.gather(2, blocks.expand(BLOCK, -1, -1)).transpose(0, 1)
    offsets = torch.arange(BLOCK, device=scores.device).unsqueeze(1)
    positions = blocks.unsqueeze(1) * BLOCK + offsets
    return _ascending(_best(candidates.flatten(1), positions.flatten(1), topk), lengths, topk)


def _hide(scores: torch.Tensor, lengths: torch.Tensor) -> None:
    """Fills what is not visible with -inf. It loses every tie against what is visible, which has lower positions."""
    if len(lengths) == 0:
        return
    first = int(lengths.min().clamp(min=0)) // BLOCK
    positions = torch.arange(first * BLOCK, scores.shape[2] * BLOCK, device=scores.device)
    positions = positions.view(-1, BLOCK).T.unsqueeze(1)
    scores[..., first:].masked_fill_(positions >= lengths.unsqueeze(1), -torch.inf)


def _best(scores: torch.Tensor, numbers: torch.Tensor, count: int) -> torch.Tensor:
    """scores fp32 [T, L], their numbers int64 [L] or [T, L] -> int64 [T, at most count], in no order: the lower wins a tie."""
    best = _sort_keys(scores, numbers).topk(min(count, scores.shape[1]), dim=1, sorted=False).values
    return _LOW_WORD - (best & _LOW_WORD)


def _sort_keys(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """int64 [T, L], larger is better, no two equal in a row: the score's order in the high word, lower numbers first."""
    bits = (scores + 0.0).view(torch.int32)
    # Read as an integer, a negative float counts the wrong way: flip all its bits but the sign.
    order = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).masked_fill_(scores.isnan(), _NAN)
    return order.long().bitwise_left_shift_(32).bitwise_or_(_LOW_WORD - numbers)


def _ascending(positions: torch.Tensor, lengths: torch.Tensor, topk: int) -> torch.Tensor:
    """positions int64 [T, at most topk] -> int32 [T, topk]: the visible ones in order, then -1."""
    never = torch.iinfo(torch.int32).max
    ascending = positions.masked_fill(positions >= lengths.unsqueeze(1), never).sort(dim=1).values
    picks = torch.full((len(positions), topk), -1, dtype=torch.int32, device=positions.device)
    picks[:, : ascending.shape[1]] = ascending.masked_fill_(ascending == never, -1)
    return picks
