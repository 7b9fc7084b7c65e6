"""DeepSeek-V3.2: embedding, layers, head; the forward pass in reading order. Knows nothing of requests or sampling.

The MTP layer (number num_hidden_layers) is stored in checkpoints but not part of this model.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels import dispatch
from kernels.dispatch import Ops, Sizes
from kernels.layout import CacheLayout
from kernels.rows import Rows
from workers.attention import Attention
from workers.config import EngineConfig
from workers.group import ALONE, Group
from workers.layers import MLP, RMSNorm
from workers.model_config import ModelConfig
from workers.moe import MoE
from workers.paged_cache import PagedCache
from workers.rope import Rope, RopeTable
from workers.slice import RandomWeights
from workers.weights import Checkpoint, Progress, Weights

Attend = Callable[  # x, rope, rows, slots, latent pages, index pages, on_selected, as for Attention
    [
        torch.Tensor,
        Rope,
        Rows,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        Callable[[torch.Tensor], None] | None,
    ],
    torch.Tensor,
]


@dataclass(frozen=True)
class Layer:
    """Carries the residual stream: x is what the layer before added to it, and has not been added yet."""

    attention_norm: RMSNorm
    attention: Attend
    mlp_norm: RMSNorm
    mlp: MLP | MoE

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        rope: Rope,
        rows: Rows,
        slots: torch.Tensor,
        latent_pages: torch.Tensor,
        index_pages: torch.Tensor,
        on_selected: Callable[[torch.Tensor], None] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.attention_norm.add(x, residual)
        x = self.attention(x, rope, rows, slots, latent_pages, index_pages, on_selected)
        x, residual = self.mlp_norm.add(x, residual)
        return self.mlp(x), residual


class Model:
    """One rank's model: everything but the experts of other ranks.

    layout: the caches it reads and writes
    dtype:  of activations between layers
    layers: as many as there are caches
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        *,
        layout: CacheLayout,
        absorbed: bool,
        device: str,
        group: Group = ALONE,
    ) -> None:
        self.config = config
        self.layout = layout
        self.dtype = weights.dtype
        self.device = device
        self._group = group
        self.ops = weights.ops
        body = weights.at("model")
        self._rope_table = RopeTable(
            config.qk_rope_head_dim,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
            max_positions=config.max_position_embeddings,
            device=device,
        )
        self._embedding = body.table("embed_tokens", config.vocab_size, config.hidden_size, self.dtype)
        self.layers = [
            _load_layer(
                config,
                body,
                number,
                layout=layout,
                absorbed=absorbed,
                on_gpu=device.startswith("cuda"),
                group=group,
            )
            for number in range(config.num_hidden_layers)
        ]
        self._norm = body.rms_norm("norm", config.hidden_size, config.rms_norm_eps)
        self._head = weights.table("lm_head", config.vocab_size, config.hidden_size, self.dtype)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] -> [T, D]: what the first layer reads."""
        return self._embedding[token_ids]

    def rope(self, positions: torch.Tensor) -> Rope:
        """int64 [T] -> what turns the rows at these positions."""
        return self._rope_table.at(positions)

    def with_layers(self, layers: Sequence[Layer]) -> "Model":
        """The same model with other layers, for experiments."""
        other = copy.copy(self)
        other.layers = list(layers)
        return other

    @torch.inference_mode()
    def forward(
        self,
        token_ids: torch.Tensor,
        rows: Rows,
        slots: torch.Tensor,
        cache: PagedCache,
        logits_rows: torch.Tensor,
        on_selected: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Runs T rows and writes their caches.

        token_ids:   int64 [T]
        slots:       int64 [T], physical page x 64 + offset: where each row's caches go
        logits_rows: int64 [S], the rows whose logits are wanted
        on_selected: called layer after layer with the slots that the indexer selected, int32 [T, topk], -1 padded
        Returns fp32 [S, vocab_size]; of several ranks, the first has the logits of all, rank after rank, the others none.
        """
        x = self.embed(token_ids)
        residual = torch.zeros_like(x)
        rope = self.rope(rows.positions)
        for layer, latent_pages, index_pages in zip(self.layers, cache.latent, cache.index, strict=True):
            x, residual = layer(x, residual, rope, rows, slots, latent_pages, index_pages, on_selected)
        x, _ = self._norm.add(x[logits_rows], residual[logits_rows])
        if len(x):
            x = self._group.all_gather(x).wait()
        if self._group.rank:
            x = x[:0]
        return self.ops.linear(x, self._head, torch.float32)


def _load_layer(
    config: ModelConfig,
    weights: Weights,
    number: int,
    *,
    layout: CacheLayout,
    absorbed: bool,
    group: Group,
    on_gpu: bool,
) -> Layer:
    layer = weights.at(f"layers.{number}")
    mlp = layer.at("mlp")
    return Layer(
        attention_norm=layer.rms_norm("input_layernorm", config.hidden_size, config.rms_norm_eps),
        attention=Attention(
            config,
            layer.at("self_attn"),
            layout=layout,
            absorbed=absorbed,
            dense_if_short=absorbed and on_gpu,
            group=group,
        ),
        mlp_norm=layer.rms_norm("post_attention_layernorm", config.hidden_size, config.rms_norm_eps),
        mlp=MoE(config, mlp, group)
        if config.is_moe(number)
        else mlp.mlp(config.hidden_size, config.intermediate_size),
    )


def load_model(
    path: str | Path,
    engine_config: EngineConfig,
    *,
    ops: Ops | None = None,
    progress: Progress | None = None,
    group: Group = ALONE,
) -> Model:
    """Reads a Hugging Face checkpoint folder; with `engine_config.random_weights` only its config. `ops`: other operators than
    those of the back end. `group`: the ranks that share the model; the experts of the others are not read.

    `progress` is called with (tensors read, tensors in all). On device "meta" nothing but the files' headers is read, to see
    whether every tensor is there in its right shape. Raises ValueError for a config that is not supported and
    CheckpointError for files that do not hold the model, naming the file and the tensor.
    """
    config = ModelConfig.load(path)
    layout = config.cache_layout(quantized=engine_config.precision == "fp8")
    sizes = Sizes(config.num_attention_heads, config.index_n_heads, config.index_topk, layout)
    full_precision = engine_config.precision == "fp32" or engine_config.device == "cpu"
    with _source(path, config, engine_config, progress) as checkpoint:
        weights = Weights(
            checkpoint,
            ops or dispatch.choose(engine_config.device, sizes, engine_config.kernels),
            precision=engine_config.precision,
            dtype=torch.float32 if full_precision else torch.bfloat16,
            quantized=config.quantized,
        )
        model = Model(
            config,
            weights,
            layout=layout,
            absorbed=engine_config.attention == "absorbed",
            device=engine_config.device,
            group=group,
        )
        checkpoint.finish()
    return model


def _source(
    path: str | Path, config: ModelConfig, engine_config: EngineConfig, progress: Progress | None
) -> Checkpoint | RandomWeights:
    if engine_config.random_weights is not None:
        return RandomWeights(path, seed=engine_config.random_weights, device=engine_config.device)
    mtp_layers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    return Checkpoint(
        path,
        device=engine_config.device,
        ignored_prefixes=[f"model.layers.{number}." for number in mtp_layers],
        ignored_suffixes=["rotary_emb.inv_freq"],
        progress=progress,
    )
