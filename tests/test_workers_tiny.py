"""The tiny checkpoint: the same bytes from the same seed, everything the real one has, a tokenizer that loses nothing."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

from kernels.reference import dequantize_weight
from workers import tiny
from workers.checkpoint import BOS, EOS, MARKERS, PAD
from workers.model_config import ModelConfig
from workers.tiny import build_tokenizer, write_tiny

FP8, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    write_tiny(tmp_path / "other", seed=1)
    other = contents(tmp_path / "other")
    assert other.keys() == contents(folder).keys()
    same = {name for name, data in contents(folder).items() if data == other[name]}
    assert same == {name for name in other if not name.endswith(".safetensors")}


def test_a_few_megabytes_in_shards(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert len(files) >= 2
    assert index["weight_map"] == {name: file for file, shard in files.items() for name in shard}
    stored = sum(tensor.nbytes for shard in files.values() for tensor in shard.values())
    assert index["metadata"]["total_size"] == stored


def test_every_kind_of_tensor(tensors: dict[str, torch.Tensor]) -> None:
    """Shapes and dtypes as in the published checkpoint, at the tiny sizes."""
    expected = {
        "model.embed_tokens.weight": (BF16, [512, 256]),
        "lm_head.weight": (BF16, [512, 256]),
        "model.norm.weight": (FP32, [256]),
        "model.layers.0.input_layernorm.weight": (FP32, [256]),
        "model.layers.0.post_attention_layernorm.weight": (FP32, [256]),
        "model.layers.0.self_attn.q_a_proj.weight": (FP8, [128, 256]),
        "model.layers.0.self_attn.q_a_layernorm.weight": (FP32, [128]),
        "model.layers.0.self_attn.q_b_proj.weight": (FP8, [512, 128]),
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (FP8, [576, 256]),
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv": (FP32, [5, 2]),
        "model.layers.0.self_attn.kv_a_layernorm.weight": (FP32, [512]),
        "model.layers.0.self_attn.kv_b_proj.weight": (FP8, [512, 512]),
        "model.layers.0.self_attn.o_proj.weight": (FP8, [256, 256]),
        "model.layers.0.self_attn.indexer.wq_b.weight": (FP8, [512, 128]),
        "model.layers.0.self_attn.indexer.wk.weight": (FP8, [128, 256]),
        "model.layers.0.self_attn.indexer.k_norm.weight": (FP32, [128]),
        "model.layers.0.self_attn.indexer.k_norm.bias": (FP32, [128]),
        "model.layers.0.self_attn.indexer.weights_proj.weight": (BF16, [4, 256]),
        "model.layers.0.mlp.gate_proj.weight": (FP8, [512, 256]),
        "model.layers.1.mlp.gate.weight": (BF16, [8, 256]),
        "model.layers.1.mlp.gate.e_score_correction_bias": (FP32, [8]),
        "model.layers.3.mlp.experts.7.gate_proj.weight": (FP8, [64, 256]),
        "model.layers.3.mlp.experts.7.gate_proj.weight_scale_inv": (FP32, [1, 2]),
        "model.layers.3.mlp.experts.7.down_proj.weight": (FP8, [256, 64]),
        "model.layers.3.mlp.shared_experts.up_proj.weight": (FP8, [64, 256]),
        "model.layers.4.eh_proj.weight": (BF16, [256, 512]),
        "model.layers.4.enorm.weight": (FP32, [256]),
        "model.layers.4.hnorm.weight": (FP32, [256]),
        "model.layers.4.embed_tokens.weight": (BF16, [512, 256]),
        "model.layers.4.shared_head.norm.weight": (FP32, [256]),
        "model.layers.4.shared_head.head.weight": (BF16, [512, 256]),
        "model.layers.4.mlp.experts.0.up_proj.weight": (FP8, [64, 256]),
        "model.layers.4.self_attn.indexer.wk.weight_scale_inv": (FP32, [1, 2]),
    }
    assert {name: (tensors[name].dtype, list(tensors[name].shape)) for name in expected} == expected
    assert not any(name.startswith("model.layers.5") for name in tensors)
    scales = {name for name in tensors if name.endswith("_scale_inv")}
    assert scales == {f"{name}_scale_inv" for name, tensor in tensors.items() if tensor.dtype == FP8}
    for name in scales:
        assert torch.equal(torch.frexp(tensors[name]).mantissa, torch.full_like(tensors[name], 0.5)), name


def test_nothing_is_degenerate(tensors: dict[str, torch.Tensor]) -> None:
    assert tensors["model.layers.2.mlp.gate.e_score_correction_bias"].abs().min() > 0
    weight = tensors["model.layers.1.mlp.experts.0.gate_proj.weight"]
    other = tensors["model.layers.1.mlp.experts.1.gate_proj.weight"]
    assert not torch.equal(weight.float(), other.float())
    name = "model.layers.1.self_attn.q_b_proj.weight"
    assert dequantize_weight(tensors[name], tensors[f"{name}_scale_inv"]).std().item() == pytest.approx(
        128**-0.5, rel=0.02
    )


def test_bf16_and_overrides(tmp_path: Path) -> None:
    write_tiny(tmp_path, dtype="bf16", num_hidden_layers=2, vocab_size=300, index_topk=128)
    config = ModelConfig.load(tmp_path)
    assert (config.num_hidden_layers, config.index_topk, config.quantized) == (2, 128, False)
    tensors = {
        name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    assert {tensor.dtype for tensor in tensors.values()} == {BF16, FP32}
    assert tensors["lm_head.weight"].shape == (300, 256)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == 300


def test_unsupported_overrides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hidden_act is 'gelu'"):
        write_tiny(tmp_path, hidden_act="gelu")
    with pytest.raises(ValueError, match="vocab_size is 200, but bytes and markers alone take 271"):
        write_tiny(tmp_path, vocab_size=200)


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["tiny", str(tmp_path / "new" / "folder"), "--seed", "3", "--dtype", "bf16"]
    )
    tiny.main()
    assert "MB" in capsys.readouterr().out
    assert not ModelConfig.load(tmp_path / "new" / "folder").quantized


@given(st.text())
def test_any_text_survives(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


TOKENIZER = build_tokenizer(512)


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n  x", "a  b\t", "héllo 世界 🚀", "\x00\x7f", "e\u0301", f"x{EOS}y<think>z"]
)
def test_awkward_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_markers_are_single_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    config = ModelConfig.load(folder)
    assert tokenizer.token_to_id(BOS) == config.bos_token_id == 0
    assert (tokenizer.token_to_id(EOS),) == config.eos_token_ids == (1,)
    for marker in (BOS, EOS, PAD, *MARKERS):
        ids = tokenizer.encode(f"a{marker}b").ids
        assert ids == [
            *tokenizer.encode("a").ids,
            tokenizer.token_to_id(marker),
            *tokenizer.encode("b").ids,
        ], marker
    dsml = tokenizer.encode("<｜DSML｜invoke>").ids
    assert tokenizer.token_to_id("｜DSML｜") in dsml
    text = f"{BOS}<｜User｜>hi<think>{EOS}"
    assert tokenizer.decode(tokenizer.encode(text).ids) == "<｜User｜>hi<think>"


def test_digits_stand_alone_and_words_do_not(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("1234567890").ids) == 10
    assert len(tokenizer.encode("the question about tokens").ids) < 12
    assert tokenizer.get_vocab_size() == 512
    assert tokenizer.encode("plain text").ids[0] != 0  # the chat encoding adds the BOS itself


def test_transformers_reads_the_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    text = f"{BOS}<｜User｜>1+1=?<｜Assistant｜></think>世界"
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text).ids
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (BOS, EOS, PAD)
