"""The config reader: published values come out right, and whatever would change the math is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from workers.checkpoint import QUANTIZATION_CONFIG
from workers.model_config import ModelConfig
from workers.tiny import CONFIG

PUBLISHED = CONFIG | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "n_routed_experts": 256,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "quantization_config": QUANTIZATION_CONFIG,
}


def load(folder: Path, raw: dict[str, Any] = PUBLISHED, **overrides: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(raw | overrides))
    return ModelConfig.load(folder)


def test_published_values(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.softmax_scale == pytest.approx(0.13523378, abs=1e-8)
    assert config.qk_head_dim == 192
    assert [config.is_moe(layer) for layer in (0, 2, 3, 60)] == [False, False, True, True]
    assert config.quantized
    assert config.eos_token_ids == (1,)
    assert config.cache_layout(quantized=True).token_bytes == 788
    assert config.cache_layout(quantized=False).token_bytes == 4 * (576 + 128)
    assert config.max_position_embeddings == 163840


def test_without_yarn_the_softmax_scale_is_plain(tmp_path: Path) -> None:
    config = load(tmp_path, rope_scaling=None)
    assert config.rope_scaling is None
    assert config.softmax_scale == pytest.approx(192**-0.5)


def test_both_spellings_of_rope_mean_the_same(tmp_path: Path) -> None:
    published = load(tmp_path)
    scaling = dict(PUBLISHED["rope_scaling"])
    scaling["rope_type"] = scaling.pop("type")
    raw = {name: value for name, value in PUBLISHED.items() if name not in ("rope_scaling", "rope_theta")}
    assert load(tmp_path, raw, rope_parameters=scaling | {"rope_theta": 10000}) == published
    plain = load(tmp_path, raw, rope_parameters={"rope_type": "default", "rope_theta": 10000})
    assert plain == load(tmp_path, rope_scaling=None)


def test_end_of_sequence_ids_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 1, 9]}')
    assert load(tmp_path).eos_token_ids == (1, 7, 9)
    assert load(tmp_path, eos_token_id=None).eos_token_ids == (7, 1, 9)


def test_keys_that_cannot_change_the_result_are_ignored(tmp_path: Path) -> None:
    assert load(tmp_path, use_cache=False, something_new={"a": 1}, ep_size=8) == load(tmp_path)
    types = {"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58, "layer_types": ["indexed_attention"] * 61}
    assert load(tmp_path, **types) == load(tmp_path)


YARN = PUBLISHED["rope_scaling"]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "deepseek_v3"}, "model_type is 'deepseek_v3', but only 'deepseek_v32' is supported"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but only 'silu'"),
    ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
    ({"norm_topk_prob": False}, "norm_topk_prob is False"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ({"num_key_value_heads": 8}, "num_key_value_heads is 8, but only 128"),
    ({"mlp_layer_types": ["sparse"] * 61}, "mlp_layer_types is"),
    ({"layer_types": ["full_attention"] * 61}, "layer_types is"),
    ({"rope_scaling": YARN | {"type": "linear"}}, "rope_scaling.type is 'linear', but only 'yarn'"),
    ({"rope_scaling": YARN | {"rope_type": "llama3"}}, "rope_scaling.type is 'llama3 and yarn'"),
    ({"rope_scaling": YARN | {"mscale": 0.7}}, "mscale 0.7 and mscale_all_dim 1.0"),
    ({"rope_scaling": YARN | {"mscale": 0, "mscale_all_dim": 0}}, "only equal positive values"),
    ({"rope_scaling": YARN | {"mscale": None}}, "mscale"),
    ({"rope_scaling": YARN | {"attention_factor": 2.0}}, "attention_factor"),
    ({"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling.factor is 0.5"),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', but only 'a JSON object'"),
    ({"rope_parameters": YARN}, "rope_scaling and rope_parameters are both given"),
    ({"quantization_config": "fp8"}, "quantization_config is 'fp8'"),
    ({"quantization_config": QUANTIZATION_CONFIG | {"quant_method": "awq"}}, "quant_method is 'awq'"),
    ({"quantization_config": QUANTIZATION_CONFIG | {"fmt": "e5m2"}}, "fmt is 'e5m2'"),
    ({"quantization_config": QUANTIZATION_CONFIG | {"scale_fmt": None}}, "scale_fmt is None"),
    ({"quantization_config": QUANTIZATION_CONFIG | {"weight_block_size": [1, 128]}}, "weight_block_size"),
    ({"quantization_config": QUANTIZATION_CONFIG | {"activation_scheme": "static"}}, "activation_scheme"),
    ({"kv_lora_rank": 500}, "kv_lora_rank is 500, but must be a multiple of 128"),
    ({"index_head_dim": 384}, "index_head_dim is 384"),
    ({"index_head_dim": 64}, "index_head_dim is 64"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63"),
    ({"qk_rope_head_dim": 256}, "qk_rope_head_dim is 256"),
    ({"n_group": 7}, "n_routed_experts is 256"),
    ({"n_group": 256}, "with 2 or more"),
    ({"topk_group": 9}, "topk_group is 9"),
    ({"topk_group": 1, "num_experts_per_tok": 33}, "num_experts_per_tok is 33"),
    ({"first_k_dense_replace": 62}, "first_k_dense_replace is 62"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"q_lora_rank": None}, "q_lora_rank"),
    ({"hidden_size": "7168"}, "hidden_size"),
]


@pytest.mark.parametrize(("override", "sentence"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_by_name(tmp_path: Path, override: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="config.json") as caught:
        load(tmp_path, **override)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "name", ["hidden_size", "index_topk", "rope_theta", "routed_scaling_factor", "model_type"]
)
def test_a_missing_key_is_named(tmp_path: Path, name: str) -> None:
    raw = {key: value for key, value in PUBLISHED.items() if key != name}
    with pytest.raises(ValueError, match=name):
        load(tmp_path, raw)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: cannot be read"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not a JSON object"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: not a JSON object"):
        ModelConfig.load(tmp_path)
