"""The sizes and constants of a DeepSeek-V3.2 model, read from a Hugging Face `config.json`.

A value that Lightship would have to compute differently is refused by name; keys that cannot change the result are ignored.
Knows nothing of tensors, files of weights, or the engine.
"""

import math
from pathlib import Path
from typing import Any, NoReturn, Self

import msgspec

from kernels.layout import QUANT_BLOCK, CacheLayout

# What the layer math takes for granted. A key that is absent has this value in the Hugging Face model too.
_FIXED: dict[str, object] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
}
_QUANTIZATION: dict[str, object] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [QUANT_BLOCK, QUANT_BLOCK],
    "activation_scheme": "dynamic",
}


class YarnScaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`rope_scaling` of type yarn. Equal mscales leave cos and sin unscaled; only the softmax scale feels them."""

    factor: float
    original_max_position_embeddings: int
    mscale: float
    mscale_all_dim: float
    beta_fast: float = 32
    beta_slow: float = 1

    def __post_init__(self) -> None:
        if self.mscale != self.mscale_all_dim or self.mscale <= 0:
            raise ValueError(
                f"rope_scaling has mscale {self.mscale} and mscale_all_dim {self.mscale_all_dim}, "
                "but only equal positive values are supported"
            )
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor is {self.factor}, but must be at least 1")


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Field names are those of `config.json`, except `quantized` (has a quantization_config) and `eos_token_ids`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    intermediate_size: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    n_group: int
    topk_group: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: YarnScaling | None = None
    num_nextn_predict_layers: int = 0
    bos_token_id: int = 0
    eos_token_ids: tuple[int, ...] = ()
    quantized: bool = False

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads `config.json`, and `generation_config.json` for more end-of-sequence ids.

        Raises ValueError, naming the file and the key, for anything missing, malformed or unsupported.
        """
        path = Path(folder) / "config.json"
        raw = _read_json(path)
        try:
            generation = Path(folder) / "generation_config.json"
            return cls.from_json(raw, generation=_read_json(generation) if generation.exists() else None)
        except (msgspec.ValidationError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_json(cls, raw: dict[str, Any], *, generation: dict[str, Any] | None = None) -> Self:
        """From the values of `config.json` and `generation_config.json`. Raises ValueError naming the key."""
        _check_fixed(raw)
        known = _with_rope_scaling(raw) | {
            "quantized": _is_quantized(raw),
            "eos_token_ids": _eos_token_ids([raw, generation or {}]),
        }
        config = msgspec.convert(known, cls)
        _check_layer_types(raw, config)
        return config

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace is {self.first_k_dense_replace}, "
                f"but must lie in 0 to num_hidden_layers {self.num_hidden_layers}"
            )
        if self.kv_lora_rank % QUANT_BLOCK:
            raise ValueError(f"kv_lora_rank is {self.kv_lora_rank}, but must be a multiple of {QUANT_BLOCK}")
        if self.index_head_dim < QUANT_BLOCK or self.index_head_dim & (self.index_head_dim - 1):
            raise ValueError(
                f"index_head_dim is {self.index_head_dim}, but must be a power of two from {QUANT_BLOCK} (Hadamard)"
            )
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim > self.index_head_dim:
            raise ValueError(
                f"qk_rope_head_dim is {self.qk_rope_head_dim}, "
                f"but must be even and at most index_head_dim {self.index_head_dim}"
            )
        self._check_experts()

    def _check_experts(self) -> None:
        per_group, rest = divmod(self.n_routed_experts, self.n_group)
        if rest or per_group < 2:
            raise ValueError(
                f"n_routed_experts is {self.n_routed_experts}, "
                f"but must fill n_group {self.n_group} groups equally with 2 or more"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group is {self.topk_group}, but must be at most n_group {self.n_group}")
        if self.num_experts_per_tok > self.topk_group * per_group:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but topk_group {self.topk_group} groups "
                f"hold only {self.topk_group * per_group} experts"
            )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times m^2 with YaRN: 0.13523378 at the V3.2 sizes. Applied at every length, as in HF."""
        scale = 1 / math.sqrt(self.qk_head_dim)
        if self.rope_scaling is None:
            return scale
        m = 0.1 * self.rope_scaling.mscale_all_dim * math.log(self.rope_scaling.factor) + 1.0
        return scale * m * m

    def is_moe(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace

    def cache_layout(self, quantized: bool) -> CacheLayout:
        return CacheLayout(self.kv_lora_rank, self.qk_rope_head_dim, self.index_head_dim, quantized)


_SIZES = tuple(
    field.name
    for field in msgspec.structs.fields(ModelConfig)
    if field.type is int
    and field.name not in {"first_k_dense_replace", "num_nextn_predict_layers", "bos_token_id"}
)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: not a JSON object: {error}") from error


def _object(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        _refuse(name, value, "a JSON object")
    return value


def _refuse(name: str, value: object, supported: object) -> NoReturn:
    raise ValueError(f"{name} is {value!r}, but only {supported!r} is supported")


def _check_fixed(raw: dict[str, Any]) -> None:
    if raw.get("model_type") != "deepseek_v32":
        _refuse("model_type", raw.get("model_type"), "deepseek_v32")
    for name, supported in _FIXED.items():
        if raw.get(name, supported) != supported:
            _refuse(name, raw[name], supported)
    heads = raw.get("num_attention_heads")
    if raw.get("num_key_value_heads", heads) != heads:
        _refuse("num_key_value_heads", raw["num_key_value_heads"], heads)


def _check_layer_types(raw: dict[str, Any], config: ModelConfig) -> None:
    """Newer config files also spell out the kind of each layer."""
    mlp_types = ["sparse" if config.is_moe(layer) else "dense" for layer in range(config.num_hidden_layers)]
    if raw.get("mlp_layer_types") not in (None, mlp_types):
        _refuse("mlp_layer_types", raw["mlp_layer_types"], mlp_types)
    sparse_attention = {"indexed_attention", "deepseek_sparse_attention"}
    if not set(raw.get("layer_types") or ()) <= sparse_attention:
        _refuse("layer_types", raw["layer_types"], sorted(sparse_attention))


def _is_quantized(raw: dict[str, Any]) -> bool:
    quantization = _object(raw, "quantization_config")
    if not quantization:
        return False
    for name, supported in _QUANTIZATION.items():
        if quantization.get(name) != supported:
            _refuse(f"quantization_config.{name}", quantization.get(name), supported)
    return True


def _with_rope_scaling(raw: dict[str, Any]) -> dict[str, Any]:
    """Brings both spellings to one: rope_theta + rope_scaling (published), or rope_parameters (transformers 5)."""
    old, new = _object(raw, "rope_scaling"), _object(raw, "rope_parameters")
    if old and new:
        raise ValueError("rope_scaling and rope_parameters are both given, but only one of them is supported")
    scaling = {name: value for name, value in (old or new).items() if value is not None}
    rope_theta = scaling.pop("rope_theta", raw.get("rope_theta"))
    kinds = {scaling.pop("type", None), scaling.pop("rope_type", None)} - {None}
    if kinds <= {"default"} and not scaling:
        return raw | {"rope_theta": rope_theta, "rope_scaling": None}
    if kinds != {"yarn"}:
        _refuse("rope_scaling.type", " and ".join(sorted(kinds)), "yarn")
    return raw | {"rope_theta": rope_theta, "rope_scaling": scaling}


def _eos_token_ids(sources: list[dict[str, Any]]) -> tuple[int, ...]:
    """In order, without repeats. The key holds one id or a list of them."""
    values = [source.get("eos_token_id") for source in sources]
    ids = [
        id for value in values if value is not None for id in (value if isinstance(value, list) else [value])
    ]
    return tuple(dict.fromkeys(ids))
