"""What `kernels.bench` measures: for every operator its shapes, its work, its inputs, and whom to compare it with.

A problem is made when its turn comes, from the generators of kernels.testing, and dropped afterwards. Peers get every help: FP8
queries and contiguous keys or latents that our operator has to make itself.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from kernels.bench_timing import Call, sets_beyond_cache
from kernels.dispatch import Ops
from kernels.testing import LAYOUTS

LAYOUT = LAYOUTS["fp8"]


@dataclass(frozen=True)
class Setting:
    """back_ends: those that are measured, ours first. flash_mla, deep_gemm: the packages, None where they are not there."""

    device: torch.device
    small: bool  # shapes for a test on a CPU, which say nothing about speed
    back_ends: dict[str, Ops]
    flash_mla: ModuleType | None = None
    deep_gemm: ModuleType | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def sets(self, num_bytes: float) -> int:
        """How many sets of inputs take turns, if each has so many bytes."""
        return 2 if self.small else sets_beyond_cache(num_bytes)

    def having(self, operator: str) -> dict[str, Ops]:
        """The back ends that have an operator."""
        return {name: ops for name, ops in self.back_ends.items() if hasattr(ops, operator)}

    def calls(self, operator: str, call: Callable[[Ops, int], object]) -> dict[str, Call]:
        """The same call for every back end that has the operator."""
        return {name: functools.partial(call, ops) for name, ops in self.having(operator).items()}


@dataclass(frozen=True)
class Problem:
    """One operator at one shape.

    flop, bytes: the least work there is, with every input read once and every output written once
    flop_kind:   bf16 or fp8, the unit that does it
    calls:       by name, ours first; each takes the number of one of `sets` sets of inputs
    error:       how far a call's result on set 0 is from the reference: kernels.testing.difference, or 1 - overlap
    """

    operator: str
    shape: str
    flop: float
    flop_kind: str
    bytes: float
    calls: dict[str, Call]
    sets: int
    error: Callable[[Any], float]
    replayed: bool = True  # whether a CUDA graph can hold the calls; where they are short, one does


Maker = Callable[[], Problem]
