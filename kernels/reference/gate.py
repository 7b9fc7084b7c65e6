"""Which experts a token goes to: DeepSeek's sigmoid gate with expert groups. Knows nothing of the experts themselves."""

import torch

from kernels.reference.linear import linear
from kernels.reference.norm import sigmoid


def choose_experts(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    num_groups: int,
    kept_groups: int,
    num_chosen: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses experts by sigmoid score plus bias, and weighs them by score alone. fp32; on ties the lowest index wins.

    x:           [T, D]
    weight:      fp32 [E, D]
    bias:        fp32 [E]
    num_groups:  the experts are that many groups; a group is as good as its two best experts together
    kept_groups: only experts of that many groups, the best ones, can be chosen
    scale:       what a token's weights add up to
    Returns experts int32 [T, num_chosen], best first, and their weights fp32 [T, num_chosen].
    """
    scores = sigmoid(linear(x.float(), weight))
    experts = _best(_within_best_groups(scores + bias, num_groups, kept_groups), num_chosen)
    weights = scores.gather(1, experts)
    return experts.int(), weights / weights.sum(-1, keepdim=True) * scale


def _within_best_groups(choice: torch.Tensor, num_groups: int, kept_groups: int) -> torch.Tensor:
    """[T, E] with -inf outside the best groups."""
    grouped: torch.Tensor = choice.unflatten(1, (num_groups, -1))
    kept = _best(grouped.topk(2, dim=-1).values.sum(-1), kept_groups)
    dropped = torch.ones(grouped.shape[:2], dtype=torch.bool, device=choice.device).scatter_(1, kept, False)
    return grouped.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(1)


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the highest scores of each row. topk would leave ties to chance."""
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :count]
