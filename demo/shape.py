"""The sizes of the demonstration model: DeepSeek-V3.2 in every part, small in every number that a kernel does not fix."""

from typing import Any

from demo.tokenizer import VOCAB_SIZE
from workers import tiny
from workers.checkpoint import QUANTIZATION_CONFIG

CONFIG: dict[str, Any] = tiny.CONFIG | {
    "index_n_heads": 2,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "n_shared_experts": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 256,
    "v_head_dim": 32,
    "vocab_size": VOCAB_SIZE,
}
FP8_CONFIG: dict[str, Any] = CONFIG | {"quantization_config": QUANTIZATION_CONFIG}
