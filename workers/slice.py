"""The first layers of a model of DeepSeek-V3.2's true sizes, with random weights that are made where they are used.

The whole model does not fit a few GPUs and a slice of it is tens of GB, so no file holds its weights: every tensor comes from a
seed and its own name. The same seed, name and kind of device give the same bytes, on every rank. Knows nothing of the forward
pass.
"""

import hashlib
import math
from collections.abc import Container
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from kernels.reference.quant import E4M3_MAX

V32: dict[str, Any] = {
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 129280,
}

# Standard deviations, relative to 1 / sqrt(fan-in).
MLP_GAIN = 0.3  # of the last matrix: where FP8 rounding tips a choice of experts, not everything changes
HEAD_GAIN = 3.0  # logits spread by about 3: at temperature 1 neither greedy nor uniform
VECTOR_STD = 0.1  # of norms around one, of biases around zero
_FP8 = torch.float8_e4m3fn


def slice_config(num_layers: int) -> dict[str, Any]:
    """What differs from `workers.tiny.CONFIG` in a slice of so many layers. ValueError if there are not so many."""
    if not 1 <= num_layers <= V32["num_hidden_layers"]:
        raise ValueError(f"layers is {num_layers}, but must lie in 1 to {V32['num_hidden_layers']}")
    dense = min(V32["first_k_dense_replace"], num_layers)
    return V32 | {"num_hidden_layers": num_layers, "first_k_dense_replace": dense}


class RandomWeights:
    """In the place of `workers.weights.Checkpoint`: tensors that nobody has stored, made when they are taken.

    Numbers are evenly spread. An FP8 matrix is what quantising such numbers would give: its blocks all have the one scale.
    """

    def __init__(self, folder: str | Path, *, seed: int, device: str) -> None:
        """folder: of the config, for messages."""
        self.folder = Path(folder)
        self._seed = seed
        self._device = device
        # On "meta" only shapes are asked for.
        self._generator = torch.Generator("cpu" if device == "meta" else device)
        self._scales: dict[str, float] = {}  # of FP8 matrices that were taken

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._scales.clear()

    def take(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
        """A matrix is e4m3 where that is allowed, otherwise bf16; vectors and scales are fp32."""
        if name.endswith("_scale_inv"):
            scale = self._scales.pop(name.removesuffix("_scale_inv"))
            return torch.full(shape, scale, dtype=torch.float32, device=self._device)
        if len(shape) == 1:
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            return self._uniform(name, shape, VECTOR_STD * math.sqrt(3)).add_(centre)
        limit = _standard_deviation(name, shape[1]) * math.sqrt(3)
        if _FP8 not in dtypes:
            return self._uniform(name, shape, limit).bfloat16()
        scale = 2.0 ** math.ceil(math.log2(limit / E4M3_MAX))
        self._scales[name] = scale
        return self._uniform(name, shape, limit / scale).to(_FP8)

    def leave(self, prefix: str, children: Container[str]) -> None:
        """What nobody takes is never made."""

    def finish(self) -> None:
        """Nothing is stored, so nothing can be left over."""

    def _uniform(self, name: str, shape: tuple[int, ...], limit: float) -> torch.Tensor:
        """fp32, evenly spread over +-limit."""
        digest = hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=8).digest()
        self._generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        empty = torch.empty(shape, dtype=torch.float32, device=self._device)
        return empty if self._device == "meta" else empty.uniform_(-limit, limit, generator=self._generator)


def _standard_deviation(name: str, columns: int) -> float:
    if name.endswith("embed_tokens.weight"):
        return 1.0
    gains = {"down_proj.weight": MLP_GAIN, "lm_head.weight": HEAD_GAIN}
    return next((gain for end, gain in gains.items() if name.endswith(end)), 1.0) / math.sqrt(columns)
