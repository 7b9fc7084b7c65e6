"""Rotation of channel pairs, in two ways of pairing. Knows nothing of angles.

They agree at position 0 only, and swapping them goes unnoticed in contexts of up to top-k tokens.
"""

import torch


def rotate_neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[T, heads, dim] -> same shape and dtype; pairs (2i, 2i+1), computed in fp32. For MLA queries and keys."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[T, heads, dim] -> same shape and dtype; pairs (i, i + dim/2), computed in fp32. For indexer queries and keys."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
