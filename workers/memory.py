"""How the memory of one GPU is shared out: weights, then what a step needs, then pages with all the rest.

Sizes only; knows nothing of tensors or of how much memory a device has. The formulas are upper bounds of what the operators keep at
the same time, so that no request, once accepted, ends for want of memory.
"""

from dataclasses import astuple, dataclass

from kernels.layout import PAGE_SIZE, CacheLayout
from workers.config import EngineConfig
from workers.model_config import ModelConfig

EXPANDED_TOKENS = 8192  # at most, whose keys and values of each head a step may make
SCORE_BYTES = 2**30  # index scores of as many rows as fit, and what choosing among them takes
GRAPH_BYTES = 2**30  # decode graphs: their own activations and the driver's copies of every launch
SHIPPING_BYTES = (
    2**29
)  # buffers packed, sent or received and not yet answered: those of two pairs at their busiest
RESERVE_BYTES = (
    2**31
)  # the driver, the library of collectives, and what the allocator cannot use for its fragments
_ACTIVATION = 2  # bf16


@dataclass(frozen=True)
class Workspace:
    """Bytes that a step may need, beside weights and pages."""

    activations: int
    latents: int
    expanded: int
    scores: int
    logits: int
    graphs: int
    shipping: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


def workspace(model: ModelConfig, engine: EngineConfig) -> Workspace:
    """What a GPU's step takes: max_batched_tokens rows, of which max_running have logits."""
    context = engine.max_context or model.max_position_embeddings
    latent_width = model.kv_lora_rank + model.qk_rope_head_dim
    head_width = model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim)
    # Logits in fp32; a draw sorts them in fp64 with their ids, and keeps probabilities and their sums.
    logits_row = model.vocab_size * (4 + 6 * 8)
    return Workspace(
        activations=engine.max_batched_tokens * row_bytes(model),
        latents=context * latent_width * _ACTIVATION,
        expanded=EXPANDED_TOKENS * head_width * _ACTIVATION,
        scores=SCORE_BYTES,
        logits=engine.max_running * logits_row,
        graphs=GRAPH_BYTES,
        shipping=SHIPPING_BYTES,
    )


def row_bytes(model: ModelConfig) -> int:
    """Activations of one row at the widest place of a layer; x, the residual and one norm live through all of it."""
    heads = model.num_attention_heads
    latent_width = model.kv_lora_rank + model.qk_rope_head_dim
    projected = heads * model.qk_head_dim + model.index_n_heads * model.index_head_dim
    # The projection, the absorbed query and its parts, the output over latents.
    attention = projected + 2 * heads * latent_width + heads * model.kv_lora_rank
    picks = model.num_experts_per_tok + model.n_shared_experts
    # A pick's input, its gate and up products, their product, its output.
    experts = picks * (2 * model.hidden_size + 3 * model.moe_intermediate_size)
    dense = 3 * model.intermediate_size
    return _ACTIVATION * (4 * model.hidden_size + max(attention, experts, dense))


def num_pages(
    free_bytes: int, model: ModelConfig, engine: EngineConfig, layout: CacheLayout, weight_bytes: int
) -> int:
    """Pages for the caches of one GPU, over all layers.

    free_bytes: of the device once the weights, weight_bytes, are on it
    ValueError, saying what would fit, if `engine.cache_bytes` is more than is left, or if not one page is left.
    """
    needed = workspace(model, engine)
    left = free_bytes - RESERVE_BYTES - needed.total
    page_bytes = layout.page_bytes * model.num_hidden_layers
    wanted = page_bytes if engine.cache_bytes is None else engine.cache_bytes
    if left < wanted:
        raise ValueError(_refusal(wanted, left, needed, page_bytes, weight_bytes, model, engine))
    return (left if engine.cache_bytes is None else engine.cache_bytes) // page_bytes


def _refusal(
    wanted: int,
    left: int,
    needed: Workspace,
    page_bytes: int,
    weight_bytes: int,
    model: ModelConfig,
    engine: EngineConfig,
) -> str:
    beside = (
        f"beside weights of {_gb(weight_bytes)} and a workspace of {_gb(needed.total)} for max_batched_tokens "
        f"{engine.max_batched_tokens} and max_running {engine.max_running}"
    )
    if left >= page_bytes:
        return (
            f"cache_bytes is {wanted}, but {beside} the device has room for {left}: "
            f"{left // page_bytes * PAGE_SIZE} tokens in {model.num_hidden_layers} layers"
        )
    fits = (left - wanted + needed.activations) // row_bytes(model)
    remedy = f"max_batched_tokens {fits} would fit" if fits > 0 else "no max_batched_tokens is small enough"
    return f"{beside} the device has no room for caches of {_gb(wanted)}: {remedy}"


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
