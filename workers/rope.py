"""Rotary position embeddings: one YaRN frequency table. Knows nothing of heads, caches, or which channels are pairs."""

import math

import torch

from workers.model_config import YarnScaling

Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin of each row, fp32 [T, 1, dim / 2]


class RopeTable:
    """cos and sin of every position: fp32 [max_positions, dim / 2].

    A table, not a formula at each step: the same position gives the same bits whatever else is in the batch.
    """

    def __init__(
        self,
        dim: int,
        *,
        theta: float,
        scaling: YarnScaling | None,
        max_positions: int,
        device: str | torch.device,
    ) -> None:
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, frequencies(dim, theta, scaling))
        self.cos = angles.cos().to(device)
        self.sin = angles.sin().to(device)

    def at(self, positions: torch.Tensor) -> Rope:
        """positions int64 [T]."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def frequencies(dim: int, theta: float, scaling: YarnScaling | None) -> torch.Tensor:
    """Radians a position, fp32 [dim / 2].

    YaRN: channels that turn more than beta_fast times within the original context keep their frequency, those that turn
    fewer than beta_slow times are slowed by `factor`, with a linear ramp between.
    """
    inverse = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if scaling is None:
        return inverse

    def channel_turning(turns: float) -> float:
        original = scaling.original_max_position_embeddings
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(channel_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(channel_turning(scaling.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    slowed = ramp.clamp(0, 1)
    return inverse / scaling.factor * slowed + inverse * (1 - slowed)
