"""How long prefill and decode take on a worker of several GPUs: what one H200 was measured to need, divided as the ranks divide it.

Every time that this module gives is an extrapolation: no GPU holds all 61 layers, so a slice of 4 (3 dense, 1 MoE) was measured and
T(61) = rest + 3 x dense layer + 58 x MoE layer; several ranks are computed, not measured. Pure arithmetic; knows nothing of memory.
"""

import bisect
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from workers.model_config import ModelConfig

K = 1024
DENSE_LAYERS, MOE_LAYERS = 3, 58


class Prefill(NamedTuple):
    tokens: int
    slice_ms: float  # 4 layers
    whole_ms: float  # 61 layers, by the formula


class Decode(NamedTuple):
    context: int
    batch: int
    slice_ms: float
    whole_ms: float


# docs/benchmarks.md, "The engine at true sizes on one H200": FP8 caches, our own kernels, chunks of 8,192 tokens.
PREFILL = (
    Prefill(4 * K, 32.8, 647),
    Prefill(8 * K, 80.5, 1448),
    Prefill(32 * K, 388, 6844),
    Prefill(64 * K, 920, 15975),
    Prefill(128 * K, 2263, 38263),
)
DECODE = (
    Decode(4 * K, 8, 2.11, 49.0),
    Decode(4 * K, 32, 3.01, 87.8),
    Decode(4 * K, 64, 3.48, 105.0),
    Decode(32 * K, 8, 2.21, 49.2),
    Decode(32 * K, 32, 3.20, 89.7),
    Decode(32 * K, 64, 3.82, 110.0),
    Decode(128 * K, 1, 1.66, 20.7),
    Decode(128 * K, 8, 2.36, 51.4),
    Decode(128 * K, 32, 3.69, 96.7),
    Decode(128 * K, 64, 4.83, 125.9),
)
HOST_MS = 0.45  # of a decode step of 32 rows, that the GPU waits for scheduler and sampler (same page)
HEAD_MS = 0.42  # of a decode step, the language head (docs/kernels.md, "Where the time of a step goes")
GATE_MS = 0.045  # choosing the experts of 512 tokens (docs/kernels.md, "Norms, SwiGLU, gate, quantisers")
WEIGHTS_GB_S = (
    4100.0  # at which experts are read in decode: 96 % of 4,290 (docs/kernels.md, "fp8_linear, expert_mlp")
)
EXCHANGE_MS = (
    0.048  # a MoE layer's gather and way back in a CUDA graph, 32 rows, two GPUs ("Between two GPUs")
)
GATHER_GB_S = 228.0  # all-gather of 4,096 rows of bf16: 58.7 MB in 258 us, two GPUs
RETURN_GB_S = 278.0  # all-to-all of fp32 sums, two GPUs
LINK_GB_S = 6.0  # one pair's shipping over NCCL, the lower of 6 to 9 (docs/shipping.md)
GATEWAY_MS = 5.0  # what the gateway may add to TTFT (docs/benchmarks.md, "What the gateway costs")


@dataclass(frozen=True)
class PrefillTime:
    compute_ms: float
    exchange_ms: float

    @property
    def total_ms(self) -> float:
        return self.compute_ms + self.exchange_ms


@dataclass(frozen=True)
class StepTime:
    """A decode step by part."""

    attention_ms: float  # of all layers: projections, indexer, selection, sparse attention
    dense_ms: float  # the MLPs of the dense layers
    experts_ms: float
    exchange_ms: float
    head_ms: float
    host_ms: float

    @property
    def total_ms(self) -> float:
        return sum(vars(self).values())


def applies_to(model: ModelConfig, v32: ModelConfig) -> bool:
    """Whether the measurements say anything of this model: its sizes are those that were measured."""
    ignored = {
        "quantized",
        "eos_token_ids",
        "bos_token_id",
        "num_nextn_predict_layers",
        "max_position_embeddings",
    }
    return all(getattr(model, f) == getattr(v32, f) for f in model.__struct_fields__ if f not in ignored)


def prompt_ms(tokens: int) -> float:
    """All 61 layers of a prompt on one GPU. Between the measured lengths the mean cost of a token is interpolated, beyond them
    it goes on as between the last two."""
    lengths = [m.tokens for m in PREFILL]
    costs = [m.whole_ms / m.tokens for m in PREFILL]
    if tokens <= lengths[0]:
        return tokens * costs[0]
    right = min(bisect.bisect_left(lengths, tokens), len(lengths) - 1)
    left = right - 1
    slope = (costs[right] - costs[left]) / (lengths[right] - lengths[left])
    return tokens * (costs[left] + slope * (tokens - lengths[left]))


def prefill_time(model: ModelConfig, tokens: int, cached: int, ranks: int) -> PrefillTime:
    """Of a prompt whose first `cached` tokens are in the worker's caches: the later chunks of the whole, over the ranks evenly.

    What ranks send each other is counted in full, though part of it overlaps with work.
    """
    compute = (prompt_ms(tokens) - prompt_ms(cached)) / ranks
    others = (tokens - cached) * (ranks - 1) / ranks
    layout = model.cache_layout(quantized=True)
    gathered = model.num_hidden_layers * (layout.token_bytes + 8) + MOE_LAYERS * model.hidden_size * 2
    returned = MOE_LAYERS * model.hidden_size * 4
    return PrefillTime(compute, others * (gathered / GATHER_GB_S + returned / RETURN_GB_S) / 1e6)


def attention_ms(context: int, batch: float) -> float:
    """One layer's attention in a decode step of one GPU: c0 + c1 x batch + c2 x batch x context, fitted to what was measured."""
    c0, c1, c2 = _ATTENTION
    return float(c0 + c1 * batch + c2 * batch * context)


def step_time(model: ModelConfig, context: int, batch: float, ranks: int) -> StepTime:
    """A decode step in which every rank has `batch` requests of so many tokens. Experts are read as if every token chose its own
    at random, the most that can be."""
    layer = attention_ms(context, batch)
    expert_bytes = 3 * model.hidden_size * model.moe_intermediate_size
    chosen = model.num_experts_per_tok / model.n_routed_experts
    touched = model.n_routed_experts * (1 - (1 - chosen) ** (batch * ranks)) / ranks
    read = (touched + model.n_shared_experts) * expert_bytes / WEIGHTS_GB_S / 1e6
    others = batch * (ranks - 1)
    sent = others * model.hidden_size * (2 / GATHER_GB_S + 4 / RETURN_GB_S) / 1e6
    return StepTime(
        attention_ms=layer * model.num_hidden_layers,
        dense_ms=DENSE_LAYERS * _dense_mlp_ms(model.hidden_size, model.intermediate_size),
        experts_ms=MOE_LAYERS * (read + GATE_MS),
        exchange_ms=MOE_LAYERS * (EXCHANGE_MS + sent) if ranks > 1 else 0.0,
        head_ms=HEAD_MS,
        host_ms=HOST_MS,
    )


def ship_ms(num_bytes: int, ranks: int) -> float:
    """Every rank of a prefill worker sends its share over a pair of its own."""
    return num_bytes / ranks / LINK_GB_S / 1e6


def queue_ms(service_ms: float, utilisation: float, workers: int) -> float:
    """Mean wait in front of `workers` alike servers: random arrivals, services of one length (Sakasegawa's approximation)."""
    if utilisation >= 1:
        return float("inf")
    return utilisation ** (np.sqrt(2 * (workers + 1)) - 1) / (workers * (1 - utilisation)) * service_ms / 2


def moe_layer_ms(measured: Prefill | Decode) -> float:
    """whole = rest + 3 dense + 58 MoE, slice = rest + 3 dense + 1 MoE."""
    return (measured.whole_ms - measured.slice_ms) / (MOE_LAYERS - 1)


def _dense_mlp_ms(hidden: int, intermediate: int) -> float:
    """Bound by reading the weights."""
    return 3 * hidden * intermediate / WEIGHTS_GB_S / 1e6


def _fit_attention() -> tuple[float, float, float]:
    """Least squares over what is left of a dense layer when its MLP is taken off."""
    times = [
        (m.slice_ms - moe_layer_ms(m) - HEAD_MS) / DENSE_LAYERS - _dense_mlp_ms(7168, 18432) for m in DECODE
    ]
    rows = [(1.0, m.batch, m.batch * m.context) for m in DECODE]
    c0, c1, c2 = np.linalg.lstsq(np.array(rows), np.array(times), rcond=None)[0]
    return float(c0), float(c1), float(c2)


_ATTENTION = _fit_attention()
