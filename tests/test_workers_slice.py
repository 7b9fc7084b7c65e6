"""Random weights of true sizes: their bytes follow from seed and name, and they are scaled as a checkpoint's would be."""

from pathlib import Path

import pytest
import torch

from kernels.reference import dequantize_weight
from workers import tiny
from workers.config import EngineConfig
from workers.model import load_model
from workers.model_config import ModelConfig
from workers.slice import RandomWeights, slice_config
from workers.tiny import write_tiny

FP8, FLOATS = torch.float8_e4m3fn, (torch.bfloat16, torch.float32)
NAME = "model.layers.3.mlp.experts.7.up_proj.weight"


def weights(seed: int = 0) -> RandomWeights:
    return RandomWeights("nowhere", seed=seed, device="cpu")


def test_bytes_follow_from_seed_and_name_alone() -> None:
    first, again, other = weights(), weights(), weights(seed=1)
    again.take("model.norm.weight", (64,), FLOATS)
    matrix = first.take(NAME, (256, 384), (FP8, *FLOATS))
    assert torch.equal(
        matrix.view(torch.uint8), again.take(NAME, (256, 384), (FP8, *FLOATS)).view(torch.uint8)
    )
    for source, name in ((other, NAME), (first, NAME.replace("7", "8"))):
        assert not torch.equal(matrix.float(), source.take(name, (256, 384), (FP8, *FLOATS)).float())


@pytest.mark.parametrize(("name", "gain"), [(NAME, 1.0), (NAME.replace("up", "down"), 0.3)])
def test_matrices_are_as_quantising_would_make_them(name: str, gain: float) -> None:
    source = weights()
    matrix = source.take(name, (320, 512), (FP8, *FLOATS))
    scale = source.take(f"{name}_scale_inv", (3, 4), (torch.float32,))
    assert matrix.dtype == FP8
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert 224 < matrix.float().abs().max() <= 448
    assert dequantize_weight(matrix, scale).std().item() == pytest.approx(gain * 512**-0.5, rel=0.02)


def test_what_is_not_fp8() -> None:
    source = weights()
    table = source.take("model.layers.3.mlp.gate.weight", (32, 512), FLOATS)
    assert (table.dtype, table.std().item()) == (torch.bfloat16, pytest.approx(512**-0.5, rel=0.05))
    norm = source.take("model.norm.weight", (4096,), FLOATS)
    assert (norm.dtype, norm.mean().item()) == (torch.float32, pytest.approx(1, abs=0.01))
    bias = source.take("model.layers.3.mlp.gate.e_score_correction_bias", (4096,), FLOATS)
    assert bias.mean().item() == pytest.approx(0, abs=0.01)
    assert bias.std().item() == pytest.approx(0.1, rel=0.05)


def test_a_model_without_a_checkpoint(tmp_path: Path) -> None:
    write_tiny(tmp_path, weights=False, num_hidden_layers=2)
    assert not list(tmp_path.glob("*safetensors*"))
    models = [load_model(tmp_path, EngineConfig(random_weights=seed)) for seed in (0, 0, 1)]
    embeddings = [model.embed(torch.arange(9)) for model in models]
    assert torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[0], embeddings[2])


def test_the_slice_has_the_true_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [str(tmp_path), "--preset", "v32-slice", "--layers", "5", "--weights", "random"]
    monkeypatch.setattr("sys.argv", ["tiny", *arguments])
    tiny.main()
    config = ModelConfig.load(tmp_path)
    assert (config.hidden_size, config.num_attention_heads, config.index_n_heads) == (7168, 128, 64)
    assert (config.n_routed_experts, config.index_topk, config.vocab_size) == (256, 2048, 129280)
    assert [config.is_moe(layer) for layer in range(5)] == [False] * 3 + [True] * 2
    assert config.cache_layout(quantized=True).token_bytes == 788
    # Every tensor can be made in the shape that the model wants it: no file to look into, no memory taken.
    load_model(tmp_path, EngineConfig(random_weights=0, device="meta"))


@pytest.mark.parametrize("layers", [0, 62])
def test_a_slice_is_no_longer_than_the_model(layers: int) -> None:
    with pytest.raises(ValueError, match=f"layers is {layers}, but must lie in 1 to 61"):
        slice_config(layers)


def test_a_slice_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["tiny", str(tmp_path), "--preset", "v32-slice"])
    with pytest.raises(SystemExit):
        tiny.main()
    assert not list(tmp_path.iterdir())
