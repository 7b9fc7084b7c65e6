"""Loading a checkpoint: each tensor once, in either precision, and every way it can be wrong names file and tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from workers.config import EngineConfig
from workers.model import load_model
from workers.tiny import write_tiny
from workers.weights import INDEX_FILE, SINGLE_FILE, Checkpoint, CheckpointError

Tensors = dict[str, torch.Tensor]
SMALL = {
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 4096,
    "vocab_size": 300,
}
FP32 = EngineConfig(precision="fp32")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_tiny(folder, **SMALL)
    return folder


@pytest.fixture(scope="module")
def tensors(whole: Path) -> Tensors:
    return {
        name: tensor
        for file in sorted(whole.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.fixture
def folder(tmp_path: Path, whole: Path, tensors: Tensors) -> Path:
    """A checkpoint in two shards, for a test to break."""
    shutil.copy(whole / "config.json", tmp_path)
    names = sorted(tensors)
    store(tmp_path, {"a.safetensors": names[::2], "b.safetensors": names[1::2]}, tensors)
    return tmp_path


def store(folder: Path, shards: dict[str, list[str]], tensors: Tensors) -> None:
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Changes the tensors and stores them as one shard, with an index that agrees."""
    tensors = {
        name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    change(tensors)
    store(folder, {"a.safetensors": list(tensors)}, tensors)


GATE = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
OUT = "model.layers.0.self_attn.o_proj.weight"
NORM = "model.layers.0.self_attn.indexer.k_norm.bias"


@pytest.mark.parametrize("name", [GATE, EXPERT, NORM, f"{EXPERT}_scale_inv", "lm_head.weight"])
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"{folder}: tensor {name} is missing"):
        load_model(folder, EngineConfig())


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.gate.weight", "model.layers.3.enorm.weight", "vision.weight"]
)
def test_an_unexpected_tensor_is_named(folder: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(2)}))
    with pytest.raises(CheckpointError, match=f"a.safetensors: tensor {name} is not part of this model"):
        load_model(folder, EngineConfig())


def test_a_scale_without_an_fp8_weight_is_unexpected(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({OUT: tensors[OUT].bfloat16()}))
    with pytest.raises(CheckpointError, match=f"tensor {OUT}_scale_inv is not part of this model"):
        load_model(folder, EngineConfig())


def test_layers_that_are_multiplied_as_one_must_be_alike(folder: Path) -> None:
    def make_plain(tensors: Tensors) -> None:
        tensors[EXPERT] = tensors[EXPERT].bfloat16()
        del tensors[f"{EXPERT}_scale_inv"]

    rewrite(folder, make_plain)
    with pytest.raises(
        CheckpointError, match=r"some of .*3\.gate_proj, .*3\.up_proj are FP8, but all or none must be"
    ):
        load_model(folder, EngineConfig())


def test_experts_must_be_alike(folder: Path) -> None:
    """All experts of a layer are one tensor."""

    def make_plain(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.mlp.experts.2.")]:
            if name.endswith("_scale_inv"):
                del tensors[name]
            else:
                tensors[name] = tensors[name].bfloat16()

    rewrite(folder, make_plain)
    with pytest.raises(
        CheckpointError, match=r"some matrices of .*experts\.2\.\* and .* all or none must be"
    ):
        load_model(folder, EngineConfig())


def wrong(folder: Path, name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: make(tensors[name])}))


@pytest.mark.parametrize("name", [GATE, EXPERT, NORM, f"{EXPERT}_scale_inv", "model.embed_tokens.weight"])
def test_a_wrong_shape_is_named(folder: Path, name: str) -> None:
    wrong(folder, name, lambda tensor: torch.cat([tensor, tensor]))
    with pytest.raises(CheckpointError, match=f"a.safetensors: tensor {name} has shape .*, expected "):
        load_model(folder, EngineConfig())


@pytest.mark.parametrize("name", [GATE, EXPERT, NORM, f"{EXPERT}_scale_inv"])
def test_a_wrong_dtype_is_named(folder: Path, name: str) -> None:
    wrong(folder, name, lambda tensor: tensor.half())
    with pytest.raises(
        CheckpointError, match=f"a.safetensors: tensor {name} is torch.float16, expected torch"
    ):
        load_model(folder, EngineConfig())


def test_fp8_weights_must_be_announced(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="is torch.float8_e4m3fn, expected torch.bfloat16 or torch.float32"
    ):
        load_model(folder, EngineConfig())


def test_an_index_that_names_a_missing_file(folder: Path) -> None:
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"{INDEX_FILE}: names b.safetensors, which does not exist"):
        load_model(folder, EngineConfig())


def test_an_index_that_disagrees_with_its_files(folder: Path, tensors: Tensors) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    removed = min(index["weight_map"])
    file = index["weight_map"].pop(removed)
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=f"{file}: tensor {removed} is in the file but not in {INDEX_FILE}"
    ):
        load_model(folder, EngineConfig())
    index["weight_map"] |= {removed: file, "model.extra": file}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=f"{file}: tensor model.extra is not in the file but in {INDEX_FILE}"
    ):
        load_model(folder, EngineConfig())


def test_a_malformed_index(folder: Path) -> None:
    (folder / INDEX_FILE).write_text('{"weight_map": [1]}')
    with pytest.raises(CheckpointError, match=f"{INDEX_FILE}: not a safetensors index"):
        load_model(folder, EngineConfig())


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_file_is_named(folder: Path, cut: int) -> None:
    path = folder / "b.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"b\.safetensors: not a whole safetensors file"):
        load_model(folder, EngineConfig())


def test_a_foreign_file_is_named(folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(b"PK\x03\x04" * 1000)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: not a whole safetensors file"):
        load_model(folder, EngineConfig())


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / INDEX_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"holds neither {SINGLE_FILE} nor {INDEX_FILE}"):
        load_model(folder, EngineConfig())


def test_a_tensor_can_be_taken_once(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        assert checkpoint.take(GATE, (4, 256), (torch.bfloat16,)).shape == (4, 256)
        with pytest.raises(CheckpointError, match=f"tensor {GATE} is missing"):
            checkpoint.take(GATE, (4, 256), (torch.bfloat16,))


def test_a_taken_tensor_does_not_hang_on_to_its_file(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        tensor = checkpoint.take(GATE, (4, 256), (torch.bfloat16,))
        before = tensor.clone()
        for file in folder.glob("*.safetensors"):
            file.write_bytes(bytes(file.stat().st_size))
        assert torch.equal(tensor, before)


def test_one_file_loads_as_well_as_shards(folder: Path, tensors: Tensors) -> None:
    sharded = load_model(folder, FP32)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / SINGLE_FILE)
    assert torch.equal(load_model(folder, FP32)._head, sharded._head)


def test_mtp_and_stored_frequencies_are_passed_over(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(folder, EngineConfig(), progress=lambda taken, total: seen.append((taken, total)))
    names = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    needed = [name for name in names if not name.startswith("model.layers.2.")]
    assert len(needed) < len(names)
    assert seen == [(taken, len(needed)) for taken in range(1, len(needed) + 1)]
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({frequencies: torch.ones(32)}))
    load_model(folder, EngineConfig())
    rewrite(
        folder, lambda tensors: [tensors.pop(name) for name in names if name.startswith("model.layers.2.")]
    )
    load_model(folder, EngineConfig())


def test_both_precisions_dequantise_to_the_same_weights(folder: Path, tensors: Tensors) -> None:
    expected = tensors[OUT].float() * tensors[f"{OUT}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(
        128, 1
    )
    full = load_model(folder, FP32).layers[0].attention._out
    assert torch.equal(full.weight, expected)
    quantized = load_model(folder, EngineConfig()).layers[0].attention._out
    assert not isinstance(quantized.weight, torch.Tensor)
    x = torch.randn(3, 256).mul(64).round().div(64).clamp(-3, 3)
    assert (quantized(x) - full(x)).norm() / full(x).norm() < 0.05


def test_bf16_weights_stay_plain_in_both_precisions(tmp_path: Path) -> None:
    write_tiny(tmp_path, dtype="bf16", **SMALL)
    for config in (EngineConfig(), FP32):
        weight = load_model(tmp_path, config).layers[1].attention._out.weight
        assert isinstance(weight, torch.Tensor)
        assert weight.dtype == torch.float32
