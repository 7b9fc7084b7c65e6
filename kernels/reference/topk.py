"""Deterministic top-k: highest score first, lowest position on ties. Knows nothing of where scores come from."""

import torch

_LOW_WORD = 0xFFFFFFFF
_NEVER = -(2**63)  # the key of what is not visible; no visible score has it


def top_k(scores: torch.Tensor, lengths: torch.Tensor, topk: int) -> torch.Tensor:
    """The positions of each row's best scores, in ascending order.

    scores:  fp32 [T, L]; -0.0 equals 0.0, a NaN above infinity beats it
    lengths: int64 [T]: the row has the positions 0 .. length - 1; what lies beyond is never looked at
    Returns int32 [T, topk], -1 after the last: a row of at most topk positions takes all of them.
    """
    num_rows, width = scores.shape
    picks = torch.full((num_rows, topk), -1, dtype=torch.int32, device=scores.device)
    if num_rows == 0 or width == 0:
        return picks
    best = _sort_keys(scores, lengths).topk(min(topk, width), dim=1, sorted=False).values
    positions = _LOW_WORD - (best & _LOW_WORD)
    ascending = positions.masked_fill(best == _NEVER, width).sort(dim=1).values
    picks[:, : ascending.shape[1]] = ascending.masked_fill(ascending == width, -1)
    return picks


def _sort_keys(scores: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """int64 [T, L], larger is better, no two equal in a row: the score's order in the high word, lower positions first."""
    width = scores.shape[1]
    bits = (scores + 0.0).view(torch.int32)
    # Read as an integer, a negative float counts the wrong way: flip all its bits but the sign.
    order = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    positions = torch.arange(width, device=scores.device)
    keys = order.long().bitwise_left_shift_(32).bitwise_or_(_LOW_WORD - positions)
    shortest = int(lengths.min().clamp(0, width))
    keys[:, shortest:].masked_fill_(positions[shortest:] >= lengths.unsqueeze(1), _NEVER)
    return keys
