"""Writes a complete DeepSeek-V3.2 checkpoint of a few MB with random weights: `python -m workers.tiny DIR`.

With `--preset v32-slice --layers N --weights random` it writes what a model of the true sizes, cut after N layers, needs besides its
weights: `EngineConfig.random_weights` makes those where they are used.

Everything the real one has is there (FP8 blocks, shards and index, MTP layer, tokenizer), so the whole service runs on it. The
scales are chosen so that its output depends on all of a prompt and on what the indexer selects. The same seed gives the
same bytes everywhere: random integers and single roundings only, no function whose last bit depends on the CPU.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from kernels.reference import quantize_weight
from workers import checkpoint
from workers.checkpoint import MARKERS, QUANTIZATION_CONFIG, SPECIAL, write_checkpoint
from workers.model_config import ModelConfig
from workers.slice import HEAD_GAIN, MLP_GAIN, VECTOR_STD, slice_config

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "index_head_dim": 128,
    "index_n_heads": 4,
    "index_topk": 64,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 64,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 64,
    "vocab_size": 512,
}
WORDS = """the a of and to in is it that for on with as was at by this from or an be are not have has had but what all were
when we there can which their will would about out many then them these so some her him make like into time look more
write go see number no way could people my than first water been call who its now find long down day did get come made
may part question answer token page cache worker prompt model request prefix attention"""

# Relative to 1 / sqrt(fan-in).
MARKER_GAIN = 0.3  # of the head's rows for markers: random text should rarely open or close a bracket of the chat format


def write_tiny(
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: Literal["fp8", "bf16"] = "fp8",
    weights: bool = True,
    **config_overrides: Any,
) -> None:
    """Writes config, weights, tokenizer and generation config into `folder`, which is made if need be.

    `weights=False` leaves the weights out. `config_overrides` replace keys of `CONFIG`. Raises ValueError for a config that this
    project does not support.
    """
    config = CONFIG | config_overrides
    if dtype == "fp8":
        config["quantization_config"] = QUANTIZATION_CONFIG
    tensors = _Tensors(ModelConfig.from_json(config), seed=seed, dtype=dtype).all() if weights else None
    write_checkpoint(folder, config, build_tokenizer(config["vocab_size"]), tensors)


class _Tensors:
    """The tensors of a checkpoint, by name, in file order."""

    def __init__(self, config: ModelConfig, *, seed: int, dtype: Literal["fp8", "bf16"]) -> None:
        self._config = config
        self._fp8 = dtype == "fp8"
        self._generator = torch.Generator().manual_seed(seed)

    def all(self) -> Iterator[tuple[str, torch.Tensor]]:
        config = self._config
        yield self._embedding("model.embed_tokens")
        for number in range(config.num_hidden_layers):
            yield from self._layer(f"model.layers.{number}", moe=config.is_moe(number))
        for number in range(config.num_nextn_predict_layers):
            yield from self._mtp_layer(f"model.layers.{config.num_hidden_layers + number}")
        yield self._norm("model.norm", config.hidden_size)
        yield self._head("lm_head")

    def _layer(self, name: str, *, moe: bool) -> Iterator[tuple[str, torch.Tensor]]:
        config = self._config
        yield self._norm(f"{name}.input_layernorm", config.hidden_size)
        yield from self._attention(f"{name}.self_attn")
        yield self._norm(f"{name}.post_attention_layernorm", config.hidden_size)
        if not moe:
            yield from self._mlp(f"{name}.mlp", config.intermediate_size)
            return
        yield self._table(f"{name}.mlp.gate", config.n_routed_experts, config.hidden_size)
        bias = self._uniform((config.n_routed_experts,), VECTOR_STD)
        yield f"{name}.mlp.gate.e_score_correction_bias", bias
        for expert in range(config.n_routed_experts):
            yield from self._mlp(f"{name}.mlp.experts.{expert}", config.moe_intermediate_size)
        yield from self._mlp(
            f"{name}.mlp.shared_experts", config.moe_intermediate_size * config.n_shared_experts
        )

    def _attention(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        config = self._config
        heads, hidden, latent = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
        yield from self._matrix(f"{name}.q_a_proj", config.q_lora_rank, hidden)
        yield self._norm(f"{name}.q_a_layernorm", config.q_lora_rank)
        yield from self._matrix(f"{name}.q_b_proj", heads * config.qk_head_dim, config.q_lora_rank)
        yield from self._matrix(f"{name}.kv_a_proj_with_mqa", latent + config.qk_rope_head_dim, hidden)
        yield self._norm(f"{name}.kv_a_layernorm", latent)
        yield from self._matrix(
            f"{name}.kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), latent
        )
        yield from self._matrix(f"{name}.o_proj", hidden, heads * config.v_head_dim)
        index_heads, index_dim = config.index_n_heads, config.index_head_dim
        yield from self._matrix(f"{name}.indexer.wq_b", index_heads * index_dim, config.q_lora_rank)
        yield from self._matrix(f"{name}.indexer.wk", index_dim, hidden)
        yield self._norm(f"{name}.indexer.k_norm", index_dim)
        yield f"{name}.indexer.k_norm.bias", self._uniform((index_dim,), VECTOR_STD)
        yield self._table(f"{name}.indexer.weights_proj", index_heads, hidden)

    def _mlp(self, name: str, size: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._matrix(f"{name}.gate_proj", size, self._config.hidden_size)
        yield from self._matrix(f"{name}.up_proj", size, self._config.hidden_size)
        yield from self._matrix(f"{name}.down_proj", self._config.hidden_size, size, gain=MLP_GAIN)

    def _mtp_layer(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        hidden = self._config.hidden_size
        yield from self._layer(name, moe=True)
        yield self._embedding(f"{name}.embed_tokens")
        yield self._norm(f"{name}.enorm", hidden)
        yield self._norm(f"{name}.hnorm", hidden)
        yield self._table(f"{name}.eh_proj", hidden, 2 * hidden)
        yield self._norm(f"{name}.shared_head.norm", hidden)
        yield self._head(f"{name}.shared_head.head")

    def _matrix(
        self, name: str, rows: int, columns: int, *, gain: float = 1.0
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """A linear layer: e4m3 with its scales, or bf16."""
        weight = self._uniform((rows, columns), gain * columns**-0.5)
        if not self._fp8:
            yield f"{name}.weight", weight.bfloat16()
            return
        quantized, scale_inv = quantize_weight(weight)
        yield f"{name}.weight", quantized
        yield f"{name}.weight_scale_inv", scale_inv

    def _table(self, name: str, rows: int, columns: int) -> tuple[str, torch.Tensor]:
        """A matrix that stays bf16 in an FP8 checkpoint."""
        return f"{name}.weight", self._uniform((rows, columns), columns**-0.5).bfloat16()

    def _embedding(self, name: str) -> tuple[str, torch.Tensor]:
        return f"{name}.weight", self._uniform(
            (self._config.vocab_size, self._config.hidden_size), 1.0
        ).bfloat16()

    def _head(self, name: str) -> tuple[str, torch.Tensor]:
        config = self._config
        weight = self._uniform((config.vocab_size, config.hidden_size), HEAD_GAIN * config.hidden_size**-0.5)
        weight[len(SPECIAL) : len(SPECIAL) + len(MARKERS)] *= MARKER_GAIN / HEAD_GAIN
        return f"{name}.weight", weight.bfloat16()

    def _norm(self, name: str, size: int) -> tuple[str, torch.Tensor]:
        return f"{name}.weight", 1.0 + self._uniform((size,), VECTOR_STD)

    def _uniform(self, shape: tuple[int, ...], std: float) -> torch.Tensor:
        """fp32, evenly spread over +-std * sqrt(3)."""
        whole = torch.randint(-(2**15), 2**15 + 1, shape, generator=self._generator)
        return whole.float() * (std * 3**0.5 / 2**15)


def build_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens."""
    return checkpoint.build_tokenizer(vocab_size, _sentences())


def _sentences() -> list[str]:
    """A little English for the merges to be learned from."""
    words, chooser = WORDS.split(), random.Random(0)
    return [" ".join(chooser.choices(words, k=12)).capitalize() + ".\n" for _ in range(400)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers.tiny", description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where to write; made if need be")
    parser.add_argument("--preset", choices=("tiny", "v32-slice"), default="tiny", help="sizes of the model")
    parser.add_argument(
        "--layers", type=int, default=4, help="of the slice: 3 dense ones, then mixtures of experts"
    )
    parser.add_argument(
        "--weights", choices=("file", "random"), default="file", help="random: made when the model is loaded"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights in the file")
    parser.add_argument("--dtype", choices=("fp8", "bf16"), default="fp8", help="of the linear layers")
    arguments = parser.parse_args()
    if arguments.preset == "v32-slice" and arguments.weights == "file":
        parser.error("a slice has tens of GB of weights: add --weights random")
    write_tiny(
        arguments.folder,
        seed=arguments.seed,
        dtype=arguments.dtype,
        weights=arguments.weights == "file",
        **(slice_config(arguments.layers) if arguments.preset == "v32-slice" else {}),
    )
    size = sum(path.stat().st_size for path in Path(arguments.folder).iterdir())
    print(f"{arguments.folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
