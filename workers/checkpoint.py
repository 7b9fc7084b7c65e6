"""Writes the files of a DeepSeek-V3.2 checkpoint: config, safetensors shards with their index, tokenizer.

Knows nothing of where the weights come from. `workers.weights` reads them.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from workers.weights import INDEX_FILE

SHARD_BYTES = 3 * 2**20
MAX_TOKENS_IN_TEXT = 131_072  # model_max_length of the published tokenizer

QUANTIZATION_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
GENERATION_CONFIG = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 0.95,
}

# The first three keep their published ids. As in the published tokenizer, only they are "special": left out of plain text.
BOS, EOS, PAD = SPECIAL = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
MARKERS = [
    "<think>",
    THINK_END := "</think>",
    USER := "<｜User｜>",
    ASSISTANT := "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<｜tool▁sep｜>",
    "｜DSML｜",
]


def write_checkpoint(
    folder: str | Path,
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    tensors: Iterable[tuple[str, torch.Tensor]] | None,
) -> None:
    """Writes everything into `folder`, which is made if need be.

    config:  the values of config.json
    tensors: (name, tensor) in file order, linear layers in the form that `config` says; read while they are written. None: no
             weights
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", GENERATION_CONFIG)
    _write_tokenizer(folder, tokenizer)
    if tensors is not None:
        _write_shards(folder, tensors)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = SHARD_BYTES
    for name, tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor
        room -= tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total_size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_TOKENS_IN_TEXT,
    }
    _write_json(folder / "tokenizer_config.json", config)


def build_tokenizer(vocab_size: int, sentences: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens: DeepSeek's markers first, then 256 bytes, then merges.

    The merges are learned from `sentences`. Digits stand alone, and any text survives encoding and decoding.
    """
    named = [*SPECIAL, *MARKERS]
    if vocab_size < len(named) + 256:
        raise ValueError(f"vocab_size is {vocab_size}, but bytes and markers alone take {len(named) + 256}")
    draft = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(named),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    draft.train_from_iterator(sentences, trainer)
    learned = json.loads(draft.to_str())["model"]
    vocab = {token: id for id, token in enumerate(named)}
    vocab |= {token: id + len(named) for token, id in learned["vocab"].items()}
    tokenizer = _byte_level(models.BPE(vocab=vocab, merges=[tuple(merge) for merge in learned["merges"]]))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in MARKERS])
    return tokenizer


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
