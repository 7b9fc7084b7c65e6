"""Which experts a token goes to. Knows nothing of the experts themselves."""

import torch
import triton
import triton.language as tl

from kernels.triton_ops.exact import exact_parts


@triton.jit
def _first_best(scores, index):
    """Position of the highest score, the lowest one on ties, as the smallest `index` that has it."""
    best = tl.max(scores, 0)
    return tl.min(tl.where(scores == best, index, 0x7FFFFFFF), 0)


@triton.jit(do_not_specialize=["num_rows", "splits"])
def _choose_kernel(
    parts_ptr,
    bias_ptr,
    experts_ptr,
    weights_ptr,
    num_rows,
    scale,
    splits,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    KEPT: tl.constexpr,
    CHOSEN: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    PADDED_CHOSEN: tl.constexpr,
):
    """One row: the sum of its parts -> sigmoid -> best groups -> best experts and their weights."""
    row = tl.program_id(0).to(tl.int64)
    groups, members = tl.arange(0, PADDED_GROUPS), tl.arange(0, PADDED_SIZE)
    experts = groups[:, None] * GROUP_SIZE + members[None, :]
    exist = (groups < GROUPS)[:, None] & (members < GROUP_SIZE)[None, :]
    logits = tl.zeros((PADDED_GROUPS, PADDED_SIZE), tl.float32)
    for split in range(splits):
        part_ptr = parts_ptr + (split * num_rows + row) * (GROUPS * GROUP_SIZE)
        logits += tl.load(part_ptr + experts, mask=exist, other=0.0)
    scores = 1.0 / (1.0 + tl.exp(-logits))
    choice = tl.where(exist, scores + tl.load(bias_ptr + experts, mask=exist, other=0.0), float("-inf"))

    best = tl.max(choice, 1)
    where_best = tl.min(tl.where(choice == best[:, None], members[None, :], PADDED_SIZE), 1)
    second = tl.max(tl.where(members[None, :] == where_best[:, None], float("-inf"), choice), 1)
    group_scores = best + second
    kept = groups < 0
    for _ in tl.static_range(KEPT):
        kept = kept | (groups == _first_best(tl.where(kept, float("-inf"), group_scores), groups))
    choice = tl.where(kept[:, None], choice, float("-inf"))

    flat_choice = tl.reshape(choice, PADDED_GROUPS * PADDED_SIZE)
    flat_scores = tl.reshape(scores, PADDED_GROUPS * PADDED_SIZE)
    flat = tl.arange(0, PADDED_GROUPS * PADDED_SIZE)
    picks = tl.arange(0, PADDED_CHOSEN)
    chosen = tl.zeros((PADDED_CHOSEN,), tl.int32)
    weights = tl.zeros((PADDED_CHOSEN,), tl.float32)
    for pick in tl.static_range(CHOSEN):
        where = _first_best(flat_choice, flat)
        chosen = tl.where(picks == pick, where // PADDED_SIZE * GROUP_SIZE + where % PADDED_SIZE, chosen)
        weights = tl.where(picks == pick, tl.sum(tl.where(flat == where, flat_scores, 0.0), 0), weights)
        flat_choice = tl.where(flat == where, float("-inf"), flat_choice)
    weights = weights / tl.sum(weights, 0) * scale
    tl.store(experts_ptr + row * CHOSEN + picks, chosen, mask=picks < CHOSEN)
    tl.store(weights_ptr + row * CHOSEN + picks, weights, mask=picks < CHOSEN)


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
    num_rows, num_experts = len(x), len(weight)
    experts = torch.empty(num_rows, num_chosen, dtype=torch.int32, device=x.device)
    weights = torch.empty(num_rows, num_chosen, dtype=torch.float32, device=x.device)
    if not num_rows:
        return experts, weights
    parts = exact_parts(x, weight)
    group_size = num_experts // num_groups
    _choose_kernel[(num_rows,)](
        parts,
        bias,
        experts,
        weights,
        num_rows,
        scale,
        len(parts),
        GROUPS=num_groups,
        GROUP_SIZE=group_size,
        KEPT=kept_groups,
        CHOSEN=num_chosen,
        PADDED_GROUPS=triton.next_power_of_2(num_groups),
        PADDED_SIZE=triton.next_power_of_2(group_size),
        PADDED_CHOSEN=triton.next_power_of_2(num_chosen),
        num_warps=1,
    )
    return experts, weights
